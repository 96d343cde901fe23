"""What it gains on your machine that edits share passes: the same edits together and one by one, and their scores.

    python examples/shared_passes.py --model gemma.gguf --zsre ZsRE-test-all.json --method lora --lr 5e-4

Both ways make edits with cross-entropy and two of its early stops, on one thread of the CPU. One by one the lab also
generates completions, which it leaves out of shared passes, so the time of scoring is printed apart. Times are those of
the processor, which other programs on the machine do not lengthen.
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
AT_ONCE = 8


def timed(seconds: dict[str, float], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with its processor time added up under a name."""

    def call(*arguments: Any, **options: Any) -> Any:
        start = time.process_time()
        try:
            return function(*arguments, **options)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.process_time() - start

    return call


def peak_memory() -> str:
    """The most memory that this process had so far."""
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GB"


def main() -> None:
    """Make the edits both ways and print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--zsre", type=Path, required=True)
    parser.add_argument("--method", choices=tuple(METHODS), default="lora")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--edits", type=int, default=AT_ONCE, help="made together")
    parser.add_argument("--alone", type=int, default=2, help="how many of them are made one by one, too")
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

    groups = shared.together(tasks, AT_ONCE)
    made = timed(together, "whole", lambda: [r for group in groups for r in group.perform(workplace)])()
    memory = {"together": peak_memory()}
    few = [task for task in tasks if task.sequence < arguments.alone]
    expected = timed(alone, "whole", lambda: [task.perform(workplace) for task in few])()
    memory["both"] = peak_memory()

    print(f"{arguments.method}, {len(LOSSES)} losses; processor seconds an edit and loss")
    for title, seconds, count in (("together", together, len(tasks)), ("one by one", alone, len(few))):
        parts = ", ".join(f"{part} {spent / count:.2f}" for part, spent in seconds.items())
        print(f"{title}, {count // len(LOSSES)} edits: {parts}; {3600 * count / seconds['whole']:.0f} an hour")
    for part in ("fit", "score", "whole"):
        print(f"{part}: {alone[part] / len(few) / (together[part] / len(tasks)):.1f} times as fast together")
    print(f"peak memory: {', '.join(f'{title} {peak}' for title, peak in memory.items())}")

    by_key = {records[0].key: records[0] for records in made}
    pairs = [(by_key[records[0].key], records[0]) for records in expected]
    print(f"of {len(pairs)} edits made both ways {sum(a.steps != b.steps for a, b in pairs)} took other steps")
    for measure in ("rel", "gen", "por", "loc"):
        scores = [[record.scores.accuracy.get(measure) for record in pair] for pair in pairs]
        furthest = max((abs(a - b) for a, b in scores if a is not None), default=0.0)
        print(f"{measure}: at most {100 * furthest:.2f} points apart")
    print(
        f"KL on locality: at most {max(abs(a.scores.kl - b.scores.kl) / b.scores.kl for a, b in pairs):.1e} of it apart"
    )


if __name__ == "__main__":
    main()
