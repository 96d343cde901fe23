"""A held step: its loss is cut off from the model, so that it gives no gradient at all.

Zeros are not enough. Adam and momentum go on moving every weight on zero gradients, drift away from the fit and
un-settle the tokens. A held loss is cut off from the model instead: `backward` still works on it, but every
`param.grad` stays as it was (None after `zero_grad`), so the optimiser skips its step. Cutting the graph, rather than
sending an undefined gradient into it, also holds where a function on the way would turn "undefined" into zeros:
reentrant checkpointing, compiled models, custom kernels.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

RESHARDS_BY_ITSELF: ContextVar[bool] = ContextVar("overtone_reshards_by_itself", default=False)
"""Whether who asks for a loss sees to FSDP2's weights after a held step."""

_FSDP2_NODE = "RegisterPostBackwardFunction"


def without_effect(loss: Tensor) -> Tensor:
    """The same values, whose `backward` works and changes no gradient.

    As a rule they have a graph of their own, which ends at once. On several ranks, gradients that earlier micro-batches
    have left wait for a backward pass of the last one to be exchanged (DistributedDataParallel's `no_sync`): then it
    goes through the model with zeros, which add nothing to them.
    """
    if are_several_ranks(None):
        nodes = list(_nodes_below(loss))
        if not RESHARDS_BY_ITSELF.get() and any(node.name().startswith(_FSDP2_NODE) for node in nodes):
            warnings.warn(
                "a held step has no backward pass, before which FSDP2 keeps the root's weights as they are: where it "
                "is one of several micro-batches, call model.reshard() after it, or use overtone.huggingface",
                stacklevel=4,
            )
        weights = (getattr(node, "variable", None) for node in nodes)
        if any(weight is not None and weight.grad is not None for weight in weights):
            zeroed: Tensor = _ZeroGradient.apply(loss)  # type: ignore[no-untyped-call]
            return zeroed
    return loss.detach().requires_grad_().clone()


def sends_nothing(node: torch.autograd.graph.Node) -> bool:
    """Whether it is the place in a graph where `without_effect` has put zeros."""
    return node.name() == "_ZeroGradientBackward"


class _ZeroGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.zeros_like(grad)


def are_several_ranks(group: ProcessGroup | None) -> bool:
    """Whether there is anybody to agree with."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size(group) > 1


def _nodes_below(loss: Tensor) -> Iterator[torch.autograd.graph.Node]:
    """Every node of the graph that the loss has come from."""
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [below for below, _ in node.next_functions]
            yield node
