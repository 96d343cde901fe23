"""The lab's own editing methods and what an editor sets of each, the same for every loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from overtone.lab.edit.weights import open_down_projection, open_lora


@dataclass(frozen=True)
class MethodSettings:
    """What an editor sets; None where the method has no such setting, or its own default.

    Attributes:
        lr: Adam's learning rate.
        steps: optimiser steps at most.
        layer: which block FT-M edits.
        rank: of LoRA's adapters.
        alpha: LoRA's output is scaled by alpha / rank.
        target_modules: the modules that get an adapter of LoRA's.
    """

    lr: float
    steps: int
    layer: int | None = None
    rank: int | None = None
    alpha: int | None = None
    target_modules: tuple[str, ...] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The settings that are set, as JSON has them."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if value is not None
        }


OpenWeights = Callable[[Any, MethodSettings, int], AbstractContextManager[list[nn.Parameter]]]
"""From a model, settings and a seed to a context of the weights to move; when it ends, the model is restored."""


@dataclass(frozen=True)
class EditingMethod:
    """A method of the lab.

    Attributes:
        name: the key in `METHODS`, which is also the name of the paper's OverTone preset.
        title: what tables and figures say.
        open: what it opens for training.
        settings: those of models of a few million parameters.
    """

    name: str
    title: str
    open: OpenWeights
    settings: MethodSettings


def _open_lora(model: Any, settings: MethodSettings, seed: int) -> AbstractContextManager[list[nn.Parameter]]:
    return open_lora(
        model,
        rank=settings.rank or 8,
        alpha=settings.alpha or 32,
        target_modules=settings.target_modules,
        seed=seed,
    )


def _open_ft_m(model: Any, settings: MethodSettings, seed: int) -> AbstractContextManager[list[nn.Parameter]]:
    return open_down_projection(model, layer=settings.layer)


METHODS: Mapping[str, EditingMethod] = {
    method.name: method
    for method in (
        EditingMethod("lora", "LoRA", _open_lora, MethodSettings(lr=5e-3, steps=50, rank=8, alpha=32)),
        EditingMethod("ft-m", "FT-M", _open_ft_m, MethodSettings(lr=5e-3, steps=25)),
    )
}
