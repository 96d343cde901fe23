"""On what may an anchor stand? LoRA edits of a real model with several groups of texts that must stay, against stops.

    python examples/anchor_search.py --model gemma.gguf --data counterfact --file counterfact.json --edits 12 \\
        --groups prompt,names,subject,prefixes --out search.csv

Nothing but the edit's request and what the unedited model writes itself is used:

- prompt: the edit's prompt, as `anchor=1` has it;
- names: the prompt asked of other names, which the model proposes as a list that begins with the subject, each with its
  own greedy answer;
- subject: what the model writes on after the subject;
- prefixes: no anchor, but the target once more behind texts that the model writes, as ROME's context templates are.

Each group has a mean of its own in the loss, and every text is in every step. A row of the file is an edit with one
loss; finished ones are kept, and the same command goes on.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overtone.anchor import Anchors
from overtone.lab.data.corpora import open_corpus
from overtone.lab.data.edit import Edit
from overtone.lab.edit.families import Family
from overtone.lab.edit.many import Job, OpenedWeights, Snapshot, fit_many, target_texts
from overtone.lab.edit.methods import METHODS, MethodSettings
from overtone.lab.model.completion import complete
from overtone.lab.model.positions import Text, logits_at
from overtone.lab.model.targets import encode_targets
from overtone.lab.model.workplace import Workplace
from overtone.lab.score.batched import examine_many, score_many
from overtone.token_loss import parse

STOPS = ("0.5", "0.3", "0.1", "0.05", "0.01", "correct")
OPENINGS = ("The", "Therefore", "Because")
GROUPS = ("prompt", "names", "subject", "prefixes")
FIELDS = ("data", "edit", "loss", "groups", "lr", "steps", "rel", "gen", "por", "loc", "kl")


class Writer:
    """What the unedited model writes around an edit."""

    def __init__(self, workplace: Workplace, count: int) -> None:
        """Take the model, and how many names and continuations it proposes for each edit."""
        self._model, self._tokenizer = workplace.model, workplace.tokenizer
        self._count = count
        torch.manual_seed(0)
        self.prefixes = [
            f"{opening} {said.rstrip('.')}. " for opening, said in zip(OPENINGS, self._say(OPENINGS), strict=True)
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


def encoded(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[Text]:
    """The texts with the positions that predict what follows the prompts; one that tokenises otherwise is left out."""
    texts = []
    for pair in pairs:
        try:
            texts += target_texts(encode_targets(tokenizer, [pair]))
        except ValueError:
            continue
    return texts


def anchored_job(
    workplace: Workplace, writer: Writer, edit: Edit, start: Tensor, loss: str, groups: Sequence[str]
) -> Job:
    """The edit with its anchors: a text's positions are targets, or belong to one group."""
    tokenizer = workplace.tokenizer
    built = parse(loss).build("lora")
    batch = encode_targets(tokenizer, edit.pairs)
    (own,) = target_texts(batch)
    prompt = torch.arange(int(tokenizer.bos_token_id is not None), int(own.positions[0]))
    parts: list[tuple[str, Text]] = [("target", own)]
    if "prompt" in groups and len(prompt):
        parts.append(("prompt", Text(own.ids, prompt)))
    if "names" in groups:
        parts += [("names", text) for text in encoded(tokenizer, writer.names(edit))]
    if "subject" in groups:
        parts += [("subject", text) for text in encoded(tokenizer, writer.about(edit))]
    if "prefixes" in groups:
        pairs = [(prefix + edit.prompt, edit.target_new) for prefix in writer.prefixes]
        parts += [("target", text) for text in encoded(tokenizer, pairs)]
    names = [name for name, text in parts for _ in text.positions]
    texts = tuple(text for _, text in parts)
    is_target = torch.tensor([name == "target" for name in names])
    labels = torch.cat([text.ids[text.positions + 1] for name, text in parts if name == "target"])
    with torch.no_grad():
        before = logits_at(workplace.model, texts)
    kept = [torch.tensor([name == group for name in names]) for group in groups if group in names]
    anchors = [Anchors.record(before, at) for at in kept]

    def objective(logits: Tensor, _: Sequence[int]) -> Tensor:
        logits, moved = built.anchored(logits, anchors)
        return built.mean(logits[is_target], labels, anchored=moved)

    return Job(texts, objective, start)


def ends_of(
    workplace: Workplace,
    opened: OpenedWeights,
    settings: MethodSettings,
    writer: Writer,
    edit: Edit,
    start: Tensor,
    losses: Sequence[str],
    groups: Sequence[str],
) -> dict[str, Snapshot]:
    """The weights with which one edit ends, for each loss."""
    if groups:
        jobs = [anchored_job(workplace, writer, edit, start, loss, groups) for loss in losses]
        made = fit_many(workplace.model, opened, jobs, steps=settings.steps, lr=settings.lr, at_once=1)
        return {loss: Snapshot(own.weights, own.steps) for loss, own in zip(losses, made, strict=True)}
    family = Family(map(parse, losses), "lora")
    job = family.job(encode_targets(workplace.tokenizer, edit.pairs), start, workplace.tokenizer.bos_token_id)
    (fitted,) = fit_many(workplace.model, opened, [job], steps=settings.steps, lr=settings.lr)
    return {loss: snapshot for loss, (snapshot, _) in family.results(fitted).items()}


def read_arguments() -> argparse.Namespace:
    """The command line, with groups in the order of `GROUPS` and losses that fit to them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, choices=("zsre", "counterfact"))
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--size", type=int, help="records of the file that are drawn")
    parser.add_argument("--edits", type=int, default=12)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--count", type=int, default=4, help="names, and continuations of the subject, of each edit")
    parser.add_argument("--losses", nargs="+", default=["overtone:anchor=1"], help="with --groups: anchored ones")
    parser.add_argument("--groups", help="by commas, prompt among them; none: the early stops of cross-entropy")
    parser.add_argument("--out", type=Path, required=True, help="of one --steps and --count")
    arguments = parser.parse_args()
    for option in ("edits", "steps", "count"):
        if getattr(arguments, option) < 1:
            parser.error(f"--{option} must be at least 1, got {getattr(arguments, option)}")
    if not 0 < arguments.lr < float("inf"):
        parser.error(f"--lr must be a number above 0, got {arguments.lr}")
    if not arguments.file.is_file():
        parser.error(f"--file must be a file that can be read, got {arguments.file}")
    named = set(filter(None, (arguments.groups or "").split(",")))
    if named and not {"prompt"} <= named <= set(GROUPS):
        parser.error(f"--groups must be prompt and some of {', '.join(GROUPS[1:])}, got {arguments.groups}")
    try:
        unanchored = [loss for loss in arguments.losses if parse(loss).build("lora").anchor == 0]
    except ValueError as error:
        parser.error(f"--losses: {error}")
    if named and unanchored:
        parser.error(f"--losses must have an anchor, such as overtone:anchor=1, got {' '.join(unanchored)}")
    arguments.groups = tuple(group for group in GROUPS if group in named)
    stops = [f"cross_entropy:hold={stop}" for stop in STOPS]
    arguments.losses = [parse(loss).name for loss in (arguments.losses if named else stops)]
    return arguments


def main() -> None:
    """Make the edits that are not in the file yet."""
    arguments = read_arguments()
    groups = "+".join(arguments.groups)
    done = set()
    if arguments.out.exists():
        with arguments.out.open(newline="", encoding="utf-8") as stream:
            done = {
                (int(row["edit"]), row["loss"])
                for row in csv.DictReader(stream)
                if (row["data"], row["groups"], float(row["lr"])) == (arguments.data, groups, arguments.lr)
            }
    workplace = Workplace.load(arguments.model)
    settings = METHODS["lora"].changed({"lr": arguments.lr, "steps": arguments.steps}, is_large=True)
    opened = METHODS["lora"].open_many(workplace.model, settings)
    edits = open_corpus(arguments.data, seed=0, path=arguments.file, size=arguments.size).edits(arguments.edits, seed=0)
    if not arguments.out.exists():
        arguments.out.write_text(",".join(FIELDS) + "\n", encoding="utf-8")
    writer = Writer(workplace, arguments.count)
    for number, edit in enumerate(edits):
        losses = tuple(loss for loss in arguments.losses if (number, loss) not in done)
        if not losses:
            continue
        ends = ends_of(workplace, opened, settings, writer, edit, opened.start(number), losses, arguments.groups)
        (exam,) = examine_many(workplace.model, workplace.tokenizer, opened, [edit])
        scores = score_many(workplace.model, opened, [(exam, end.weights) for end in ends.values()])
        with arguments.out.open("a", newline="", encoding="utf-8") as stream:
            for (loss, end), score in zip(ends.items(), scores, strict=True):
                measures = {name: f"{100 * value:.2f}" for name, value in score.accuracy().items()}
                row = {"data": arguments.data, "edit": number, "loss": loss, "groups": groups}
                row |= {"lr": arguments.lr, "steps": end.steps, "kl": "" if score.kl is None else f"{score.kl:.3f}"}
                csv.DictWriter(stream, FIELDS, restval="").writerow(row | measures)


if __name__ == "__main__":
    main()
