"""Tables 1 to 3: a row a loss, in blocks of one data, T and method. A table is what its CSV file holds.

Shares and their differences are fractions of 1, the paper's too. ``NAME low`` and ``NAME high`` are the ends of the
95% interval of NAME, and ``difference to RIVAL clear`` says whether a report sets the difference in bold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from overtone.lab.edit.compared import ABLATIONS, BASELINES, is_anchored_cross_entropy, is_early_stopping
from overtone.lab.report.frame import ACCURACIES, BLOCK
from overtone.lab.report.paper import PaperRows, ablation_rows, editing_rows, question_rows
from overtone.lab.report.statistics import Estimate, bootstrap_difference, bootstrap_mean

AVERAGE = "average"
"""The measure whose differences are taken."""

BEST_BASELINE, BEST_STOP, ANCHORED = "best baseline", "best early stopping", "anchored cross-entropy"
FULL_LOSS = "OverTone"
"""What a row is compared to."""

FEWEST_SEQUENCES = 3
"""Below it edits are resampled, though those of one sequence are not independent."""

ENOUGH_UNITS = 6
"""Fewer units all agree in sign by chance in more than 5% of cases, whatever an interval over them says."""

BEGINS = ["rel begins", "gen begins", "por begins"]
"""Shares of answers that greedy generation begins with token for token, which needs no generation."""

SAID = ["rel said", "gen said", "por said"]
"""Shares of answers that a greedy generation begins with as normalised text, where edited models were let speak."""

MEASURES = [
    *ACCURACIES,
    AVERAGE,
    "por of others",
    *BEGINS,
    *SAID,
    "exact match",
    "kl",
    "perplexity",
    "steps",
    "seconds",
]
"""Those of Tables 1 and 3; perplexities are averaged geometrically, as they are exponentials of a mean."""

Rivals = Mapping[str, Callable[[str], bool]]
"""What a row is compared to: the best, by its average, of the losses that are candidates."""


_RIVALS: Rivals = {
    BEST_BASELINE: lambda loss: loss in BASELINES,
    BEST_STOP: is_early_stopping,
    ANCHORED: is_anchored_cross_entropy,
}


def editing_table(edits: pd.DataFrame) -> pd.DataFrame:
    """Table 1: every loss against the best baseline, the best early stop and the best anchored cross-entropy."""
    return _table(edits, MEASURES, _RIVALS, editing_rows)


def ablation_table(edits: pd.DataFrame) -> pd.DataFrame:
    """Table 3: OverTone without one of its parts against OverTone; only blocks that have an ablation."""
    chosen = edits[edits["loss"].isin(["cross_entropy", *ABLATIONS, "overtone"])]
    if chosen.empty:
        return chosen
    has_ablation = chosen["loss"].isin(ABLATIONS).groupby([chosen[name] for name in BLOCK], observed=True)
    return _table(
        chosen[has_ablation.transform("any")], MEASURES, {FULL_LOSS: lambda loss: loss == "overtone"}, ablation_rows
    )


def question_table(edits: pd.DataFrame, questions: Sequence[str]) -> pd.DataFrame:
    """Table 2: reliability and the share of questions answered.

    The average is of reliability, single-hop and multi-hop answers at temperature 0.1, as in the paper (greedy where
    nothing was sampled).

    Args:
        edits: as `overtone.lab.report.frame.load_results` reads them.
        questions: the columns with shares of questions answered.
    """
    asked = edits.dropna(subset=list(questions), how="all") if questions else edits[:0]
    new = [name for name in questions if not counts_old_answers(name)]
    averaged = ["rel", *([name for name in new if is_sampled(name)] or new)]
    asked = asked.assign(**{AVERAGE: asked[averaged].mean(axis="columns")})
    return _table(asked, ["rel", *questions, AVERAGE], _RIVALS, question_rows)


def is_sampled(question: str) -> bool:
    """Whether the measure takes its answers at the paper's temperature."""
    return "temperature 0.1" in question


def counts_old_answers(question: str) -> bool:
    """Whether the measure counts the answers that were true before the edit."""
    return "old answer" in question


def resampled_units(edits: pd.DataFrame) -> tuple[str, pd.Series]:
    """What is independent in the edits of a block, "edits" or "sequences", and a number for what each belongs to.

    Edits of one sequence are made on the same weights, so sequences are resampled where there are enough of them.
    """
    sequences = edits.groupby(["seed", "sequence"]).ngroup()
    if edits["length"].iloc[0] > 1 and sequences.nunique() >= FEWEST_SEQUENCES:
        return "sequences", sequences
    return "edits", edits.groupby(["seed", "index"]).ngroup()


def _table(edits: pd.DataFrame, measures: Sequence[str], rivals: Rivals, paper: PaperRows) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for where, block in edits.groupby(BLOCK, observed=True):
        for row in _block(block, measures, rivals):
            row = {**dict(zip(BLOCK, where, strict=True)), "lr": block["lr"].iloc[0], **row}
            rows.append(row)
            for printed in paper(row["data"], row["length"], row["method"], row["loss"]):
                source = f"paper, {printed.pop('source')}"
                said = {name: value / 100 for name, value in printed.items()}
                rows.append({**{name: row[name] for name in (*BLOCK, "loss")}, "source": source, **said})
    # Whole numbers stay whole beside the rows of the paper, which have none.
    return pd.DataFrame(rows).astype({name: "Int64" for name in ("seeds", "edits", "failed", "units") if rows})


def _block(block: pd.DataFrame, measures: Sequence[str], rivals: Rivals) -> Iterator[dict[str, Any]]:
    unit, units = resampled_units(block)
    block = block.assign(unit=units).set_index(["seed", "index"])
    averages = block.pivot_table(values=AVERAGE, index=block.index.names, columns="loss", observed=True)
    unit_of_edit = block["unit"].groupby(level=[0, 1]).first()
    best = {}
    for title, is_candidate in rivals.items():
        means = averages[[loss for loss in averages.columns if is_candidate(loss)]].mean()
        if not means.empty:
            best[title] = means.idxmax()
    for loss, own in block.groupby("loss", observed=True):
        scored = own[own["error"].isna()]
        row: dict[str, Any] = {"loss": loss, "source": "this run", "seeds": block.index.get_level_values(0).nunique()}
        row |= {"edits": len(scored), "failed": len(own) - len(scored)}
        row |= {"resampled": unit, "units": units.nunique()}
        for measure in measures:
            if scored[measure].notna().any():
                row |= _columns(measure, _mean(measure, scored[measure].astype(float), scored["unit"]))
        for title, rival in best.items():
            row[title] = rival
            difference = _difference(averages, loss, rival)
            if loss != rival and not difference.empty:
                estimate = bootstrap_difference(difference, unit_of_edit.loc[difference.index])
                row |= _columns(f"difference to {title}", estimate)
                row[f"difference to {title} clear"] = _is_clear(estimate, block, len(difference), unit)
        yield row


def _difference(averages: pd.DataFrame, loss: str, rival: str) -> pd.DataFrame:
    if loss not in averages.columns:  # every edit failed
        return averages.iloc[:0]
    return (averages[loss] - averages[rival]).dropna().to_frame()


def _is_clear(difference: Estimate, block: pd.DataFrame, edits_of_both: int, unit: str) -> bool:
    """Whether a difference may be called one: it rests on enough single edits, or enough sequences of edits."""
    length = block["length"].iloc[0]
    # Sequences fail as a whole, so those that both losses finished are the edits over T.
    enough = min(block["unit"].nunique(), edits_of_both // length) >= ENOUGH_UNITS
    return bool(enough and (length == 1 or unit == "sequences") and difference.excludes_zero)


def _mean(measure: str, values: pd.Series, units: pd.Series) -> Estimate:
    if measure != "perplexity":
        return bootstrap_mean(values, units)
    logarithms = bootstrap_mean(np.log(values), units)
    return Estimate(*np.exp([logarithms.mean, logarithms.low, logarithms.high]).tolist())


def _columns(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.mean, f"{name} low": estimate.low, f"{name} high": estimate.high}
