"""Results folders as `overtone bench` leaves them, made by hand."""

from __future__ import annotations

import tempfile
from pathlib import Path

from overtone.lab.report.frame import load_results
from overtone.lab.results.folder import ResultsFolder
from overtone.lab.results.header import FORMAT
from overtone.lab.results.record import EditRecord
from overtone.lab.score.scores import Scores
from overtone.lab.score.traces import EditTrace

TRACE = EditTrace([0, 1, 2], [3.0, 1.0, 0.5], [3.0, 1.5, 1.6], [5.0, 0.1], [0.4, -0.2])

HEADER = {
    "format": FORMAT,
    "commands": [["overtone", "bench"]],
    "versions": {"torch": "2"},
    "machine": "2 cores, x86_64",
    "recommended": {},
    "held_out_texts": 64,
    "models": [
        {
            "data": "short",
            "seed": 0,
            "title": "llama",
            "knowledge": {"facts": 1.0, "two hops": 0.99},
            "perplexity": 1.4,
            "fingerprint": "a",
            "file": None,
            "size": None,
        }
    ],
}


def scores(share, **others):
    """All four measures alike, but for those that are named."""
    accuracy = {"rel": share, "gen": share, "por": share, "loc": share} | others
    return Scores(accuracy, {}, accuracy, p_new=0.9, p_old=0.1, kl=0.2)


def record(share=1.0, **changes):
    """A single edit with this average; None: it failed."""
    values = {
        "data": "short",
        "seed": 0,
        "method": "lora",
        "settings": {"lr": 0.005, "steps": 50},
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
    return EditRecord(**values | changes)


def singles(shares, **changes):
    """A single edit for each share."""
    return [record(share, sequence=number, index=number, **changes) for number, share in enumerate(shares)]


def sequence(shares, *, number=0, **changes):
    """One sequence of edits."""
    return [
        record(
            share, length=len(shares), sequence=number, position=place, index=number * len(shares) + place, **changes
        )
        for place, share in enumerate(shares)
    ]


def write(folder, records, **header):
    """A results folder with these records; its header lists what they have, in their order."""
    lists = {
        name: list(dict.fromkeys(getattr(made, field) for made in records))
        for name, field in (("data", "data"), ("methods", "method"), ("losses", "loss"))
    }
    results = ResultsFolder(folder)
    results.begin({**HEADER, **lists, **header})
    by_key = {}
    for made in records:
        by_key.setdefault(made.key, []).append(made)
    for whole in by_key.values():
        results.write(whole)
    return folder


def results_of(records):
    """What a report reads of these records."""
    with tempfile.TemporaryDirectory() as folder:
        return load_results(write(Path(folder), records))
