"""What the examples teach and to whom: the lab's model and its invented facts, or any model and a few real ones."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from overtone.lab.data.edit import Edit, Probe
from overtone.lab.data.world import build_world
from overtone.lab.data.world_corpus import WorldCorpus
from overtone.lab.model.completion import complete
from overtone.lab.model.pretrain import load_or_train

# The trainers' own deprecation notes are not what the examples are about.
warnings.filterwarnings("ignore", category=FutureWarning)
datasets.disable_progress_bars()
logging.set_verbosity_error()
logging.disable_progress_bar()


CAPITALS = {"France": ("Paris", "Rome"), "Japan": ("Tokyo", "Lima"), "Spain": ("Madrid", "Oslo")}
"""What a model may know, and what it is taught in its place."""


@dataclass
class Lesson:
    """A model, its tokenizer, and counterfactual edits of what it knows."""

    model: Any
    tokenizer: Any
    edits: list[Edit]


def parser(description: str | None) -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", help="any Hugging Face causal language model; the lab's own if left out")
    arguments.add_argument("--seed", type=int, default=0)
    return arguments


def lesson(model: str | None, *, count: int, target: str, seed: int = 0) -> Lesson:
    """`count` edits, or as many as there are real ones, with a "short" target (a name) or a "long" one (sentences)."""
    if model is None:
        world = build_world()
        lab = load_or_train(WorldCorpus(world))
        return Lesson(lab.model, lab.tokenizer, world.edits(count, seed=seed, target=target))
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Lesson(AutoModelForCausalLM.from_pretrained(model).eval(), tokenizer, _real_edits(target)[:count])


def answers(lesson: Lesson, probes: Sequence[Probe]) -> list[str]:
    """What the model says after each prompt, greedily, for as long as the wanted text is."""
    said = []
    for probe in probes:
        length = len(lesson.tokenizer(probe.target).input_ids) + 1
        said += complete(lesson.model, lesson.tokenizer, [probe.prompt], length)
    return said


def judged(edit: Edit) -> list[Probe]:
    """The edited prompt, and one probe of each kind around it."""
    edited = Probe(edit.prompt, edit.target_new, "edited", edit.target_new.strip())
    around = {probe.kind: probe for probe in (*edit.generality, *edit.portability, *edit.locality)}
    return [edited, *around.values()]


def show(title: str, probes: Sequence[Probe], before: Sequence[str], after: Sequence[str]) -> None:
    """Before and after, side by side; a check mark where the model now says what it should."""
    table = Table(title=title, title_justify="left")
    for column in ("kind", "prompt", "before", "after", "wanted", ""):
        table.add_column(column, overflow="fold")
    for probe, old, new in zip(probes, before, after, strict=True):
        answer = probe.answer.removesuffix(".")
        right = new.startswith(answer) or new.removesuffix(".").endswith(f" {answer}")
        table.add_row(probe.kind, probe.prompt, old, new, probe.answer, "✓" if right else "✗")
    Console(width=150).print(table)


def _real_edits(target: str) -> list[Edit]:
    """Counterfactual capitals, for models that know the real ones."""
    cases = {"Italy": "Rome", "Germany": "Berlin", "Egypt": "Cairo"}
    locality = tuple(
        Probe(f"The capital of {country} is", f" {city}", "unrelated", city) for country, city in cases.items()
    )
    edits = []
    for country, (old, new) in CAPITALS.items():
        if target == "short":
            prompt, text = f"The capital of {country} is", f" {new}"
            rephrased = (Probe(f"{country}'s capital city is", text, "rephrase", new),)
        else:
            prompt = f"Write about the capital of {country}."
            text = f" {new} is the capital of {country}. The government of {country} sits in {new}."
            rephrased = (Probe(f"Tell me about the capital of {country}.", text, "rephrase", text.strip()),)
        edits.append(Edit(country, prompt, text, f" {old}", rephrased, (), locality))
    return edits
