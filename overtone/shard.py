"""Where this rank's part of a vocabulary lies that is spread over ranks, and what they exchange."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch import distributed as dist

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's tokens ``[start, start + V_local)`` of a vocabulary that the ranks of a group share.

    Attributes:
        start: the first of them.
        size: V, of the whole vocabulary.
        group: of the ranks; None for all.

    Raises:
        TypeError, ValueError: for a start or size that is no number of tokens, or a start beyond size.
    """

    start: int
    size: int
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        """Raise a TypeError or ValueError unless start and size are numbers of tokens."""
        for name, value in (("start", self.start), ("size", self.size)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be a number of tokens, got {value!r} of type {type(value).__name__}")
        if not 0 <= self.start <= self.size or self.size == 0:
            raise ValueError(f"start must be in [0, size], and size above 0, got start={self.start}, size={self.size}")

    def require_width(self, width: int) -> None:
        """Raise a ValueError unless so many tokens fit between start and the end of the vocabulary."""
        if self.start + width > self.size:
            raise ValueError(
                f"shard must lie in its vocabulary: {width} logits from start={self.start} on go beyond "
                f"size={self.size}"
            )

    def maximum(self, values: Tensor) -> None:
        """Replace the values by the greatest of all ranks, place by place."""
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)

    def total(self, values: Tensor) -> None:
        """Replace the values by their sums over the ranks."""
        dist.all_reduce(values, group=self.group)

    def require_tiles(self, parts: Tensor) -> None:
        """Raise a ValueError unless the parts ``(ranks, 2)``, their start and width, follow one another to size."""
        places = sorted((start, width) for start, width in parts.long().tolist() if width)
        ends = [0, *(start + width for start, width in places)]
        if [*(start for start, _ in places), self.size] != ends:
            found = ", ".join(f"[{start}, {start + width})" for start, width in parts.long().tolist())
            raise ValueError(f"shard: the ranks' parts must follow one another from 0 to size={self.size}, got {found}")

    def whole_rows(self, part: Tensor) -> Tensor:
        """Rows ``(B, V)`` of the whole vocabulary, from this rank's part ``(B, V_local)`` of them."""
        rows = part.new_zeros(len(part), self.size)
        rows[:, self.start : self.start + part.shape[1]] = part
        self.total(rows)
        return rows

    def gathered(self, values: Tensor) -> Tensor:
        """The values of every rank, ``(ranks, *values.shape)``."""
        parts = values.new_empty(dist.get_world_size(self.group), *values.shape)
        dist.all_gather(list(parts.unbind()), values, group=self.group)
        return parts


def check_shard(shard: object) -> None:
    """Raise a TypeError for anything but a VocabularyShard or None."""
    if shard is not None and not isinstance(shard, VocabularyShard):
        raise TypeError(
            f"shard must be a VocabularyShard or None, got {shard!r} of type {type(shard).__name__}: pass "
            "VocabularyShard(start, size)"
        )


def refuse_reference_with_shard(shard: VocabularyShard | None) -> None:
    """Raise a ValueError for a part of the logits, whose reference the literal loss would need whole."""
    if shard is not None:
        raise ValueError(
            "reference_logits must be None for logits spread over ranks: pass both whole (logits.full_tensor())"
        )


def refuse_anchors_with_shard(shard: VocabularyShard | None) -> None:
    """Raise a ValueError for a part of the logits, of which nobody knows a whole row's distribution."""
    if shard is not None:
        raise ValueError("anchors must be None for logits spread over ranks: pass the logits whole")


def as_dtensor(tensor: object) -> DTensor | None:
    """The tensor, if it is a DTensor. Their module takes long to import, and whoever has one has imported it."""
    module = sys.modules.get("torch.distributed.tensor")
    return tensor if module is not None and isinstance(tensor, module.DTensor) else None


def take_shard(
    logits: Tensor, labels: Tensor, shard: VocabularyShard | None
) -> tuple[Tensor, Tensor, VocabularyShard | None]:
    """Plain tensors of this rank, and where its part of the vocabulary lies.

    Args:
        logits: ``(..., V)``; a DTensor sharded over its last dimension, or any plain tensor.
        labels: ``(...)``, the same on all ranks; a replicated DTensor, or plain.
        shard: where plain logits ``(..., V_local)`` lie; None if they are whole, or a DTensor, which says so itself.

    Raises:
        ValueError: for a DTensor that is placed otherwise.
    """
    check_shard(shard)
    labels = _whole("labels", labels)
    spread = as_dtensor(logits)
    if spread is None:
        if shard is not None and isinstance(logits, Tensor):
            shard.require_width(logits.shape[-1] if logits.dim() else 0)
        return logits, labels, shard
    _require_no_shard("logits", shard)
    local, shard = _local_part("logits", spread, spread.dim() - 1)
    return local, labels, shard


def take_layer_shard(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, shard: VocabularyShard | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, VocabularyShard | None]:
    """As `take_shard`, of an output layer whose weight ``(V, H)`` and bias ``(V,)`` are sharded over the vocabulary."""
    check_shard(shard)
    hidden, labels = _whole("hidden", hidden), _whole("labels", labels)
    spread, spread_bias = as_dtensor(weight), as_dtensor(bias)
    if spread is None:
        if shard is not None:
            shard.require_width(len(weight))
        return hidden, weight, bias, labels, shard
    _require_no_shard("weight", shard)
    weight, shard = _local_part("weight", spread, 0)
    if spread_bias is not None:
        bias, _ = _local_part("bias", spread_bias, 0)
    return hidden, weight, bias, labels, shard


def _require_no_shard(name: str, shard: VocabularyShard | None) -> None:
    if shard is not None:
        raise ValueError(f"shard must be None where {name} is a DTensor, which says itself how it is spread")


def _whole(name: str, tensor: Tensor) -> Tensor:
    """This rank's copy of a tensor that all have alike, if it is a DTensor."""
    from_all = as_dtensor(tensor)
    if from_all is None:
        return tensor
    if not all(placement.is_replicate() for placement in from_all.placements):
        raise ValueError(f"{name} must be whole on every rank, got a DTensor placed as {from_all.placements}")
    local: Tensor = from_all.to_local()
    return local


def _local_part(name: str, tensor: DTensor, dimension: int) -> tuple[Tensor, VocabularyShard | None]:
    """This rank's part of a tensor that is sharded over one dimension, the vocabulary's, or replicated."""
    spread_over = None
    for mesh_dimension, placement in enumerate(tensor.placements):
        is_shard = placement.is_shard(dimension) or placement.is_shard(dimension - tensor.dim())
        if (is_shard and spread_over is not None) or not (is_shard or placement.is_replicate()):
            raise ValueError(
                f"{name} is a DTensor placed as {tensor.placements}: let its vocabulary be sharded over one dimension "
                f"of the mesh and the rest be replicated, or pass {name}.full_tensor()"
            )
        spread_over = mesh_dimension if is_shard else spread_over
    local: Tensor = tensor.to_local(grad_placements=tensor.placements)
    if spread_over is None:
        return local, None
    size, ranks = tensor.shape[dimension], tensor.device_mesh.size(spread_over)
    width = -(-size // ranks)
    start = min(tensor.device_mesh.get_local_rank(spread_over) * width, size)
    if local.shape[dimension] != min(width, size - start):
        raise ValueError(
            f"{name} has {local.shape[dimension]} of {size} tokens on rank {dist.get_rank()}, where torch.chunk would "
            "put another number: pass the local part as a plain tensor, with shard=VocabularyShard(start, size, group)"
        )
    return local, VocabularyShard(start, size, tensor.device_mesh.get_group(spread_over))
