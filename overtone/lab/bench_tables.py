"""From the outcomes of a bench to the numbers of its tables: a row per loss, in blocks of one data, method and T."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeAlias

from overtone.lab.comparison import bootstrap_mean, excludes_zero, paired_difference
from overtone.lab.losses import ABLATIONS
from overtone.lab.outcomes import EditOutcome
from overtone.lab.summary import Estimate

Measure: TypeAlias = Callable[[EditOutcome], float | None]
"""Reads a number from a scored edit; None where the edit has no such probe."""

AVERAGE = "average"
"""The measure whose differences are taken."""

BEST_BASELINE, BEST_STOP, FULL_LOSS = "best baseline", "best early stopping", "OverTone"
"""What a row is compared to."""

BASELINES = ("cross_entropy", "label_smoothing", "early_stopping")
"""The losses that a user would have without this project, with the settings that they have by default."""

FEWEST_SEQUENCES = 3
"""Below it edits are resampled, though those of one sequence are not independent."""

ENOUGH_UNITS = 6
"""Fewer units all agree in sign by chance in more than 5% of cases, whatever an interval over them says."""


@dataclass(frozen=True)
class Row:
    """One loss.

    Attributes:
        loss: its spec.
        measures: name to mean and interval over the scored edits.
        differences: of the average, by what it is compared to; not there for the rival itself, nor without one.
        scored: edits that count.
        failed: edits that ended with an error and count nowhere.
    """

    loss: str
    measures: dict[str, Estimate]
    differences: dict[str, Estimate]
    scored: int
    failed: int


@dataclass(frozen=True)
class Block:
    """All losses of one method on one data with one length of sequences.

    Attributes:
        data: name of the corpus.
        method: name of the editing method.
        length: T, edits in a sequence.
        rows: one per loss.
        rivals: what a row is compared to, and which loss of this block that is.
        seeds: how many.
        unit: "edits" or "sequences", what was resampled.
        units: how many of them there are.
    """

    data: str
    method: str
    length: int
    rows: tuple[Row, ...]
    rivals: dict[str, str]
    seeds: int
    unit: str
    units: int

    @property
    def has_enough_units(self) -> bool:
        """Whether intervals can be trusted: over enough single edits, or enough sequences of edits."""
        return self.units >= ENOUGH_UNITS and (self.length == 1 or self.unit == "sequences")

    def is_clear(self, difference: Estimate) -> bool:
        """Whether a difference of this block may be called one: the only ones that tables set in bold."""
        # Sequences fail as a whole, so those that both losses finished are the edits over T.
        finished_by_both = difference.count // self.length
        return self.has_enough_units and finished_by_both >= ENOUGH_UNITS and excludes_zero(difference)


def average(outcome: EditOutcome) -> float | None:
    """Of the accuracies that the edit has probes for."""
    return fmean(outcome.scores.accuracy.values()) if outcome.scores else None


def _accuracy(name: str) -> Measure:
    return lambda outcome: outcome.scores.accuracy.get(name) if outcome.scores else None


EDITING_MEASURES: Mapping[str, Measure] = {
    "rel": _accuracy("rel"),
    "gen": _accuracy("gen"),
    "por": _accuracy("por"),
    "loc": _accuracy("loc"),
    AVERAGE: average,
    "exact match": lambda outcome: fmean(outcome.scores.exact_match.values()) if outcome.scores else None,
    "kl": lambda outcome: outcome.scores.kl if outcome.scores else None,
    "perplexity": lambda outcome: outcome.perplexity,
    "steps": lambda outcome: float(outcome.steps),
}
"""The measures of Tables 1 and 3; perplexities are averaged geometrically, as they are exponentials of a mean."""


def editing_blocks(outcomes: Iterable[EditOutcome], *, seed: int = 0) -> list[Block]:
    """Table 1: every loss against the best baseline and against the best early stop of its block."""
    return _blocks(outcomes, EDITING_MEASURES, _RIVALS, seed)


def ablation_blocks(outcomes: Iterable[EditOutcome], *, seed: int = 0) -> list[Block]:
    """Table 3: OverTone without one of its parts against OverTone; only blocks that have an ablation."""
    compared = ("cross_entropy", *ABLATIONS, "overtone")
    chosen = [outcome for outcome in outcomes if outcome.loss in compared]
    blocks = _blocks(chosen, EDITING_MEASURES, {FULL_LOSS: lambda loss: loss == "overtone"}, seed)
    return [block for block in blocks if any(row.loss in ABLATIONS for row in block.rows)]


def question_blocks(outcomes: Iterable[EditOutcome], *, seed: int = 0) -> list[Block]:
    """Table 2: reliability and the share of questions answered; compared as in Table 1, on their average."""
    asked = [outcome for outcome in outcomes if outcome.answers]
    questions = dict.fromkeys(question for outcome in asked for question in outcome.answers)
    measures: dict[str, Measure] = {"rel": _accuracy("rel")}
    measures |= {question: _answered(question) for question in questions}
    return _blocks(asked, measures | {AVERAGE: _question_average}, _RIVALS, seed)


def _answered(question: str) -> Measure:
    return lambda outcome: outcome.answers.get(question)


def _question_average(outcome: EditOutcome) -> float | None:
    """As in the paper: of reliability, single-hop and multi-hop answers at temperature 0.1; greedy if not sampled."""
    if outcome.scores is None:
        return None
    new = {question: share for question, share in outcome.answers.items() if not counts_old_answers(question)}
    sampled = {question: share for question, share in new.items() if is_sampled(question)}
    return fmean([outcome.scores.accuracy["rel"], *(sampled or new).values()])


def is_sampled(question: str) -> bool:
    """Whether the measure takes its answers at the paper's temperature."""
    return "temperature 0.1" in question


def counts_old_answers(question: str) -> bool:
    """Whether the measure counts the answers that were true before the edit."""
    return "old answer" in question


def is_early_stopping(loss: str) -> bool:
    """Whether a spec is cross-entropy with some threshold."""
    return loss.partition(":")[0] == "early_stopping"


_RIVALS: Mapping[str, Callable[[str], bool]] = {
    BEST_BASELINE: lambda loss: loss in BASELINES,
    BEST_STOP: is_early_stopping,
}


def resampled_units(outcomes: Sequence[EditOutcome]) -> tuple[str, list[Hashable]]:
    """What is independent in these outcomes, and which of it each belongs to.

    Edits of one sequence are made on the same weights, so sequences are resampled where there are enough of them.
    """
    sequences: list[Hashable] = [(outcome.seed, outcome.sequence) for outcome in outcomes]
    if outcomes[0].length > 1 and len(set(sequences)) >= FEWEST_SEQUENCES:
        return "sequences", sequences
    return "edits", [_edit(outcome) for outcome in outcomes]


def _edit(outcome: EditOutcome) -> Hashable:
    """The same for the same edit at the same place under every loss."""
    return outcome.seed, outcome.sequence, outcome.position, outcome.index


def _blocks(
    outcomes: Iterable[EditOutcome],
    measures: Mapping[str, Measure],
    candidates: Mapping[str, Callable[[str], bool]],
    seed: int,
) -> list[Block]:
    groups: dict[tuple[str, int, str], dict[str, list[EditOutcome]]] = {}
    for outcome in outcomes:
        block = groups.setdefault((outcome.data, outcome.length, outcome.method), {})
        block.setdefault(outcome.loss, []).append(outcome)
    data_in_order = list(dict.fromkeys(data for data, _, _ in groups))
    ordered = sorted(groups, key=lambda group: (data_in_order.index(group[0]), group[1]))
    return [
        _block(data, method, length, groups[data, length, method], measures, candidates, seed)
        for data, length, method in ordered
    ]


def _block(
    data: str,
    method: str,
    length: int,
    by_loss: Mapping[str, list[EditOutcome]],
    measures: Mapping[str, Measure],
    candidates: Mapping[str, Callable[[str], bool]],
    seed: int,
) -> Block:
    everything = [outcome for group in by_loss.values() for outcome in group]
    unit, unit_of_each = resampled_units(everything)
    units = {_edit(outcome): its_unit for outcome, its_unit in zip(everything, unit_of_each, strict=True)}
    averages = {loss: _values(group, measures[AVERAGE]) for loss, group in by_loss.items()}
    means = {loss: fmean(values.values()) for loss, values in averages.items() if values}
    rivals = {}
    for title, is_candidate in candidates.items():
        found = {loss: mean for loss, mean in means.items() if is_candidate(loss)}
        if found:
            rivals[title] = max(found, key=found.__getitem__)
    rows = []
    for loss, group in by_loss.items():
        differences = {}
        for title, rival in rivals.items():
            difference = paired_difference(averages[loss], averages[rival], units, seed=seed)
            if difference is not None and loss != rival:
                differences[title] = difference
        scored = len(averages[loss])
        estimates = {
            name: _estimate(name, values, units, seed)
            for name, values in ((name, _values(group, measure)) for name, measure in measures.items())
            if values
        }
        rows.append(Row(loss, estimates, differences, scored, len(group) - scored))
    seeds = len({outcome.seed for outcome in everything})
    return Block(data, method, length, tuple(rows), rivals, seeds, unit, len(set(units.values())))


def _values(outcomes: Iterable[EditOutcome], measure: Measure) -> dict[Hashable, float]:
    """By edit; edits that failed, or have no such probe, are left out."""
    read = {_edit(outcome): measure(outcome) for outcome in outcomes if outcome.scores is not None}
    return {edit: value for edit, value in read.items() if value is not None}


def _estimate(name: str, values: Mapping[Hashable, float], units: Mapping[Hashable, Hashable], seed: int) -> Estimate:
    unit_of_each = [units[edit] for edit in values]
    if name != "perplexity":
        return bootstrap_mean(list(values.values()), unit_of_each, seed=seed)
    logarithms = bootstrap_mean([math.log(value) for value in values.values()], unit_of_each, seed=seed)
    low, high = (None if end is None else math.exp(end) for end in (logarithms.low, logarithms.high))
    return Estimate(math.exp(logarithms.mean), low, high, logarithms.count)
