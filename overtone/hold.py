"""Held steps: a batch that needs nothing more gives no gradient at all.

Zeros are not enough. Adam and momentum go on moving every weight on zero gradients, drift away from the fit and
un-settle the tokens. A held loss is cut off from the model instead: `backward` still works on it, but every
`param.grad` stays as it was (None after `zero_grad`), so the optimiser skips its step. Cutting the graph, rather than
sending an undefined gradient into it, also holds where a function on the way would turn "undefined" into zeros:
reentrant checkpointing, compiled models, custom kernels.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

Hold: TypeAlias = bool | float


def refuse_hold_when_distributed(hold_settled: Hold) -> None:
    """Raise a ValueError where wrappers such as DDP and FSDP wait for a gradient of every parameter on every rank."""
    if hold_settled is not False and torch.distributed.is_available() and torch.distributed.is_initialized():
        raise ValueError(
            f"hold_settled={hold_settled!r} cannot be used while torch.distributed is initialised: DDP and FSDP need a "
            "gradient from every parameter in every step, and a held step has none; pass hold_settled=False"
        )


def is_settled(token_kl: Tensor, epsilon: float, correct: Tensor | None) -> Tensor:
    """Whether each token ``(M,)`` is let go: its KL below epsilon and, where correct ``(M,)`` is given, correct."""
    settled = token_kl < epsilon
    return settled if correct is None else settled & correct


def release_when_held(
    token_loss: Tensor, token_kl: Tensor, epsilon: float, hold_settled: Hold, correct: Tensor | None = None
) -> Tensor:
    """The token losses, cut off from the model if the call is held.

    Args:
        token_loss: of any shape, with its graph.
        token_kl: ``(M,)``, the unclipped KL of the label tokens alone, in nats.
        epsilon: a token is settled below it.
        hold_settled: True holds when every label token is settled; a number holds when their mean KL is at or below
            it. A call without label tokens needs nothing, so it is held by either.
        correct: ``(M,)``, whether each label token is the most probable one; given, a hold waits for all of them.

    Returns:
        token_loss itself, or the same values with a graph of their own, which ends at once.
    """
    if hold_settled is False or not token_loss.requires_grad:
        return token_loss
    if token_kl.numel() == 0:
        held = True
    elif hold_settled is True:
        held = bool((token_kl < epsilon).all())
    else:
        held = bool(token_kl.mean() <= hold_settled)
    if held and correct is not None:
        held = bool(correct.all())
    return token_loss.detach().requires_grad_().clone() if held else token_loss
