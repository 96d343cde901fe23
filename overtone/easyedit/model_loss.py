"""Replacing the loss that a Hugging Face model computes from its labels (LoRA, MELO and their twins)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from overtone.easyedit.cross_entropy import never_used
from overtone.easyedit.held_steps import held_steps
from overtone.easyedit.innermost import innermost
from overtone.easyedit.patching import Patches
from overtone.easyedit.prompts import prompts_of
from overtone.token_loss import EditLoss


def takes_loss_function(model_class: type[nn.Module]) -> bool:
    """Whether models of this class compute their loss by a `loss_function` that can be set (newer transformers)."""
    seam = inspect.getattr_static(model_class, "loss_function", None)
    forward = inspect.unwrap(model_class.forward)
    return isinstance(seam, property) and seam.fset is not None and "loss_function" in forward.__code__.co_names


@contextmanager
def model_loss(model: nn.Module, loss: EditLoss) -> Iterator[None]:
    """Let the innermost model of this object compute this loss from its labels, inside the block.

    A model without a settable `loss_function` gets its labels taken away and its loss added afterwards. The loss of a
    held step is a constant 0, and what others add to it moves no weight.

    Raises:
        RuntimeError: at the end, if the model was never asked for its loss.
    """
    base = innermost(model)
    calls = 0

    def loss_function(
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        nonlocal calls
        calls += 1
        if shift_labels is None:
            assert labels is not None
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets = shift_labels.reshape(-1).to(logits.device)
        counted = targets != ignore_index
        rows, anchored = logits.reshape(-1, logits.shape[-1]), None
        if prompts is not None:
            rows, anchored = prompts.anchored(rows, counted)
        values, held = loss(rows[counted], targets[counted], anchored=anchored)
        since_last_step.append(held)
        # A leaf of zeros, cut off from the model: Adam, which moves on zero gradients, gets none.
        values = torch.zeros_like(values, requires_grad=True) if held else values
        total = values.sum()
        return total / (counted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)

    patches = Patches()
    with held_steps() as since_last_step, prompts_of(base, loss) as prompts:
        try:
            if takes_loss_function(type(base)):
                patches.attribute(base, "_loss_function", loss_function)
            else:
                patches.attribute(base, "forward", _forward_with(base.forward, loss_function))
            yield
        finally:
            patches.undo()
    if not calls:
        raise RuntimeError(never_used(loss))


def _forward_with(forward: Any, loss_function: Any) -> Any:
    def forward_with_loss(*args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if labels is None:
            return output
        if isinstance(output, tuple):
            return (loss_function(output[0], labels), *output)
        return type(output)(**{**output, "loss": loss_function(output.logits, labels)})

    return forward_with_loss
