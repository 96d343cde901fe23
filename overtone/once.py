"""A gradient that is worked out by hand has no derivative of its own; torch would take it to be zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def refuse_second_derivative(gradient: Tensor, *inputs: Tensor | None) -> Tensor:
    """The gradient, made a function of these inputs whose derivative is refused; for backward passes with a graph.

    Args:
        gradient: worked out in a backward pass.
        *inputs: what it depends on.
    """
    result: Tensor = _OnceDifferentiable.apply(gradient, *inputs)  # type: ignore[no-untyped-call]
    return result


class _OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> None:
        raise RuntimeError("the OverTone loss has no second derivative: its target is a constant for differentiation")
