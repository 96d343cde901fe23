"""A held step holds everything: what the model or its wrapper adds to the tokens' loss is cut off with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_MARK = "_overtone_is_held"


@torch.compiler.disable  # type: ignore[untyped-decorator]
def is_cut_off(loss: Tensor, *sources: Tensor | None) -> bool:
    """Whether a loss that can send a gradient sends none to the tensors that it was computed from."""
    if loss.grad_fn is None:
        return False
    wanted = [torch.autograd.graph.get_gradient_edge(s).node for s in sources if s is not None and s.requires_grad]
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node in wanted:
            return False
        seen.add(node)
        waiting.extend(parent for parent, _ in node.next_functions if parent is not None and parent not in seen)
    return bool(wanted)


def cut_off(loss: Tensor) -> Tensor:
    """The same value with a graph of its own that ends at once: `backward` works and reaches no parameter."""
    return loss.detach().requires_grad_().clone()


def cut_off_output(output: Any) -> Any:
    """A model's output whose loss is cut off, marked for the wrappers that add to that loss."""
    if isinstance(output, tuple):
        return (cut_off(output[0]), *output[1:])
    output.loss = cut_off(output.loss)
    object.__setattr__(output, _MARK, True)
    return output


def cut_off_added_terms(wrapper: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """A forward hook for a wrapper: whatever it has added to a held loss is held too."""
    if getattr(output, _MARK, False):
        output.loss = cut_off(output.loss)
