"""FT-M for many edits in one pass, which starts at the edited block: what enters it no edit can change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from overtone.lab.edit.weights import open_down_projection
from overtone.lab.model.positions import Text, entering_at, layer_inputs


class CachedDownProjection:
    """`overtone.lab.edit.weights.open_down_projection` for many edits at once.

    An edit's weights are a copy of the down-projection's weight, as one vector.
    """

    def __init__(self, model: Any, *, layer: int | None = None) -> None:
        """Find the weight.

        Args:
            model: a causal language model in which `open_down_projection` finds one.
            layer: which block; None: two thirds up the model.

        Raises:
            ValueError: the model has no such weight, or not so many layers.
        """
        self._model = model
        with open_down_projection(model, layer=layer) as (weight,):
            self._weight = weight
        (name,) = (name for name, parameter in model.named_parameters() if parameter is weight)
        self._projection = model.get_submodule(name.rpartition(".")[0])
        self._layers, self._index = _block_of(model, self._projection)

    def start(self, seed: int) -> Tensor:
        """See `OpenedWeights`: the unedited weight, whatever the seed."""
        return self._weight.detach().flatten()

    def prepare(self, texts: Sequence[Text]) -> list[Tensor]:
        """See `OpenedWeights`: the hidden states (T, D) that enter the edited block."""
        return layer_inputs(self._model, self._layers[self._index], texts)

    @contextmanager
    def applied(self, weights: Sequence[Tensor], rows: Sequence[int], prepared: Sequence[Tensor]) -> Iterator[None]:
        """See `OpenedWeights`."""
        own = [weight.view_as(self._weight) for weight in weights]
        # GPT-2 keeps its weights as (in, out).
        own = own if isinstance(self._projection, nn.Linear) else [weight.mT for weight in own]
        bias = self._projection.bias

        def project(hidden: Tensor) -> Tensor:
            parts = hidden.split(list(rows))
            return torch.cat(
                [F.linear(part, weight.to(part.dtype), bias) for part, weight in zip(parts, own, strict=True)]
            )

        self._projection.forward = project
        try:
            with entering_at(self._layers, self._index, prepared) if prepared else nullcontext():
                yield
        finally:
            del self._projection.forward


def _block_of(model: Any, module: nn.Module) -> tuple[nn.ModuleList, int]:
    """The list of blocks that holds the module, and in which of them it is."""
    for blocks in model.modules():
        if isinstance(blocks, nn.ModuleList):
            for index, block in enumerate(blocks):
                if any(part is module for part in block.modules()):
                    return blocks, index
    raise ValueError(f"model {type(model).__name__} has no list of blocks around the weight that FT-M edits")
