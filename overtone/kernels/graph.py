"""The kernel of a graph that torch.compile traces: operators, which it keeps as whole nodes, that choose when they run.

Importing this module registers them with PyTorch, which loads a good part of its compiler: `choose` does it while a
graph is traced, and nobody else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from overtone.checks import Reduction, working_dtype
from overtone.kernels.eager import choose_eager
from overtone.kernels.kernel import Clip, Fit, Target

Result = TypeVar("Result")


def _fit(
    logits: Tensor,
    labels: Tensor,
    n_sigma: float | None,
    lam: float,
    check: bool,
    epsilon: float,
    correct_only: bool,
    reduction: str,
    ignore_index: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return choose_eager(logits).fit(
        logits,
        labels,
        Target(n_sigma, lam, check),
        Clip(epsilon, correct_only),
        reduction=reduction,  # type: ignore[arg-type]
        ignore_index=ignore_index,
        scale=scale,
    )


def _gradient(grad_kl: Tensor, logits: Tensor, labels: Tensor, coefficients: Tensor) -> Tensor:
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    choose_eager(logits).gradient(grad_kl, logits, labels, coefficients, out=out)
    return out


_fit_operator = torch.library.custom_op(
    "overtone::fit",
    _fit,
    mutates_args=(),
    schema="(Tensor logits, Tensor labels, float? n_sigma, float lam, bool check, float epsilon, bool correct_only, "
    "str reduction, int ignore_index, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
)
_gradient_operator = torch.library.custom_op(
    "overtone::gradient",
    _gradient,
    mutates_args=(),
    schema="(Tensor grad_kl, Tensor logits, Tensor labels, Tensor coefficients) -> Tensor",
)


@_fit_operator.register_fake
def _(logits, labels, n_sigma, lam, check, epsilon, correct_only, reduction, ignore_index, scale):  # type: ignore[no-untyped-def]
    rows, dtype = logits.shape[0], working_dtype(logits)
    loss = logits.new_empty((rows,) if reduction == "none" else (), dtype=dtype)
    return loss, loss.new_empty(rows), loss.new_empty(5, rows), loss.new_empty(rows)


@_gradient_operator.register_fake
def _(grad_kl, logits, labels, coefficients):  # type: ignore[no-untyped-def]
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def call_outside(function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """Call a function where torch.compile ends one graph and begins the next."""
    return function(*args, **kwargs)


class GraphKernel:
    """`overtone.kernels.kernel.Kernel` as nodes of a graph."""

    gradient_with_fit_up_to = 0

    def fit(
        self,
        logits: Tensor,
        labels: Tensor,
        target: Target,
        clip: Clip,
        *,
        reduction: Reduction,
        ignore_index: int,
        scale: float = 1.0,
        gradient: Tensor | None = None,
    ) -> Fit:
        """As `overtone.kernels.kernel.Kernel.fit`."""
        assert gradient is None, "gradient_with_fit_up_to is 0"
        return Fit(*_fit_operator(logits, labels, *target, *clip, reduction, ignore_index, scale))

    def gradient(self, grad_kl: Tensor, logits: Tensor, labels: Tensor, coefficients: Tensor, *, out: Tensor) -> None:
        """As `overtone.kernels.kernel.Kernel.gradient`."""
        out.copy_(_gradient_operator(grad_kl, logits, labels, coefficients))


GRAPH = GraphKernel()
