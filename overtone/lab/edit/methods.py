"""The lab's own editing methods and what an editor sets of each, the same for every loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from overtone.lab.edit.batched_lora import BatchedLora
from overtone.lab.edit.cached_ft import CachedDownProjection
from overtone.lab.edit.many import OpenedWeights
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
        breadth_first: train a sequence's edits in rounds over all of them, so many a step
            (`overtone.lab.edit.breadth_first`); None: each to its end before the next.
    """

    lr: float
    steps: int
    layer: int | None = None
    rank: int | None = None
    alpha: int | None = None
    target_modules: tuple[str, ...] | None = None
    breadth_first: int | None = None

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
        open_many: the same for many edits in a batch.
        settings: those of models of a few million parameters.
        large_settings: those of EasyEdit's files for LLaMA and its like, for models that are named.
        own_settings: which of them it has beside the optimiser's.
    """

    name: str
    title: str
    open: OpenWeights
    open_many: Callable[[Any, MethodSettings], OpenedWeights]
    settings: MethodSettings
    large_settings: MethodSettings
    own_settings: tuple[str, ...]

    def changed(self, changes: Mapping[str, Any], *, is_large: bool = False) -> MethodSettings:
        """Its settings with some of them changed; changes of what other methods have are left out."""
        names = ("lr", "steps", "breadth_first", *self.own_settings)
        settings = self.large_settings if is_large else self.settings
        return replace(settings, **{name: value for name, value in changes.items() if name in names})


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


def _open_many_lora(model: Any, settings: MethodSettings) -> OpenedWeights:
    rank, alpha = settings.rank or 8, settings.alpha or 32
    return BatchedLora(model, rank=rank, alpha=alpha, target_modules=settings.target_modules)


def _open_many_ft_m(model: Any, settings: MethodSettings) -> OpenedWeights:
    return CachedDownProjection(model, layer=settings.layer)


METHODS: Mapping[str, EditingMethod] = {
    method.name: method
    for method in (
        EditingMethod(
            "lora",
            "LoRA",
            _open_lora,
            _open_many_lora,
            MethodSettings(lr=5e-3, steps=50, rank=8, alpha=32),
            MethodSettings(lr=5e-3, steps=50, rank=8, alpha=32),
            ("rank", "alpha", "target_modules"),
        ),
        EditingMethod(
            "ft-m",
            "FT-M",
            _open_ft_m,
            _open_many_ft_m,
            MethodSettings(lr=5e-3, steps=25),
            MethodSettings(lr=5e-4, steps=25),
            ("layer",),
        ),
    )
}
