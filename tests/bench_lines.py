"""Results files in the format of `overtone bench`, made by hand."""

from __future__ import annotations

import json
from dataclasses import asdict

from overtone.lab.metrics import Scores
from overtone.lab.outcomes import FORMAT, EditOutcome
from overtone.lab.traces import EditTrace

TRACE = EditTrace([0, 1, 2], [3.0, 1.0, 0.5], [3.0, 1.5, 1.6], [5.0, 0.1], [0.4, -0.2])

HEADER = {
    "format": FORMAT,
    "command": ["overtone", "bench"],
    "versions": {"torch": "2"},
    "machine": "2 cores, x86_64",
    "settings": {"edits": 4},
    "models": [
        {"data": "short", "seed": 0, "title": "llama", "knowledge": {"facts": 1.0, "two hops": 0.99}, "perplexity": 1.4}
    ],
}


def scores(share, **others):
    """All four measures alike, but for those that are named."""
    accuracy = {"rel": share, "gen": share, "por": share, "loc": share} | others
    return Scores(accuracy, {}, accuracy, p_new=0.9, p_old=0.1, kl=0.2)


def outcome(share=1.0, **changes):
    """A single edit with this average; None: it failed."""
    values = {
        "data": "short",
        "seed": 0,
        "method": "lora",
        "loss": "cross_entropy",
        "length": 1,
        "sequence": 0,
        "position": 0,
        "index": 0,
        "prompt": "The head of Apex is",
        "target_new": " Ann.",
        "target_old": " Bob.",
        "scores": None if share is None else scores(share),
        "answers": {},
        "perplexity": None if share is None else 2.0,
        "steps": 10,
        "ended": "failed" if share is None else "steps",
        "seconds": 0.1,
        "trace": None,
        "error": "RuntimeError: the loss is nan | after 3 steps\nmore" if share is None else None,
    }
    return EditOutcome(**values | changes)


def singles(shares, **changes):
    """A single edit for each share."""
    return [outcome(share, sequence=number, index=number, **changes) for number, share in enumerate(shares)]


def sequence(shares, *, number=0, **changes):
    """One sequence of edits."""
    return [
        outcome(
            share, length=len(shares), sequence=number, position=place, index=number * len(shares) + place, **changes
        )
        for place, share in enumerate(shares)
    ]


def write(path, outcomes, header=HEADER):
    """A results file."""
    lines = [header, *map(asdict, outcomes)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
