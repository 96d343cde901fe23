"""Which derivatives there are: the first, in reverse mode. Torch would take the others to be zero, or not say why."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad


def refuse_forward_mode(logits: Tensor) -> None:
    """Raise a NotImplementedError, which says what to do instead, where the logits carry a tangent."""
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(logits).tangent is not None:
        raise NotImplementedError(
            "overtone_loss has no forward-mode derivative: use backward(), or overtone.functional.reference_loss"
        )


def raise_for_second_derivative() -> NoReturn:
    """For the backward pass of what is a gradient itself."""
    raise RuntimeError("the OverTone loss has no second derivative: its target is a constant for differentiation")


def refuse_second_derivative(gradient: Tensor, *inputs: Tensor | None) -> Tensor:
    """The gradient, made a function of these inputs whose derivative is refused; for backward passes with a graph.

    Args:
        gradient: worked out in a backward pass.
        *inputs: what it depends on.
    """
    result: Tensor = _Once.apply(gradient, *inputs)  # type: ignore[no-untyped-call]
    return result


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> None:
        raise_for_second_derivative()
