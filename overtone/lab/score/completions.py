"""What many edited models say of their own accord, each row of one generation from its own edit's weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from overtone.lab.edit.many import OpenedWeights
from overtone.lab.model.answers import begins_with
from overtone.lab.model.completion import complete_for
from overtone.lab.score.batched import Exam, passes
from overtone.lab.score.scores import by_measure


def say_many(
    model: Any,
    tokenizer: Any,
    opened: OpenedWeights,
    examined: Sequence[tuple[Exam, Tensor]],
    *,
    tokens_at_once: int = 2048,
) -> list[dict[str, float]]:
    """For each edit, measure to the share of probes after which a greedy completion begins with the answer.

    Where `EditScores.begins` compares tokens, this compares normalised text: it also counts an answer that the model
    spells with other tokens, and aliases. It generates, so it takes longer than all the rest of scoring. Locality is
    left out: its answers are the unedited model's.

    Args:
        model: the unedited model, in evaluation mode.
        tokenizer: its tokenizer.
        opened: the weights that were edited.
        examined: (exam, weights) of each edit.
        tokens_at_once: as for `overtone.lab.score.batched.score_many`.
    """
    return [shares for group in passes(examined, tokens_at_once) for shares in _say(model, tokenizer, opened, group)]


def _say(
    model: Any, tokenizer: Any, opened: OpenedWeights, examined: Sequence[tuple[Exam, Tensor]]
) -> list[dict[str, float]]:
    asked = [
        [(probe, measure) for probe, measure in zip(exam.probes, exam.measures, strict=True) if measure != "loc"]
        for exam, _ in examined
    ]
    probes = [probe for own in asked for probe, _ in own]
    with opened.applied([weights for _, weights in examined], [len(own) for own in asked], ()):
        completions = complete_for(model, tokenizer, probes)
    right = iter(begins_with(said, probe.answers) for said, probe in zip(completions, probes, strict=True))
    return [by_measure([(measure, probe.kind, float(next(right))) for probe, measure in own]) for own in asked]
