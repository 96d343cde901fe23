"""The two fields of a loss that say what must stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from overtone.token_loss.edit_loss import EditLoss

NO_ANCHOR: Mapping[str, float] = {"anchor": EditLoss.anchor, "anchor_epsilon": EditLoss.anchor_epsilon}
"""Their defaults, in canonical order."""


def refuse_unused_anchor_epsilon(fields: Mapping[str, Any], anchor: float) -> None:
    """Raise a ValueError for fields with an anchor_epsilon where the anchor is 0."""
    if "anchor_epsilon" in fields and anchor == 0:
        raise ValueError(
            f"anchor_epsilon={fields['anchor_epsilon']!r} does nothing without an anchor: give anchor, 1 say, or leave "
            "it out"
        )
