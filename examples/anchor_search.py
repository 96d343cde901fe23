"""On what may an anchor stand? LoRA edits of a real model with several groups of texts that must stay, against stops.

    python examples/anchor_search.py --model gemma.gguf --data counterfact --file counterfact.json --edits 12 \\
        --groups prompt,names,subject,prefixes --draw 1 --out search.csv

Nothing but the edit's request and what the unedited model writes itself is used:

- prompt: the edit's prompt, as `anchor=1` has it;
- names: the prompt asked of other names, which the model proposes as a list that begins with the subject, each with its
  own greedy answer;
- subject: what the model writes on after the subject;
- prefixes: no anchor, but the target once more behind texts that the model writes, as ROME's context templates are.

Each group has a mean of its own in the loss. The edit's own text is in every step, of the others all or as many as
`--draw` says. A row of the file is an edit with one loss; finished ones are kept, and the same command goes on.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from overtone.anchor import Anchors
from overtone.lab.data.corpora import open_corpus
from overtone.lab.data.edit import Edit
from overtone.lab.edit.families import Family
from overtone.lab.edit.many import Job, OpenedWeights, Snapshot, fit_many
from overtone.lab.edit.methods import METHODS, MethodSettings
from overtone.lab.model.completion import complete
from overtone.lab.model.positions import Text, logits_at
from overtone.lab.model.targets import encode_targets
from overtone.lab.model.workplace import Workplace
from overtone.lab.score.batched import examine_many, score_many
from overtone.token_loss import EditLoss, parse

STOPS = ("0.5", "0.3", "0.1", "0.05", "0.01", "correct")
OPENINGS = ("The", "Therefore", "Because")
TARGET = "target"
ANCHORED = ("prompt", "names", "subject")
GROUPS = (*ANCHORED, "prefixes")
FIELDS = ("data", "edit", "loss", "groups", "count", "draw", "lr", "limit", "steps", "rel", "gen", "por", "loc", "kl")
KEY = FIELDS[: FIELDS.index("steps")]


class Writer:
    """What the unedited model writes around an edit."""

    def __init__(self, workplace: Workplace, count: int) -> None:
        """Take the model, and how many names, continuations and prefixes it proposes for each edit."""
        self._model, self._tokenizer = workplace.model, workplace.tokenizer
        self._count = count
        openings = list(islice(cycle(OPENINGS), count))
        torch.manual_seed(0)
        self.prefixes = [
            f"{opening} {said.rstrip('.')}. " for opening, said in zip(openings, self._say(openings), strict=True)
        ]

    def _say(self, prompts: Sequence[str], *, tokens: int = 10, temperature: float | None = 1.0) -> list[str]:
        said = complete(self._model, self._tokenizer, prompts, tokens, temperature=temperature)
        return [text.split("\n")[0].strip() for text in said]

    def names(self, edit: Edit) -> list[tuple[str, str]]:
        """The prompt asked of other names, and the model's answers."""
        torch.manual_seed(0)
        said = self._say([f"1. {edit.subject}\n2."] * (2 * self._count), tokens=8)
        names = [name for name in dict.fromkeys(said) if name and name != edit.subject][: self._count]
        prompts = [edit.prompt.replace(edit.subject, name) for name in names if edit.subject in edit.prompt]
        answers = self._say(prompts, tokens=3, temperature=None) if prompts else []
        return [(prompt, f" {answer}") for prompt, answer in zip(prompts, answers, strict=True) if answer]

    def about(self, edit: Edit) -> list[tuple[str, str]]:
        """The subject, and what the model writes on after it."""
        torch.manual_seed(0)
        openings = [edit.subject] * self._count
        return [(opening, f" {said}") for opening, said in zip(openings, self._say(openings), strict=True) if said]


@dataclass(frozen=True)
class Part:
    """A text, and for each of its positions the group that it belongs to, or `TARGET`."""

    text: Text
    groups: tuple[str, ...]


def own_part(tokenizer: Any, edit: Edit, groups: Sequence[str]) -> Part:
    """The edit's own text: its target, and its prompt if that is one of the groups."""
    (part,) = encoded(tokenizer, edit.pairs, TARGET)
    if "prompt" not in groups:
        return part
    prompt = torch.arange(int(tokenizer.bos_token_id is not None), int(part.text.positions[0]))
    return Part(Text(part.text.ids, torch.cat([prompt, part.text.positions])), ("prompt",) * len(prompt) + part.groups)


def other_parts(tokenizer: Any, writer: Writer, edit: Edit, groups: Sequence[str]) -> list[list[Part]]:
    """What the model has written, for each group that has something."""
    found = []
    if "names" in groups:
        found.append(encoded(tokenizer, writer.names(edit), "names"))
    if "subject" in groups:
        found.append(encoded(tokenizer, writer.about(edit), "subject"))
    if "prefixes" in groups:
        pairs = [(prefix + edit.prompt, edit.target_new) for prefix in writer.prefixes]
        found.append(encoded(tokenizer, pairs, TARGET))
    return [parts for parts in found if parts]


def encoded(tokenizer: Any, pairs: Sequence[tuple[str, str]], group: str) -> list[Part]:
    """The texts with the positions that predict what follows the prompts; one that tokenises otherwise is left out."""
    found = []
    for pair in pairs:
        try:
            batch = encode_targets(tokenizer, [pair])
        except ValueError:
            continue
        text = Text.before(batch.input_ids[0], batch.labels[0] >= 0)
        found.append(Part(text, (group,) * len(text.positions)))
    return found


class AnchoredEdit:
    """An edit's own text and others, some of which take part in a step, with the unedited model's logits."""

    def __init__(self, model: Any, own: Part, others: Sequence[Sequence[Part]], draw: int) -> None:
        """Take the texts, of which a step has the own one and `draw` of each list of others; 0: all of them."""
        self._parts = [own, *(part for parts in others for part in parts)]
        self._others = others
        self._draw = draw
        self.texts = tuple(part.text for part in self._parts)
        with torch.no_grad():
            self._before = logits_at(model, self.texts).split([len(part.groups) for part in self._parts])

    def rows(self, step: int) -> list[int]:
        """The places in `texts` of those that take part in a step."""
        chosen, first = [0], 1
        for number, parts in enumerate(self._others):
            places = range(first, first + len(parts))
            count = min(self._draw, len(parts)) if self._draw else len(parts)
            chosen += sorted(Random(f"{number} {step}").sample(places, count))
            first += len(parts)
        return chosen

    def objective(self, loss: EditLoss) -> Callable[[Tensor, Sequence[int]], Tensor]:
        """The loss of a step, as `overtone.lab.edit.many.Job` takes it."""

        def objective(logits: Tensor, rows: Sequence[int]) -> Tensor:
            groups = [group for row in rows for group in self._parts[row].groups]
            is_target = torch.tensor([group == TARGET for group in groups])
            ids = torch.cat([self._parts[row].text.ids.roll(-1)[self._parts[row].text.positions] for row in rows])
            if loss.anchor == 0:
                return loss.mean(logits[is_target], ids[is_target])
            before = torch.cat([self._before[row] for row in rows])
            masks = [torch.tensor([name == group for name in groups]) for group in ANCHORED if group in groups]
            logits, moved = loss.anchored(logits, [Anchors.record(before, at) for at in masks])
            return loss.mean(logits[is_target], ids[is_target], anchored=moved)

        return objective


def ends_of(
    workplace: Workplace,
    opened: OpenedWeights,
    settings: MethodSettings,
    writer: Writer | None,
    edit: Edit,
    start: Tensor,
    arguments: argparse.Namespace,
    losses: Sequence[str],
) -> dict[str, Snapshot]:
    """The weights with which one edit ends, for each loss."""
    model, tokenizer = workplace.model, workplace.tokenizer
    if writer is None:
        family = Family(map(parse, losses), "lora")
        job = family.job(encode_targets(tokenizer, edit.pairs), start, tokenizer.bos_token_id)
        (fitted,) = fit_many(model, opened, [job], steps=settings.steps, lr=settings.lr)
        return {loss: snapshot for loss, (snapshot, _) in family.results(fitted).items()}
    groups = arguments.groups.split("+")
    own, others = own_part(tokenizer, edit, groups), other_parts(tokenizer, writer, edit, groups)
    anchored = AnchoredEdit(model, own, others, arguments.draw)
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
    parser.add_argument("--count", type=int, default=16, help="texts of each group that the model writes")
    parser.add_argument("--draw", type=int, default=0, help="how many of each group a step has; 0: all")
    parser.add_argument("--losses", nargs="+", default=["overtone:anchor=1"], help="with --groups")
    parser.add_argument("--groups", default="", help="by commas; none: the early stops of cross-entropy")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(given)
    for option, least in (("edits", 1), ("steps", 1), ("count", 1), ("draw", 0)):
        if getattr(arguments, option) < least:
            parser.error(f"--{option} must be at least {least}, got {getattr(arguments, option)}")
    if not 0 < arguments.lr < float("inf"):
        parser.error(f"--lr must be a number above 0, got {arguments.lr}")
    if not arguments.file.is_file():
        parser.error(f"--file must be a file that can be read, got {arguments.file}")
    named = set(filter(None, arguments.groups.split(",")))
    if not named <= set(GROUPS):
        parser.error(f"--groups must be some of {', '.join(GROUPS)}, got {arguments.groups}")
    try:
        has_anchor = {loss: parse(loss).build("lora").anchor > 0 for loss in arguments.losses}
    except ValueError as error:
        parser.error(f"--losses: {error}")
    wants_anchor = bool(named & set(ANCHORED))
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


def read_done(file: Path) -> set[tuple[str, ...]]:
    """The keys of the rows in a file.

    Raises:
        ValueError: for a file with other columns.
    """
    with file.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        if tuple(reader.fieldnames or ()) != FIELDS:
            raise ValueError(f"--out {file} has other columns than {', '.join(FIELDS)}: give another file")
        return {tuple(row[name] for name in KEY) for row in reader}


def main(given: Sequence[str] | None = None) -> None:
    """Make the edits that are not in the file yet."""
    arguments = read_arguments(given)
    done = read_done(arguments.out) if arguments.out.exists() else None
    workplace = Workplace.load(arguments.model, dtype=arguments.dtype)
    settings = METHODS["lora"].changed({"lr": arguments.lr, "steps": arguments.steps}, is_large=True)
    opened = METHODS["lora"].open_many(workplace.model, settings)
    corpus = open_corpus(arguments.data, seed=0, path=arguments.file, size=arguments.size)
    if done is None:
        arguments.out.write_text(",".join(FIELDS) + "\n", encoding="utf-8")
    writer = Writer(workplace, arguments.count) if arguments.groups else None
    for number, edit in enumerate(corpus.edits(arguments.edits, seed=0)):
        keys = {loss: key_of(arguments, number, loss) for loss in arguments.losses}
        losses = [loss for loss, key in keys.items() if tuple(key.values()) not in (done or ())]
        if not losses:
            continue
        ends = ends_of(workplace, opened, settings, writer, edit, opened.start(number).float(), arguments, losses)
        (exam,) = examine_many(workplace.model, workplace.tokenizer, opened, [edit])
        scores = score_many(workplace.model, opened, [(exam, end.weights) for end in ends.values()])
        with arguments.out.open("a", newline="", encoding="utf-8") as stream:
            for (loss, end), score in zip(ends.items(), scores, strict=True):
                measures = {name: f"{100 * value:.2f}" for name, value in score.accuracy().items()}
                others = {"steps": end.steps, "kl": "" if score.kl is None else f"{score.kl:.3f}"}
                csv.DictWriter(stream, FIELDS, restval="").writerow(keys[loss] | others | measures)


if __name__ == "__main__":
    main()
