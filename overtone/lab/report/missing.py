"""What a report lacks, so that nobody takes its silence for a result."""

from __future__ import annotations

from collections.abc import Iterator

from overtone.lab.edit.compared import ABLATIONS, BASELINES, is_early_stopping
from overtone.lab.report.frame import Results
from overtone.lab.report.titles import loss_title

_PAPER_LENGTHS = (1, 10, 100)


def missing(results: Results) -> Iterator[str]:
    """One sentence for each thing that the paper's tables and figures need and the results do not have."""
    edits = results.edits
    losses, lengths, seeds = (set(edits[name]) for name in ("loss", "length", "seed"))
    absent = [str(length) for length in _PAPER_LENGTHS if length not in lengths]
    if absent:
        yield f"Edits in a row: no T = {', '.join(absent)}."
    if lengths == {1}:
        yield "Figure 3 and the curve of forgetting: they need sequences of several edits."
    if len(losses) == 1:
        yield f"Differences: {loss_title(*losses)} is the only loss."
    absent = [loss_title(loss) for loss in BASELINES if loss not in losses]
    if absent:
        yield f"Baselines: {', '.join(absent)}. The best baseline is the best of those that were run."
    if sum(map(is_early_stopping, losses)) < 2:
        yield "Early stopping at several thresholds: without it the best one is not known."
    if not results.questions:
        yield "Table 2: no data with questions."
    absent = [loss_title(loss) for loss in ABLATIONS if loss not in losses]
    if len(absent) == len(ABLATIONS):
        yield "Table 3: no ablation."
    elif absent:
        yield f"Table 3: {', '.join(absent)}."
    if edits["trace"].isna().all():
        yield "Figures 1 and 2: no edit was watched step by step."
    if len(seeds) < 3:
        yield f"Seeds: {len(seeds)} of at least 3; intervals do not say how much another seed would change."
