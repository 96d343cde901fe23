"""The losses that the lab compares unless it is told otherwise, as canonical specs of `overtone.token_loss`."""

from __future__ import annotations

import re

COMPARED = (
    "cross_entropy",
    "cross_entropy:hold=0.1",
    "label_smoothing",
    "overtone",
    "overtone:hold=settled",
    "overtone_recommended",
)
"""The baselines; the paper's OverTone; the same held once settled; the settings that we recommend."""

BASELINES = ("cross_entropy", "label_smoothing", "cross_entropy:hold=0.1")
"""The losses that a user would have without this project, with the settings that they have by default."""

ABLATIONS = (
    "overtone:epsilon=0",
    "overtone:n_sigma=none",
    "overtone:check=false",
    "overtone:dynamic=false",
    "overtone:epsilon=0+check=false",
    "overtone:lam=1",
)
"""The paper's Table 3; then the filtered mixture as the target of every token, never clipped; then clipping alone."""

THRESHOLDS = tuple(f"cross_entropy:hold={nats}" for nats in (0.01, 0.05, 0.1, 0.3, 0.5))
"""Cross-entropy in nats at which an edit is stopped; the best one is the rival of every other loss."""


def is_early_stopping(loss: str) -> bool:
    """Whether a spec is cross-entropy that ends at some threshold."""
    return re.fullmatch(r"cross_entropy:hold=[\d.e-]+", loss) is not None


def is_anchored_cross_entropy(loss: str) -> bool:
    """Whether a spec is cross-entropy beside the anchor, which says what of a difference is due to the loss itself."""
    return loss.startswith("cross_entropy:") and re.search(r"\banchor=", loss) is not None
