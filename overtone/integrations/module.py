"""The loss for configuration files that name a loss by its path: torchtune's `_component_`, NeMo's `_target_`."""

from __future__ import annotations

from overtone.checks import Reduction
from overtone.integrations.settings import Settings, read_settings
from overtone.loss import OverToneLoss

__all__ = ["loss_module"]


def loss_module(settings: Settings = None, *, ignore_index: int = -100, reduction: Reduction = "mean") -> OverToneLoss:
    """An `OverToneLoss` whose settings can be written in a file; raises what `read_settings` and it raise."""
    return OverToneLoss(read_settings(settings), ignore_index=ignore_index, reduction=reduction)
