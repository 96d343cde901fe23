"""What many edited models say of their own accord, each row of one generation from its own edit's weights."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from torch import Tensor

from overtone.lab.edit.many import OpenedWeights
from overtone.lab.score.answers import begins_with
from overtone.lab.score.batched import Exam
from overtone.lab.score.completion import complete


def spoken_answers(
    model: Any, tokenizer: Any, opened: OpenedWeights, examined: Sequence[tuple[Exam, Tensor]]
) -> list[dict[str, float]]:
    """For each edit, measure to the share of probes whose answer a greedy completion begins with, as normalised text.

    Where `EditScores.begins` compares tokens, this also counts an answer that the model spells with other tokens, and
    aliases. It generates, so it takes much longer. Locality is left out: its answers are the unedited model's.

    Args:
        model: the unedited model, in evaluation mode.
        tokenizer: its tokenizer.
        opened: the weights that were edited.
        examined: (exam, weights) of each edit.
    """
    asked = [
        [(probe, measure) for probe, measure in zip(exam.probes, exam.measures, strict=True) if measure != "loc"]
        for exam, _ in examined
    ]
    longest = max(len(labels) for exam, _ in examined for labels in exam.labels)
    prompts = [probe.prompt for probes in asked for probe, _ in probes]
    with opened.applied([weights for _, weights in examined], [len(probes) for probes in asked], ()):
        # Other tokens than the target's may need more of them.
        said = iter(complete(model, tokenizer, prompts, longest + 4))
    shares = []
    for probes in asked:
        hits: dict[str, list[float]] = {}
        for probe, measure in probes:
            is_right = begins_with(next(said), (probe.answer, *probe.aliases))
            hits.setdefault(measure, []).append(float(is_right))
        shares.append({measure: fmean(values) for measure, values in hits.items()})
    return shares
