"""What it gains on your machine that edits share passes: the same edits one by one and together, and their scores.

    python examples/shared_passes.py --model gemma.gguf --zsre ZsRE-test-all.json --method lora --lr 5e-4 --edits 8

Both ways make the same edits with cross-entropy and its early stops. One by one the lab also generates completions,
which it leaves out of shared passes, so the time of scoring is printed apart.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from overtone.lab.data.corpora import open_corpus
from overtone.lab.edit.methods import METHODS
from overtone.lab.edit.sessions import WeightSession
from overtone.lab.model.workplace import Workplace
from overtone.lab.run import task as one_by_one
from overtone.lab.run import together as shared
from overtone.lab.run.task import SequenceTask
from overtone.token_loss import parse

LOSSES = ("cross_entropy", "cross_entropy:hold=0.1", "cross_entropy:hold=0.01")


def timed(seconds: dict[str, float], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with its wall-clock time added up under a name."""

    def call(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

    return call


def main() -> None:
    """Make the edits both ways and print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--zsre", type=Path, required=True)
    parser.add_argument("--method", choices=tuple(METHODS), default="lora")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--edits", type=int, default=8)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    workplace = Workplace.load(arguments.model)
    settings = METHODS[arguments.method].changed({"lr": arguments.lr}, is_large=True)
    edits = open_corpus("zsre", seed=0, path=arguments.zsre).edits(arguments.edits, seed=0)
    tasks = [
        SequenceTask("zsre", 0, arguments.method, settings, parse(loss).name, number, (edit,), ())
        for number, edit in enumerate(edits)
        for loss in LOSSES
    ]
    alone: dict[str, float] = {}
    together: dict[str, float] = {}
    for seconds, place, name, part in (
        (alone, WeightSession, "apply", "fit"),
        (alone, one_by_one, "examine", "score"),
        (alone, one_by_one, "score", "score"),
        (together, shared, "fit_many", "fit"),
        (together, shared, "examine_many", "score"),
        (together, shared, "score_many", "score"),
    ):
        setattr(place, name, timed(seconds, part, getattr(place, name)))

    groups = shared.together(tasks, at_once=8)
    made = timed(together, "whole", lambda: [r for group in groups for r in group.perform(workplace)])()
    expected = timed(alone, "whole", lambda: [task.perform(workplace) for task in tasks])()

    by_key = {records[0].key: records[0] for records in expected}
    pairs = [(records[0], by_key[records[0].key]) for records in made]
    print(f"{arguments.method}, {len(edits)} edits with {len(LOSSES)} losses, one thread")
    for name, seconds in (("one by one", alone), ("together", together)):
        parts = ", ".join(f"{part} {spent:.1f} s" for part, spent in seconds.items())
        print(f"{name}: {parts}; {3600 * len(tasks) / seconds['whole']:.0f} edits an hour")
    print(f"together is {alone['fit'] / together['fit']:.1f} times as fast in fitting, ", end="")
    print(f"{alone['whole'] / together['whole']:.1f} times in all")
    print(f"edits with other steps: {sum(ours.steps != theirs.steps for ours, theirs in pairs)} of {len(pairs)}")
    for measure in ("rel", "gen", "por", "loc"):
        means = [
            sum(record.scores.accuracy.get(measure, 0.0) for record in records) / len(records)
            for records in zip(*pairs, strict=True)
        ]
        print(f"{measure}: together {100 * means[0]:.2f}, one by one {100 * means[1]:.2f}")
    print(f"peak memory of both: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GB")


if __name__ == "__main__":
    main()
