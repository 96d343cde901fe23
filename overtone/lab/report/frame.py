"""The results of a run as one table: a row an edit, in the order of the commands that made them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from overtone.lab.registry import look_up
from overtone.lab.results.folder import ResultsFolder
from overtone.lab.results.record import EditRecord, settings_text
from overtone.lab.score.scores import Scores
from overtone.token_loss import parse

ACCURACIES = ["rel", "gen", "por", "loc"]
"""Reliability, generality, portability and locality, as `overtone.lab.score.scores` measures them."""

BLOCK = ["data", "length", "method", "settings"]
"""What edits have in common whose losses can be compared."""

_BEGUN = ("rel", "gen", "por")
"""Measures of which it is asked whether generation begins with the answer."""

_UNSCORED = Scores({}, {}, {}, p_new=math.nan, p_old=None, kl=math.nan, por_of_others=math.nan)
"""Of a failed edit, which has the columns too: tables look for them also where every edit failed."""


@dataclass(frozen=True)
class Results:
    """What a report is made of.

    Attributes:
        header: of the results folder.
        edits: a row an edit: the fields of `EditRecord` that are texts or numbers, the accuracies of `ACCURACIES` and
            their mean ``average``, ``por of others`` (without the edit's own target), ``exact match``, the shares of
            answers that generation begins with token for token (such as ``gen begins``) and as normalised text (``gen
            said``), ``kl``, and ``trace``. NaN where an edit
            failed, or nothing was measured.
        questions: the columns of ``edits`` with shares of questions answered.
        left_out: losses and seeds of the folder that were not asked for.
    """

    header: dict[str, Any]
    edits: pd.DataFrame
    questions: tuple[str, ...]
    left_out: tuple[str, ...] = ()


def load_results(folder: Path, *, losses: Collection[str] = (), seeds: Collection[int] = ()) -> Results:
    """Read a results folder, finished or not.

    Args:
        folder: the output folder of a run.
        losses: specs of those to read; none for all.
        seeds: those to read; none for all.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no results folder, has no finished edit, or lacks a loss or seed that is asked for.
    """
    header, records = ResultsFolder(folder).read_all()
    if not records:
        raise ValueError(f"{folder} has no finished edit: there is nothing to report")
    edits = pd.DataFrame(map(_row, records))
    left_out: list[str] = []
    for name, asked in (("loss", [parse(spec).name for spec in losses]), ("seed", list(seeds))):
        if asked:
            look_up({str(value): value for value in edits[name]}, name, map(str, asked))
            left_out += [f"{name} {value}" for value in edits[name].unique() if value not in asked]
            edits = edits[edits[name].isin(asked)]
    for name, order in (("data", "data"), ("method", "methods"), ("loss", "losses")):
        # The header of a run that is still being written to may lack what its records have.
        found = set(edits[name])
        known = [value for value in header[order] if value in found]
        known += sorted(found.difference(known))
        edits[name] = pd.Categorical(edits[name], known, ordered=True)
    edits = edits.sort_values([*BLOCK, "loss", "seed", "index"], ignore_index=True)
    questions = dict.fromkeys(name for record in records for name in record.answers)
    return Results(header, edits, tuple(questions), tuple(left_out))


def _row(record: EditRecord) -> dict[str, Any]:
    row = {**vars(record), **record.answers, "settings": settings_text(record.settings)}
    del row["scores"], row["answers"]
    row["lr"] = record.settings.get("lr")
    row["breadth_first"] = record.settings.get("breadth_first")
    scores = record.scores or _UNSCORED
    row |= {"kl": scores.kl, "average": _mean(scores.accuracy), "exact match": _mean(scores.exact_match)}
    row |= {name: scores.accuracy.get(name, math.nan) for name in ACCURACIES}
    row |= {f"{name} begins": scores.begins.get(name, math.nan) for name in _BEGUN}
    row |= {f"{name} said": scores.said.get(name, math.nan) for name in _BEGUN}
    row["por of others"] = scores.por_of_others
    return row


def _mean(shares: Mapping[str, float]) -> float:
    return fmean(shares.values()) if shares else math.nan
