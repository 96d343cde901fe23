"""On what may an anchor stand? LoRA edits of a real model with several groups of texts that must stay, against stops.

    python examples/anchor_search.py --model gemma.gguf --data counterfact --file counterfact.json --edits 12 \\
        --groups prompt,names,subject,prefixes --draw 1 --out search.csv

Nothing but the edit's request and what the unedited model writes itself is used:

- prompt: the edit's prompt, as `anchor=1` has it;
- names: the prompt asked of other names, which the model proposes as a list that begins with the subject, each with its
  own greedy answer;
- subject: what the model writes on after the subject;
- prefixes: no anchor, but the target once more behind texts that the model writes, as ROME's context templates are.

The texts are those of `overtone.huggingface.write_texts` and `EditTexts`. The edit's own is in every step, of each
other group all or as many as `--draw` says, and each group has a mean of its own in the loss. A row of the file is an
edit with one loss; finished ones are kept, and the same command goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overtone.anchor import Anchors
from overtone.huggingface import EditTexts, write_texts
from overtone.lab.data.corpora import open_corpus
from overtone.lab.data.edit import Edit
from overtone.lab.edit.families import Family
from overtone.lab.edit.many import Job, OpenedWeights, Snapshot, at_least_float32, fit_many
from overtone.lab.edit.methods import METHODS, MethodSettings
from overtone.lab.model.positions import Text, logits_at
from overtone.lab.model.targets import IGNORE_INDEX, encode_targets
from overtone.lab.model.workplace import Workplace
from overtone.lab.score.batched import examine_many, score_many
from overtone.token_loss import EditLoss, parse

STOPS = ("0.5", "0.3", "0.1", "0.05", "0.01", "correct")
WRITTEN = {"names": "neighbours", "subject": "about", "prefixes": "prefixes"}
"""The groups that the model writes, as `WrittenTexts` calls them."""
GROUPS = ("prompt", *WRITTEN)
FIELDS = ("data", "edit", "loss", "groups", "count", "draw", "lr", "limit", "steps", "rel", "gen", "por", "loc", "kl")
KEY = FIELDS[: FIELDS.index("steps")]


class AnchoredEdit:
    """An edit's texts, some of which take part in a step, with the unedited model's logits."""

    def __init__(self, model: Any, texts: EditTexts) -> None:
        """Take the texts, and the model before the edit."""
        self.rows = texts.drawn
        self._rows = texts.rows
        self._predicts_target = [row.labels.roll(-1) != IGNORE_INDEX for row in texts.rows]
        self.texts = tuple(
            Text(row.ids, ((row.groups > 0) | predicts).nonzero().squeeze(1))
            for row, predicts in zip(texts.rows, self._predicts_target, strict=True)
        )
        with torch.no_grad():
            self._before = logits_at(model, self.texts).split([len(text.positions) for text in self.texts])

    def objective(self, loss: EditLoss) -> Callable[[Tensor, Sequence[int]], Tensor]:
        """The loss of a step, as `overtone.lab.edit.many.Job` takes it."""

        def objective(logits: Tensor, rows: Sequence[int]) -> Tensor:
            is_target = torch.cat([self._predicts_target[row][self.texts[row].positions] for row in rows])
            labels = torch.cat([self._rows[row].labels for row in rows])
            labels = labels[labels != IGNORE_INDEX]
            if loss.anchor == 0:
                return loss.mean(logits[is_target], labels)
            groups = torch.cat([self._rows[row].groups[self.texts[row].positions] for row in rows])
            before = torch.cat([self._before[row] for row in rows])
            anchors = [Anchors.record(before, groups == group) for group in groups[~is_target].unique()]
            logits, moved = loss.anchored(logits, anchors)
            return loss.mean(logits[is_target], labels, anchored=moved)

        return objective


def texts_of(workplace: Workplace, edit: Edit, arguments: argparse.Namespace) -> EditTexts:
    """The edit's own text, and those of its groups that the model writes."""
    written = write_texts(workplace.model, workplace.tokenizer, edit.prompt, edit.subject, count=arguments.count)
    left_out = {field: () for group, field in WRITTEN.items() if group not in arguments.groups.split("+")}
    return EditTexts(
        workplace.tokenizer, edit.prompt, edit.target_new, replace(written, **left_out), draw=arguments.draw or None
    )


def ends_of(
    workplace: Workplace,
    opened: OpenedWeights,
    settings: MethodSettings,
    edit: Edit,
    start: Tensor,
    arguments: argparse.Namespace,
    losses: Sequence[str],
) -> dict[str, Snapshot]:
    """The weights with which one edit ends, for each loss."""
    model, tokenizer = workplace.model, workplace.tokenizer
    if not arguments.groups:
        family = Family(map(parse, losses), "lora")
        job = family.job(encode_targets(tokenizer, edit.pairs), start, tokenizer.bos_token_id)
        (fitted,) = fit_many(model, opened, [job], steps=settings.steps, lr=settings.lr)
        return {loss: snapshot for loss, (snapshot, _) in family.results(fitted).items()}
    anchored = AnchoredEdit(model, texts_of(workplace, edit, arguments))
    jobs = [
        Job(anchored.texts, anchored.objective(parse(loss).build("lora")), start, rows=anchored.rows) for loss in losses
    ]
    made = fit_many(model, opened, jobs, steps=settings.steps, lr=settings.lr, at_once=1)
    return {loss: Snapshot(own.weights, own.steps) for loss, own in zip(losses, made, strict=True)}


def read_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with groups in the order of `GROUPS` by `+`, and losses that fit to them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", help="of the model's weights, such as bfloat16; none: float32")
    parser.add_argument("--data", required=True, choices=("zsre", "counterfact"))
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--size", type=int, help="records of the file that are drawn")
    parser.add_argument("--edits", type=int, default=12)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--groups", default="", help="by commas; none: the early stops of cross-entropy")
    of_groups = parser.add_argument_group("with --groups")
    of_groups.add_argument("--count", type=int, help="texts of each group that the model writes (default: 16)")
    of_groups.add_argument("--draw", type=int, help="how many of each group a step has; 0: all (default: 0)")
    of_groups.add_argument("--losses", nargs="+", help="(default: overtone:anchor=1)")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(given)
    defaults = {"count": 16, "draw": 0, "losses": ["overtone:anchor=1"]}
    for name, default in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
        elif not arguments.groups:
            parser.error(f"--{name} does nothing without --groups")
    for option, least in (("edits", 1), ("steps", 1), ("count", 1), ("draw", 0)):
        if getattr(arguments, option) < least:
            parser.error(f"--{option} must be at least {least}, got {getattr(arguments, option)}")
    if not 0 < arguments.lr < float("inf"):
        parser.error(f"--lr must be a number above 0, got {arguments.lr}")
    if not arguments.file.is_file():
        parser.error(f"--file must be a file that can be read, got {arguments.file}")
    named = set(filter(None, arguments.groups.split(",")))
    if named and named != {"prefixes"} and not {"prompt"} <= named <= set(GROUPS):
        parser.error(f"--groups must be prefixes, or prompt and any of {', '.join(WRITTEN)}, got {arguments.groups}")
    try:
        has_anchor = {loss: parse(loss).build("lora").anchor > 0 for loss in arguments.losses}
    except ValueError as error:
        parser.error(f"--losses: {error}")
    wants_anchor = "prompt" in named
    if named and (wrong := [loss for loss, has in has_anchor.items() if has != wants_anchor]):
        word = "an" if wants_anchor else "no"
        parser.error(f"--losses must have {word} anchor with --groups {arguments.groups}, got {' '.join(wrong)}")
    arguments.groups = "+".join(group for group in GROUPS if group in named)
    if not named:
        arguments.count = arguments.draw = 0
    stops = [f"cross_entropy:hold={stop}" for stop in STOPS]
    arguments.losses = [parse(loss).name for loss in (arguments.losses if named else stops)]
    return arguments


def key_of(arguments: argparse.Namespace, edit: int, loss: str) -> dict[str, str]:
    """What tells a row of the file from all others, as it is written there."""
    values = {**vars(arguments), "edit": edit, "loss": loss, "limit": arguments.steps}
    return {name: str(values[name]) for name in KEY}


def require_same_source(arguments: argparse.Namespace) -> None:
    """Note beside the file which model and records the edits of each data set are of.

    Raises:
        ValueError: those that are there are of others.
    """
    note = arguments.out.with_suffix(".source.json")
    source = {"model": Path(arguments.model).name, "dtype": arguments.dtype}
    source |= {"file": arguments.file.name, "size": arguments.size}
    known = json.loads(note.read_text(encoding="utf-8")) if note.exists() and arguments.out.exists() else {}
    if known.setdefault(arguments.data, source) != source:
        raise ValueError(
            f"--out {arguments.out} has edits of {known[arguments.data]}, not of {source}: give another file"
        )
    note.write_text(json.dumps(known), encoding="utf-8")


def read_done(file: Path) -> set[tuple[str, ...]]:
    """The keys of the rows in a file.

    Raises:
        ValueError: for a file with other columns, or with half a line at its end.
    """
    if not file.read_text(encoding="utf-8").endswith("\n"):
        raise ValueError(f"--out {file} ends in a line that was cut off: delete that line")
    with file.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        if tuple(reader.fieldnames or ()) != FIELDS:
            raise ValueError(f"--out {file} has other columns than {', '.join(FIELDS)}: give another file")
        return {tuple(row[name] for name in KEY) for row in reader}


def main(given: Sequence[str] | None = None) -> None:
    """Make the edits that are not in the file yet."""
    arguments = read_arguments(given)
    done = read_done(arguments.out) if arguments.out.exists() else None
    require_same_source(arguments)
    workplace = Workplace.load(arguments.model, dtype=arguments.dtype)
    settings = METHODS["lora"].changed({"lr": arguments.lr, "steps": arguments.steps}, is_large=True)
    opened = METHODS["lora"].open_many(workplace.model, settings)
    corpus = open_corpus(arguments.data, seed=0, path=arguments.file, size=arguments.size)
    if done is None:
        arguments.out.write_text(",".join(FIELDS) + "\n", encoding="utf-8")
    for number, edit in enumerate(corpus.edits(arguments.edits, seed=0)):
        keys = {loss: key_of(arguments, number, loss) for loss in arguments.losses}
        losses = [loss for loss, key in keys.items() if tuple(key.values()) not in (done or ())]
        if not losses:
            continue
        ends = ends_of(workplace, opened, settings, edit, at_least_float32(opened.start(number)), arguments, losses)
        (exam,) = examine_many(workplace.model, workplace.tokenizer, opened, [edit])
        scores = score_many(workplace.model, opened, [(exam, end.weights) for end in ends.values()])
        with arguments.out.open("a", newline="", encoding="utf-8") as stream:
            for (loss, end), score in zip(ends.items(), scores, strict=True):
                measures = {name: f"{100 * value:.2f}" for name, value in score.accuracy().items()}
                others = {"steps": end.steps, "kl": "" if score.kl is None else f"{score.kl:.3f}"}
                csv.DictWriter(stream, FIELDS, restval="").writerow(keys[loss] | others | measures)


if __name__ == "__main__":
    main()
