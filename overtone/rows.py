"""Rows of logits, worked through in blocks: the KL of each row, and its gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TypeAlias

import torch
from torch import Tensor

from overtone.checks import check_labels, working_dtype
from overtone.closed_form import (
    SettingTensors,
    become_gradient_of_others,
    gradient_of_labels,
    kl_of_rows,
    write_gradient_of_others,
)
from overtone.compiled import Fused
from overtone.functional import build_target, clipped_kl, ground_truth_check
from overtone.hold import is_settled
from overtone.native import native_for
from overtone.settings import TargetSettings

Rows: TypeAlias = slice | Tensor

_fused = Fused(kl_of_rows, write_gradient_of_others, become_gradient_of_others)


def row_kl(
    logits: Tensor, labels: Tensor, reference_logits: Tensor | None, settings: TargetSettings, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """KL(target || softmax(logits)) of each row, and what its gradient needs.

    Args:
        logits: ``(N, V)``.
        labels: ``(N,)``, int64.
        reference_logits: ``(N, V)`` or None.
        settings: of the target.
        ignore_index: label of rows that do not count; on the CPU they cost nothing.

    Returns:
        kl ``(N,)``, 0 where ignored; coefficients ``(5, N)`` for `row_gradient`, of which the last is 1 where the label
        is strictly the most probable token.

    Raises:
        ValueError: for a label out of range, on the CPU; elsewhere that would cost a synchronisation.
    """
    native = native_for(logits) if reference_logits is None else None
    if native is not None:
        fit = native.fit(logits, labels, settings, ignore_index)
        return fit.kl, fit.coefficients
    counted = labels != ignore_index
    if logits.device.type == "cpu":
        check_labels(labels, logits.shape[1], ignore_index)
    else:
        labels = labels.where(counted, 0)
    tensors = _setting_tensors(settings, logits)
    kl = logits.new_zeros(len(logits), dtype=tensors.lam.dtype)
    coefficients = kl.new_zeros(5, len(logits))
    with _without_autocast(logits):
        for rows in _blocks(logits, counted, worthwhile_share=1):
            block, block_labels = logits[rows], labels[rows]
            if reference_logits is None:
                kl[rows], coefficients[:, rows] = _fused.call(kl_of_rows, logits, block, block_labels, tensors)
            else:
                target = build_target(reference_logits[rows].to(kl.dtype), block_labels, *settings)
                kl[rows] = clipped_kl(target, block.to(kl.dtype), epsilon=0)
                coefficients[4, rows] = ground_truth_check(block, block_labels).to(kl.dtype)
    return kl.where(counted, 0), coefficients


def row_fit(
    logits: Tensor,
    labels: Tensor,
    reference_logits: Tensor | None,
    settings: TargetSettings,
    row_weights: Tensor,
    *,
    epsilon: float,
    hold_correct: bool,
    overwrite: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """KL of each row, none of which is ignored, and its gradient, on request in the place of the logits.

    Args:
        logits, labels, reference_logits, settings: as in `row_kl`.
        row_weights: ``()`` or ``(N,)``, what each row's KL is multiplied by.
        epsilon, hold_correct: as in `overtone.overtone_loss`.
        overwrite: the logits with their gradient.

    Returns:
        kl ``(N,)`` and coefficients ``(5, N)`` as of `row_kl`, and row_weights ``(N,)`` with zeros where settled.
    """
    native = native_for(logits) if reference_logits is None and row_weights.dim() == 0 else None
    if native is not None:
        fit = native.fit(
            logits,
            labels,
            settings,
            ignore_index=-1,
            epsilon=epsilon,
            hold_correct=hold_correct,
            row_weight=row_weights.item(),
            gradient=logits if overwrite else None,
        )
        return fit.kl, fit.coefficients, fit.row_weights
    kl, coefficients = row_kl(logits, labels, reference_logits, settings, ignore_index=-1)
    settled = is_settled(kl, epsilon, coefficients[4] != 0 if hold_correct else None)
    grad_kl = torch.where(settled, 0, row_weights.expand(len(kl)))
    if overwrite:
        row_gradient(grad_kl, logits, labels, reference_logits, coefficients, settings, out=logits)
    return kl, coefficients, grad_kl


def row_gradient(
    grad_kl: Tensor,
    logits: Tensor,
    labels: Tensor,
    reference_logits: Tensor | None,
    coefficients: Tensor,
    settings: TargetSettings,
    *,
    out: Tensor,
) -> None:
    """Write the gradient of the logits ``(N, V)`` into out, which may be the logits themselves.

    Rows whose grad_kl is 0, ignored or settled, get exact zeros; on the CPU they cost little more than these.
    """
    native = native_for(logits) if reference_logits is None else None
    if native is not None:
        native.write_gradient(grad_kl, logits, labels, coefficients, out=out)
        return
    needed = grad_kl != 0
    labels = labels.where(needed, 0)
    # Picking rows is a copy, which pays only where many are left out.
    blocks = list(_blocks(logits, needed, worthwhile_share=0.5))
    if not blocks or not isinstance(blocks[0], slice):
        out[~needed] = 0
    with _without_autocast(logits):
        for rows in blocks:
            # Picked rows are a copy, worked on in place.
            block, block_labels, scale = logits[rows], labels[rows], grad_kl[rows]
            block_out = out[rows] if isinstance(rows, slice) and out is not logits else block
            if reference_logits is None:
                own = coefficients[:, rows]
                _write_others(logits, block, own, scale, out=block_out)
                _set_labels(block_out, block_labels, gradient_of_labels(own, scale))
            else:
                target = build_target(reference_logits[rows].to(coefficients.dtype), block_labels, *settings)
                gradient = (block.to(target.dtype).softmax(dim=1) - target) * scale.unsqueeze(1)
                block_out.copy_(torch.where(scale.unsqueeze(1) == 0, 0, gradient))
            if not isinstance(rows, slice):
                out[rows] = block_out


def slice_gradient(grad_kl: Tensor, logits: Tensor, labels: Tensor, coefficients: Tensor) -> None:
    """Overwrite the logits ``(N, W)`` of a slice of the vocabulary with their gradient.

    Args:
        grad_kl: ``(N,)``.
        logits: ``(N, W)``.
        labels: ``(N,)``, counted from the beginning of the slice, in which they need not lie.
        coefficients: ``(5, N)``, from `row_kl` of the whole rows.
    """
    if (native := native_for(logits)) is not None:
        native.write_gradient(grad_kl, logits, labels, coefficients, out=logits)
        return
    values = gradient_of_labels(coefficients, grad_kl)
    size = _fused.rows_at_once(logits)
    with _without_autocast(logits):
        for start in range(0, len(logits), size):
            rows = slice(start, start + size)
            block = logits[rows]
            _write_others(logits, block, coefficients[:, rows], grad_kl[rows], out=block)
    # Rows whose label lies elsewhere keep what they have: picking the others would cost a synchronisation.
    tokens = labels.clamp(0, logits.shape[1] - 1)
    kept = logits.gather(1, tokens.unsqueeze(1)).squeeze(1)
    _set_labels(logits, tokens, torch.where(tokens == labels, values.to(logits.dtype), kept))


def _write_others(logits: Tensor, block: Tensor, coefficients: Tensor, grad_kl: Tensor, *, out: Tensor) -> None:
    """Write the gradient of a block of the logits, but for the labels, into out, which may be the block itself."""
    coefficients = coefficients.contiguous()  # or another stride would compile anew
    if out is block:
        _fused.call(become_gradient_of_others, logits, block, coefficients, grad_kl)
    else:
        _fused.call(write_gradient_of_others, logits, block, coefficients, grad_kl, out)


def _set_labels(rows: Tensor, labels: Tensor, values: Tensor) -> None:
    """Put a value ``(B,)`` at the label ``(B,)`` of each row ``(B, V)``."""
    # Not a scatter, which in half precision goes over all of the rows.
    rows[torch.arange(len(rows), device=rows.device), labels] = values.to(rows.dtype)


def _setting_tensors(settings: TargetSettings, logits: Tensor) -> SettingTensors:
    """On the device of the logits, filled there: a copy from the host might wait for it."""
    dtype, device = working_dtype(logits), logits.device
    return SettingTensors(*[torch.full((), value, dtype=dtype, device=device) for value in settings.numbers()])


def _without_autocast(logits: Tensor) -> AbstractContextManager[object]:
    device = logits.device.type
    is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if is_on else nullcontext()


def _blocks(logits: Tensor, needed: Tensor, *, worthwhile_share: float) -> Iterator[Rows]:
    """Blocks of the rows ``(N,)``: slices of all of them, or the numbers of the needed ones.

    Args:
        logits: ``(N, V)``.
        needed: ``(N,)``, bool.
        worthwhile_share: all are worked through if at least this share is needed; and off the CPU, where it would cost
            a synchronisation to know.
    """
    size = _fused.rows_at_once(logits)
    if logits.device.type != "cpu" or int(needed.sum()) >= worthwhile_share * len(logits):
        for start in range(0, len(logits), size):
            yield slice(start, min(start + size, len(logits)))
    else:
        yield from filter(len, needed.nonzero().squeeze(1).split(size))
