"""The ways in which the loss is worked out. `choose` is asked once a call; what it gives is used throughout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, compiler

from overtone.kernels.eager import CPU, TORCH, choose_eager
from overtone.kernels.kernel import Clip, Fit, Kernel, Target

if TYPE_CHECKING:
    from overtone.shard import VocabularyShard

__all__ = ["CPU", "TORCH", "Clip", "Fit", "Kernel", "Target", "choose"]


def choose(logits: Tensor, shard: VocabularyShard | None = None) -> Kernel:
    """The kernel for these logits ``(N, V)``; with a shard, for this rank's part of them.

    While torch.compile traces, whole nodes for its graph, which choose when they run; else what `choose_eager` says.
    """
    if compiler.is_compiling():
        from overtone.kernels.graph import GRAPH  # imported while it traces: the operators are registered then

        return GRAPH
    own = choose_eager(logits)
    if shard is None:
        return own
    from overtone.kernels.sharded import ShardedKernel  # where torch.distributed is

    return ShardedKernel(shard, own)
