"""The vocabulary spread over ranks: values, gradients, states and bytes, against the same logits whole."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from overtone import (
    OverToneConfig,
    VocabularyShard,
    linear_overtone_loss,
    overtone_loss,
    token_states,
)
from overtone.token_loss import parse

SETTINGS: list[dict[str, Any]] = [
    {},
    {"epsilon": 0.0},
    {"n_sigma": None},
    {"check": False, "lam": 0.5},
    {"lam": 1.0, "epsilon": 0.0},
    {"n_sigma": 2.0, "lam": 0.0},
]


def rows() -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Logits and labels with what is hard about them; some vocabularies are not divisible, some leave ranks empty."""
    generator = torch.Generator().manual_seed(0)
    for vocabulary, count in ((2, 5), (10, 7), (61, 9), (257, 33)):
        logits = 3 * torch.randn(count, vocabulary, generator=generator, dtype=torch.float64)
        labels = torch.randint(vocabulary, (count,), generator=generator)
        labels[::4] = -100
        half = vocabulary // 2
        in_half = labels.where(labels < half, 0)
        yield "plain", logits, labels
        yield "-inf on the last ranks", logits.index_fill(1, torch.arange(half, vocabulary), -torch.inf), in_half
        yield "banned by a finite number", logits.index_fill(1, torch.arange(half, vocabulary), -1e4), in_half
        yield "far from zero", logits + 1e6, labels
        yield "ties", logits.round(), labels
        yield "no spread", torch.zeros_like(logits), labels
        sure = logits.clone()
        sure[torch.arange(count), labels.clamp(min=0)] += 30
        yield "sure", sure, labels
        broken = logits.clone()
        broken[1, 0] = torch.nan
        yield "nan", broken, labels


@cache
def mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float, what: object) -> None:
    whole = got.full_tensor() if isinstance(got, DTensor) else got
    torch.testing.assert_close(
        whole, expected, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


def check_logits() -> None:
    """float64 to 1e-12, with weights on top: every kind of row in every setting; the reductions take turns."""
    reductions = ("mean", "sum", "none")
    for (row, (name, logits, labels)), (number, settings) in itertools.product(enumerate(rows()), enumerate(SETTINGS)):
        reduction = reductions[(row + number) % len(reductions)]
        whole = logits.clone().requires_grad_()
        spread = distribute_tensor(logits, mesh(), [Shard(1)]).requires_grad_()
        losses = [overtone_loss(x, labels, reduction=reduction, **settings) for x in (whole, spread)]
        weights = torch.linspace(0.5, 1.5, losses[0].numel(), dtype=torch.float64).view(losses[0].shape)
        for loss in losses:
            (loss * weights).sum().backward()
        tolerance = 1e-9 if name == "far from zero" else 1e-12
        close(losses[1], losses[0], tolerance, (name, settings, reduction))
        close(spread.grad, whole.grad, tolerance, (name, settings, reduction))


def check_plain_shard() -> None:
    """As Megatron passes it: the local part, where it begins, and the group; parts of any width, in half precision."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    logits = 3 * torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(40, (2, 5), generator=torch.Generator().manual_seed(2))
    ends = [0, *(7 * (number + 1) for number in range(ranks - 1)), 40]
    shard = VocabularyShard(ends[rank], 40, mesh().get_group())
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        whole = logits.to(dtype).clone().requires_grad_()
        local = whole.detach()[..., ends[rank] : ends[rank + 1]].clone().requires_grad_()
        expected, loss = overtone_loss(whole, labels), overtone_loss(local, labels, shard=shard)
        expected.backward()
        loss.backward()
        close(loss, expected, 1e-6, dtype)
        close(local.grad, whole.grad[..., ends[rank] : ends[rank + 1]], tolerance, dtype)


def check_layer() -> None:
    """From hidden states: the gradient of hidden is that of all ranks together."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((13, 8), (37, 8), (37,))
    )
    labels = torch.randint(37, (13,), generator=generator)
    labels[2] = -100
    for chunk_size, reduction in itertools.product((None, 3), ("mean", "none")):
        whole = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
        spread = [hidden.clone(), *(distribute_tensor(tensor, mesh(), [Shard(0)]) for tensor in (weight, bias))]
        spread = [tensor.requires_grad_() for tensor in spread]
        losses = [
            linear_overtone_loss(h, w, labels, bias=b, chunk_size=chunk_size, reduction=reduction)
            for h, w, b in (whole, spread)
        ]
        for loss in losses:
            (loss * torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.float64).view(loss.shape)).sum().backward()
        close(losses[1], losses[0], 1e-12, chunk_size)
        for got, expected in zip(spread, whole, strict=True):
            close(got.grad, expected.grad, 1e-12, (chunk_size, reduction))


def check_states_and_holds() -> None:
    for name, logits, labels in rows():
        spread = distribute_tensor(logits, mesh(), [Shard(1)])
        for config in (OverToneConfig(), OverToneConfig(hold="correct", n_sigma=2.0)):
            expected, states = token_states(logits, labels, config), token_states(spread, labels, config)
            for field in ("settled", "mixed", "kept", "correct", "counted"):
                assert torch.equal(getattr(states, field), getattr(expected, field)), (name, field)
            leaf = distribute_tensor(logits, mesh(), [Shard(1)]).requires_grad_()
            overtone_loss(leaf, labels, hold="correct").backward()
            is_held = bool(expected.correct[expected.counted].all())
            assert (leaf.grad is None) == is_held, name


def check_bytes() -> None:
    """What is sent for a token does not grow with the vocabulary, and nothing is sent in the backward pass."""
    sent: list[int] = []
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}

    def counting(name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            tensor = arguments[0] if name == "all_reduce" else arguments[1]
            sent.append(tensor.numel() * tensor.element_size())
            return originals[name](*arguments, **named)

        return call

    totals = []
    for name in originals:
        setattr(dist, name, counting(name))
    try:
        for vocabulary in (64, 6400):
            sent.clear()
            logits = distribute_tensor(torch.randn(4, vocabulary), mesh(), [Shard(1)]).requires_grad_()
            loss = overtone_loss(logits, torch.arange(4))
            in_forward = list(sent)
            loss.backward()
            assert sent == in_forward, "something was sent in the backward pass"
            totals.append(in_forward)
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    # In float32: a maximum, six sums and one more sum a token; and six numbers that say where the part lies.
    assert totals == [[4 * 4, (4 + 1) * 6 * 4, 4 * 4]] * 2, totals


def check_refusals() -> None:
    labels = torch.arange(4)
    by_rows = distribute_tensor(torch.randn(4, 8), mesh(), [Shard(0)])
    with pytest.raises(ValueError, match=r"logits is a DTensor placed as .*full_tensor\(\)"):
        overtone_loss(by_rows, labels)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    for start, size in ((0, 4), (3 * rank, 4 * ranks), (5 * rank, 5 * ranks)):  # alike, overlapping, with gaps
        with pytest.raises(ValueError, match="must follow one another from 0 to size"):
            overtone_loss(torch.randn(4, 4), labels, shard=VocabularyShard(start, size, mesh().get_group()))
    with pytest.raises(ValueError, match="beyond size=8"):
        overtone_loss(torch.randn(4, 8), labels, shard=VocabularyShard(1, 8))
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 8\)"):
        overtone_loss(distribute_tensor(torch.randn(4, 8), mesh(), [Shard(1)]), labels + 8)
    whole = torch.randn(4, 8, generator=torch.Generator().manual_seed(4))
    replicated = distribute_tensor(whole, mesh(), [Replicate()])
    close(overtone_loss(replicated, labels), overtone_loss(whole, labels), 0, "replicated")


def check_compiled() -> None:
    """torch.compile breaks its graph there, and the loss is that of all parts."""
    logits, labels = torch.randn(4, 8, generator=torch.Generator().manual_seed(5)), torch.arange(4)

    def loss_of(part: torch.Tensor, shard: VocabularyShard) -> torch.Tensor:
        return overtone_loss(part * 1, labels, shard=shard)

    width = -(-8 // dist.get_world_size())
    start = min(dist.get_rank() * width, 8)
    part, shard = logits[:, start : start + width], VocabularyShard(start, 8, mesh().get_group())
    close(torch.compile(loss_of, backend="eager")(part, shard), overtone_loss(logits, labels), 1e-6, "compiled")


def check_groups() -> None:
    """Each rank by itself: one holds, the others go on."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    logits = torch.tensor([[0.0, 9.0, 0.0]], requires_grad=True)
    label = torch.tensor([1 if dist.get_rank() == 0 else 2])
    overtone_loss(logits, label, hold="correct", hold_group=groups[dist.get_rank()]).backward()
    assert (logits.grad is None) == (dist.get_rank() == 0)
    logits.grad = None
    overtone_loss(logits, label, hold="correct").backward()
    assert logits.grad is not None, "held though another rank is not"
    # An edit is its own process', and another process makes no such call.
    if dist.get_rank() == 0:
        assert parse("overtone:hold=correct").build("lora")(logits, label)[1]


CHECKS = {
    "logits": check_logits,
    "plain_shard": check_plain_shard,
    "layer": check_layer,
    "states_and_holds": check_states_and_holds,
    "bytes": check_bytes,
    "refusals": check_refusals,
    "compiled": check_compiled,
    "groups": check_groups,
}
