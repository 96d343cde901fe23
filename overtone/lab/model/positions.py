"""A causal language model's logits at chosen positions alone.

The output layer of a small model with a large vocabulary costs more than all its blocks. So it sees only the positions
that somebody asked for, whatever the model's class does around it (scaling, soft caps).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Text:
    """A text and the positions in it whose next-token logits are wanted.

    Attributes:
        ids: token ids, (T,).
        positions: ascending indices into ids, (P,); the logits there predict the tokens one place further on.
    """

    ids: Tensor
    positions: Tensor

    @classmethod
    def before(cls, ids: Tensor, tokens: Tensor) -> Text:
        """The text with the positions that predict the marked tokens.

        Args:
            ids: (T,).
            tokens: bool (T,), True at the tokens to predict; the first token of a text has nothing before it.
        """
        return cls(ids, tokens.nonzero().squeeze(1) - 1)


@dataclass
class Capture:
    """The output layer's inputs (N, D) at the positions asked for, where a caller wants them."""

    hidden: list[Tensor] = field(default_factory=list)


def logits_at(
    model: Any, texts: Sequence[Text], *, further_hidden: Tensor | None = None, capture: Capture | None = None
) -> Tensor:
    """The logits (N, V) at the positions of the texts, text after text, from one pass over all of them.

    Texts are padded on the right, which no token of a causal model sees, so no attention mask is needed.

    Args:
        model: a Hugging Face causal language model.
        texts: with N positions in all.
        further_hidden: (M, D), inputs of the output layer that an earlier pass captured; their logits follow, which
            makes (N + M, V).
        capture: where the N inputs of the output layer go.
    """
    ids = pad_sequence([text.ids for text in texts], batch_first=True)
    rows = torch.cat([torch.full_like(text.positions, row) for row, text in enumerate(texts)])
    columns = torch.cat([text.positions for text in texts])

    def choose(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = arguments[0][rows, columns]
        if capture is not None:
            capture.hidden.append(hidden.detach())
        if further_hidden is not None:
            hidden = torch.cat([hidden, further_hidden])
        return hidden[None], *arguments[1:]

    handle = model.get_output_embeddings().register_forward_pre_hook(choose)
    try:
        logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits[0]
    finally:
        handle.remove()
    return logits


class _ReachedError(Exception):
    """The layer whose input was wanted has it; what lies above need not run."""


@torch.no_grad()
def layer_inputs(model: Any, layer: Any, texts: Sequence[Text]) -> list[Tensor]:
    """The hidden states (T, D) that enter a block, for each text, from one pass that ends there."""
    ids = pad_sequence([text.ids for text in texts], batch_first=True)
    entered: list[Tensor] = []

    def keep(_: Any, arguments: tuple[Any, ...]) -> None:
        entered.append(arguments[0])
        raise _ReachedError

    handle = layer.register_forward_pre_hook(keep)
    try:
        model(input_ids=ids.to(model.device), use_cache=False)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    (hidden,) = entered
    return [hidden[row, : len(text.ids)].clone() for row, text in enumerate(texts)]


@contextmanager
def entering_at(layers: nn.ModuleList, index: int, hidden: Sequence[Tensor]) -> Iterator[None]:
    """Start the model's passes at a block, with hidden states that `layer_inputs` gave.

    Args:
        layers: the model's blocks.
        index: of the block to start at; those below do nothing as long as the context lasts.
        hidden: (T, D) for each text of the passes in the context, in their order.
    """
    padded = pad_sequence(list(hidden), batch_first=True)

    def enter(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return padded, *arguments[1:]

    handle = layers[index].register_forward_pre_hook(enter)
    skipped = list(layers[:index])
    for layer in skipped:
        layer.forward = _pass_through
    try:
        yield
    finally:
        handle.remove()
        for layer in skipped:
            del layer.forward


def _pass_through(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden
