"""The language model inside the wrappers that tuners put around it."""

from __future__ import annotations

from torch import nn


def innermost(model: nn.Module) -> nn.Module:
    """The language model inside PEFT's wrappers: a loss set on a wrapper is ignored."""
    while hasattr(model, "get_base_model"):
        model = model.get_base_model()  # type: ignore[operator]
    return model
