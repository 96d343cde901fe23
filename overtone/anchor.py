"""What must stay: positions of a call, and the unedited model's distributions there.

Learning without forgetting (Li and Hoiem 2016, arXiv 1606.09282) on the text of the edit itself: its prompt has no
target of its own, so its target is what the model said there before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TypeAlias

import torch
from torch import Tensor

from overtone.checks import check_anchor, check_layer, check_number, working_dtype
from overtone.shard import as_dtensor
from overtone.torch_state import in_autocast_dtype, is_transformed

__all__ = ["AnchorValue", "Anchors", "read_anchors"]

BLOCK_ELEMENTS = 2**19
"""How many logits on a CPU to work through at a time, in the cache."""

DEVICE_BLOCK_ELEMENTS = 2**26
"""How many on other devices."""

ROUNDING = 0.1
"""How far from 0 rounding to half precision may leave the log of what a row's probabilities add up to."""


@dataclass(frozen=True, eq=False)
class Anchors:
    """Positions of a call that must stay, and the unedited model's distributions there: a group with a mean of its own.

    `record` makes one from logits, `record_hidden` from hidden states.

    Attributes:
        at: ``(...)``, bool, of the shape of the labels: True at A positions.
        log_probs: ``(A, V)``, of the unedited model at these positions, in their order; or ``(A, k + 1)``, of the
            tokens in ids and, last, of all others together. The KL of these k + 1 classes is a lower bound of the full
            one (log-sum inequality).
        ids: ``(A, k)``, int64, for each position k different tokens; None for the whole vocabulary.
        group_weight: of the group in the loss, 0 or above.
        vocabulary: V of the logits that they were recorded from, which has to be that of the call. None: not known;
            without ids it is the width of log_probs.

    Raises:
        ValueError, TypeError: for shapes or types that do not fit together, log_probs whose probabilities do not add up
            to 1, or a group_weight out of range.
    """

    at: Tensor
    log_probs: Tensor
    ids: Tensor | None = None
    group_weight: float = 1.0
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        """Raise a ValueError or TypeError unless the parts fit together."""
        _check_group_weight(self.group_weight)
        _check_positions(self.at)
        if not isinstance(self.log_probs, Tensor) or self.log_probs.dim() != 2:
            raise ValueError(f"log_probs must be a tensor (A, V) or (A, k + 1), got {_shape_of(self.log_probs)}")
        if not self.log_probs.is_floating_point():
            raise ValueError(f"log_probs must be floating point, got {self.log_probs.dtype}")
        if self.ids is not None:
            _check_ids(self.ids, self.log_probs)
        _check_sums(self.log_probs)
        _check_vocabulary(self.vocabulary, self.ids, self.log_probs)
        if (count := int(self.at.sum())) != len(self.log_probs):
            raise ValueError(f"log_probs must have a row for each of the {count} positions, got {len(self.log_probs)}")

    @classmethod
    @torch.no_grad()
    def record(cls, logits: Tensor, at: Tensor, *, top_k: int | None = None, group_weight: float = 1.0) -> Anchors:
        """The distributions of the unedited model at some positions.

        Args:
            logits: ``(..., V)``, of the unedited model; detached.
            at: ``(...)``, bool, the positions that must stay.
            top_k: keep the k most probable tokens of each position and count the others as one; None keeps all V.
            group_weight: as of `Anchors`.

        Returns:
            Anchors with log-probabilities in float64 for float64 logits, else in float32.

        Raises:
            ValueError, TypeError: for shapes or types that do not fit, or a top_k that is not in ``[1, V)``.
        """
        rows = _rows_at("logits", logits, at)
        if logits.shape[-1] == 0:
            raise ValueError(f"logits must have a vocabulary in their last dimension, got shape {tuple(logits.shape)}")
        _check_top_k(top_k, logits.shape[-1])
        parts = [_most_probable(rows[block], top_k) for block in row_blocks(len(rows), rows)]
        return cls._of_logits(at.to(rows.device), *_joined(parts, rows, top_k), group_weight, logits.shape[-1])

    @classmethod
    @torch.no_grad()
    def record_hidden(
        cls,
        hidden: Tensor,
        weight: Tensor,
        at: Tensor,
        *,
        bias: Tensor | None = None,
        top_k: int | None = None,
        group_weight: float = 1.0,
    ) -> Anchors:
        """`record` of the logits ``F.linear(hidden, weight, bias)``, of which only a block is there at a time.

        Args:
            hidden: ``(..., H)``, the unedited model's last hidden states.
            weight: ``(V, H)``, of its output layer.
            at: ``(...)``, bool, the positions that must stay.
            bias: ``(V,)`` or None.
            top_k: as in `record`; without it the log-probabilities ``(A, V)`` are as many as all their logits.
            group_weight: as of `Anchors`.

        Raises:
            ValueError, TypeError: as `record`.
        """
        _check_whole("hidden", hidden)
        _check_whole("weight", weight)
        if bias is not None:
            _check_whole("bias", bias)
        hidden, weight, bias = in_autocast_dtype(hidden, weight, bias)
        check_layer(hidden, weight, bias)
        if len(weight) == 0:
            raise ValueError(f"weight must have a row for each token, got shape {tuple(weight.shape)}")
        rows = _rows_at("hidden", hidden, at)
        _check_top_k(top_k, len(weight))
        blocks = row_blocks(len(rows), rows, width=len(weight))
        parts = [_most_probable(torch.nn.functional.linear(rows[block], weight, bias), top_k) for block in blocks]
        columns = _joined(parts, rows.new_empty(0, len(weight)), top_k)
        return cls._of_logits(at.to(rows.device), *columns, group_weight, len(weight))

    @classmethod
    def _of_logits(
        cls, at: Tensor, log_probs: Tensor, ids: Tensor | None, group_weight: float, vocabulary: int
    ) -> Anchors:
        """Of parts that fit together by how they were made, in every step: without a look at their values."""
        _check_group_weight(group_weight)
        anchors = object.__new__(cls)
        for one, value in zip(fields(cls), (at, log_probs, ids, group_weight, vocabulary), strict=True):
            object.__setattr__(anchors, one.name, value)
        return anchors

    def __len__(self) -> int:
        """A, the number of positions."""
        return len(self.log_probs)


AnchorValue: TypeAlias = Anchors | Sequence[Anchors] | None
"""What an argument `anchors` takes: a group of positions, several, or none."""


def read_anchors(
    anchors: AnchorValue,
    anchor: float,
    anchor_epsilon: float,
    labels: Tensor,
    vocabulary: int,
    *,
    ignore_index: int,
    reduction: str,
) -> tuple[Anchors, ...]:
    """The groups of a call, none if it has no anchors; arguments as in `overtone.overtone_loss`.

    Raises:
        ValueError, TypeError: for what does not fit together, with what to do about it.
    """
    check_anchor(anchor, anchor_epsilon)
    if anchors is None and anchor == 0:
        return ()
    if anchors is None:
        raise ValueError(
            f"anchors must be given with anchor={anchor}: pass anchors=Anchors.record(unedited_logits, at), or anchor=0"
        )
    groups = (anchors,) if isinstance(anchors, Anchors) else tuple(anchors) if isinstance(anchors, Sequence) else None
    if groups is None or not all(isinstance(group, Anchors) for group in groups):
        raise TypeError(f"anchors must be Anchors, a sequence of them or None, got {anchors!r:.200}")
    if groups and anchor == 0:
        raise ValueError("anchor must be above 0 with anchors, or they would count for nothing: pass anchor=1.0, say")
    if reduction == "none":
        raise ValueError(
            "reduction must be 'mean' or 'sum' with anchors, got 'none': the anchored term is one number; call "
            "overtone_loss without anchors for the targets' own losses"
        )
    for group in groups:
        _check_group(group, labels, vocabulary, ignore_index)
    return groups


def row_blocks(rows: int, like: Tensor, width: int | None = None) -> Iterator[slice]:
    """Slices of rows ``(rows, width)`` to work through, one after the other, on the device of like ``(rows, V)``."""
    elements = BLOCK_ELEMENTS if like.device.type == "cpu" else DEVICE_BLOCK_ELEMENTS
    size = max(1, elements // max(1, like.shape[1] if width is None else width))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def log_rest(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Log of the probability ``(B, 1)`` that log_probs ``(B, V)`` give all tokens but those in ids ``(B, k)``."""
    return log_probs.scatter(1, ids, -math.inf).logsumexp(dim=1, keepdim=True)


def _most_probable(logits: Tensor, top_k: int | None) -> tuple[Tensor, ...]:
    log_probs = logits.to(working_dtype(logits)).log_softmax(dim=1)
    if top_k is None:
        return (log_probs,)
    known, ids = log_probs.topk(top_k, dim=1)
    return torch.cat([known, log_rest(log_probs, ids)], dim=1), ids


def _joined(parts: list[tuple[Tensor, ...]], no_rows: Tensor, top_k: int | None) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities and ids of all blocks; no_rows ``(0, V)`` stands for them where there is none."""
    columns = [torch.cat(column) for column in zip(*(parts or [_most_probable(no_rows[:0], top_k)]), strict=True)]
    return columns[0], columns[1] if top_k is not None else None


def _rows_at(name: str, values: Tensor, at: Tensor) -> Tensor:
    """Rows ``(A, ...)`` of values ``(..., V or H)``, detached."""
    _check_positions(at)
    _check_whole(name, values)
    if values.dim() == 0 or values.shape[:-1] != at.shape:
        raise ValueError(
            f"at must have the shape of {name} without its last dimension: {name} is {tuple(values.shape)}, at is "
            f"{tuple(at.shape)}"
        )
    return values.detach()[at.to(values.device)]


def _check_whole(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {value.dtype}")
    if as_dtensor(value) is not None:
        raise ValueError(f"{name} must be whole for anchors, got a DTensor: pass {name}.full_tensor()")


def _check_positions(at: object) -> None:
    if not isinstance(at, Tensor):
        raise TypeError(f"at must be a torch.Tensor, got {type(at).__name__}")
    if at.dtype != torch.bool:
        raise ValueError(f"at must be bool, True at the positions that must stay, got {at.dtype}")


def _check_group_weight(group_weight: object) -> None:
    check_number("group_weight", group_weight, "a finite number, 0 or above", lambda value: value >= 0)


def _check_sums(log_probs: Tensor) -> None:
    for rows in row_blocks(len(log_probs), log_probs):
        sums = log_probs[rows].to(working_dtype(log_probs)).logsumexp(dim=1)
        is_wrong = sums.abs() > ROUNDING  # NaN, of a model that is broken, reaches the loss
        if is_wrong.any():
            raise ValueError(
                "log_probs must be log-probabilities, which add up to 1 in every row, got a row that adds up to "
                f"exp({sums[is_wrong][0]:g}): these are logits, from which Anchors.record makes log-probabilities"
            )


def _check_vocabulary(vocabulary: object, ids: Tensor | None, log_probs: Tensor) -> None:
    if vocabulary is None:
        return
    if isinstance(vocabulary, bool) or not isinstance(vocabulary, int):
        raise TypeError(f"vocabulary must be a number of tokens or None, got {vocabulary!r}")
    width = log_probs.shape[1]
    if vocabulary != width if ids is None else vocabulary < width:
        raise ValueError(
            f"vocabulary must be that of the logits, got {vocabulary} for log_probs of shape {tuple(log_probs.shape)}"
        )


def _check_ids(ids: object, log_probs: Tensor) -> None:
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids must be a torch.Tensor or None, got {type(ids).__name__}")
    expected = (len(log_probs), log_probs.shape[1] - 1)
    if ids.shape != expected or ids.dtype != torch.int64 or expected[1] < 1:
        raise ValueError(
            f"ids must be int64 (A, k), k at least 1, for log_probs (A, k + 1), so {expected}, got {_shape_of(ids)}"
        )
    if not ids.numel():
        return
    in_order = ids.sort(dim=1).values
    if (in_order[:, 0] < 0).any():
        raise ValueError(f"ids must be tokens, 0 or above, got {int(in_order.min())}")
    if (in_order[:, 1:] == in_order[:, :-1]).any():
        raise ValueError("ids must be k different tokens for each position, got one twice")


def _check_top_k(top_k: int | None, vocabulary: int) -> None:
    if top_k is None:
        return
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise TypeError(f"top_k must be a whole number or None, got {top_k!r} of type {type(top_k).__name__}")
    if not 1 <= top_k < vocabulary:
        raise ValueError(f"top_k must be from 1 to V - 1 = {vocabulary - 1}, or None for all tokens, got {top_k}")


def _check_group(group: Anchors, labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    if group.at.shape != labels.shape:
        raise ValueError(
            f"anchors must have the shape of labels {tuple(labels.shape)}, got at of shape {tuple(group.at.shape)}"
        )
    recorded = group.log_probs.shape[1] if group.ids is None else group.vocabulary
    if recorded is not None and recorded != vocabulary:
        raise ValueError(
            f"anchors must be of the vocabulary of logits, V = {vocabulary}, got anchors of {recorded} tokens"
        )
    for name, tensor in (("at", group.at), ("log_probs", group.log_probs), ("ids", group.ids)):
        if tensor is not None and tensor.device != labels.device:
            raise ValueError(
                f"anchors must be on the device of labels ({labels.device}), got {name} on {tensor.device}"
            )
    if is_transformed():  # by torch.func: its batched tensors have no values to look at
        return
    if group.ids is not None and group.ids.numel() and group.ids.max() >= vocabulary:
        raise ValueError(
            f"anchors must be of the vocabulary of logits, V = {vocabulary}, got ids up to {int(group.ids.max())}"
        )
    is_target = labels[group.at] != ignore_index
    if is_target.any():
        raise ValueError(
            f"anchors must be where labels are ignore_index={ignore_index}, but {int(is_target.sum())} of "
            f"{len(group)} positions have a label: a token cannot be a target and stay as it was; leave it out of at"
        )


def _shape_of(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
