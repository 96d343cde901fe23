"""LoRA adapters of many edits in one pass: each row of a batch goes through its own edit's adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from overtone.lab.edit.weights import open_lora
from overtone.lab.model.positions import Text


class BatchedLora:
    """`overtone.lab.edit.weights.open_lora` for many edits at once: the same places, start and scale.

    An edit's weights are the adapters' two factors, place after place, as one vector.
    """

    def __init__(
        self, model: Any, *, rank: int = 8, alpha: int = 32, target_modules: Sequence[str] | None = None
    ) -> None:
        """Find the places.

        Args:
            model: a causal language model in which `open_lora` finds places.
            rank: of the adapters.
            alpha: the adapters' output is scaled by alpha / rank.
            target_modules: which modules get an adapter; None: those of `open_lora`.

        Raises:
            ImportError: PEFT is not there.
            ValueError: the model has no place for the adapters.
        """
        self._model = model
        self._scale = alpha / rank
        self._open = partial(open_lora, model, rank=rank, alpha=alpha, target_modules=target_modules)
        with self._open() as parameters:
            self._shapes = [tuple(parameter.shape) for parameter in parameters]
            self._places = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]

    def start(self, seed: int) -> Tensor:
        """See `OpenedWeights`: the factors with which PEFT begins."""
        with self._open(seed=seed) as parameters:
            return torch.cat([parameter.detach().flatten() for parameter in parameters])

    def prepare(self, texts: Sequence[Text]) -> list[None]:
        """See `OpenedWeights`: adapters begin in the first block, so nothing can be kept."""
        return [None] * len(texts)

    @contextmanager
    def applied(self, weights: Sequence[Tensor], rows: Sequence[int], prepared: Sequence[None]) -> Iterator[None]:
        """See `OpenedWeights`."""
        stacked = torch.stack(list(weights)).split([out * into for out, into in self._shapes], dim=1)
        owner = torch.arange(len(rows)).repeat_interleave(torch.tensor(rows)).to(stacked[0].device)
        factors = [part.unflatten(1, shape)[owner] for part, shape in zip(stacked, self._shapes, strict=True)]
        with ExitStack() as hooks:
            for place, down, up in zip(self._places, factors[::2], factors[1::2], strict=True):
                hook = _adapt(place, down.mT, up.mT, self._scale)
                hooks.callback(self._model.get_submodule(place).register_forward_hook(hook).remove)
            yield


def _adapt(place: str, down: Tensor, up: Tensor, scale: float) -> Any:
    """A forward hook that adds the adapters' output: input (B, T, I), down (B, I, R), up (B, R, O)."""

    def add(_: Any, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        hidden = arguments[0]
        # Embeddings take token ids, and the output layer sees the chosen positions of all rows as one.
        if hidden.dim() != 3 or len(hidden) != len(down):
            raise ValueError(
                f"target_modules cannot have {place} where edits share a pass, in which it does not see them row by "
                "row: leave it out of --target-modules, or make the edits one by one with --at-once 1"
            )
        return output + hidden.to(down.dtype).bmm(down).bmm(up).to(output.dtype) * scale

    return add
