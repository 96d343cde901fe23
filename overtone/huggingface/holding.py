"""A held step holds everything: what the model or its wrapper adds to the tokens' loss is cut off with it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from overtone.cut_off import RESHARDS_BY_ITSELF, sends_nothing, without_effect
from overtone.hold import HoldValue

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
        if sends_nothing(node):
            continue
        waiting.extend(parent for parent, _ in node.next_functions if parent is not None and parent not in seen)
    return bool(wanted)


@contextmanager
def resharding(hold: HoldValue) -> Iterator[None]:
    """Where whoever asks for a loss sees to FSDP2's weights: they come through its forward, or `let_shards_go`."""
    if hold is None:  # so that torch.compile, which traces no hold, need not trace this
        yield
        return
    token = RESHARDS_BY_ITSELF.set(True)
    try:
        yield
    finally:
        RESHARDS_BY_ITSELF.reset(token)


def let_shards_go(modules: Iterable[object]) -> None:
    """Give up the whole weights that FSDP2 keeps until a backward pass, which a held step has none of.

    They would be used again, as they are, in the next forward, past an optimiser's step in between.
    """
    fsdp2 = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)  # of torch 2.6 and newer
    if fsdp2 is not None:
        for module in modules:
            if isinstance(module, fsdp2):
                module.reshard()


def cut_off_output(output: Any) -> Any:
    """A model's output whose loss is cut off, marked for the wrappers that add to that loss."""
    if isinstance(output, tuple):
        return (without_effect(output[0]), *output[1:])
    output.loss = without_effect(output.loss)
    object.__setattr__(output, _MARK, True)
    return output


def cut_off_added_terms(wrapper: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """A forward hook for a wrapper: whatever it has added to a held loss is held too."""
    if getattr(output, _MARK, False):
        output.loss = without_effect(output.loss)
