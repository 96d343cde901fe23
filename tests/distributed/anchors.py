"""Several processes that hold together wait for the anchors of each of them, also of one that alone has any."""

from __future__ import annotations

import torch
import torch.distributed as dist

from overtone import Anchors, overtone_loss

LABELS = torch.tensor([-100, -100, 3, 4])


def is_held(logits: torch.Tensor, anchors: Anchors | None) -> bool:
    leaf = logits.clone().requires_grad_()
    anchor = 0.0 if anchors is None else 1.0
    overtone_loss(leaf, LABELS, hold="settled", anchors=anchors, anchor=anchor).backward()
    return leaf.grad is None


def waited_for_together() -> None:
    """Targets that are settled on every rank, and anchors that have moved on one of them or on none."""
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    logits, change = torch.randn(4, 9, generator=generator), 2 * torch.randn(4, 9, generator=generator)
    logits[[2, 3], LABELS[2:]] += 30
    at = LABELS == -100
    for moved_on in (None, *range(size)):
        anchors = Anchors.record(logits + change if rank == moved_on else logits, at)
        assert is_held(logits, anchors) == (moved_on is None), f"rank {rank}: moved on {moved_on}"
        of_first_rank = anchors if rank == 0 else None
        assert is_held(logits, of_first_rank) == (moved_on != 0), f"rank {rank}: moved on {moved_on}, one has anchors"


CHECKS = {"waited_for_together": waited_for_together}
