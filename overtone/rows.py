"""The closed form of the loss, row by row: a few sums a row, no target tensor, one gradient buffer.

With S the kept set of the top-n-sigma filter, p = softmax(s), Z = sum of p over S and q_y = p_y / Z (0 if y is not in
S), the target has t_y = lam + (1 - lam) q_y and

    KL(target || p) = (1 - lam) (1 - q_y) log((1 - lam) / Z) + t_y log(t_y / p_y)
    dKL/ds          = p * (1 - (1 - lam) / Z * [k in S]) - lam * onehot(y)

where the ground-truth check passed; elsewhere the target is onehot(y), so KL = -log p_y and dKL/ds = p - onehot(y).
Rows are worked through in blocks that stay in the processor's cache. Differences of nearly equal numbers (p_y - 1,
1 - (1 - lam) / Z) are rewritten as sums over the other tokens, so that confident rows keep their digits.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from overtone.contract import check_labels, working_dtype
from overtone.functional import build_target, clipped_kl, finite_std

BLOCK_ELEMENTS = 2**19

Rows: TypeAlias = slice | Tensor


@dataclass(frozen=True)
class TargetSettings:
    """What decides the target of a token; as in `overtone.overtone_loss`."""

    n_sigma: float | None
    lam: float
    check: bool


def row_kl(
    logits: Tensor, labels: Tensor, reference_logits: Tensor | None, settings: TargetSettings, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """KL(target || softmax(logits)) of each row, and what its gradient needs.

    Args:
        logits: ``(N, V)``.
        labels: ``(N,)``, int64.
        reference_logits: ``(N, V)`` or None.
        settings: of the target.
        ignore_index: label of rows that do not count.

    Returns:
        kl ``(N,)``, 0 where ignored; coefficients ``(4, N)``: log of the normaliser, smallest kept logit (exclusive),
        factor of a kept token's probability in the gradient, gradient of the true token's logit.

    Raises:
        ValueError: for a label out of range, on the CPU; elsewhere that would cost a synchronisation.
    """
    dtype = working_dtype(logits)
    counted = labels != ignore_index
    if logits.device.type == "cpu":
        check_labels(labels, logits.shape[1], ignore_index)
    with torch.autocast(logits.device.type, enabled=False):
        workspace = _workspace(logits)
        if reference_logits is not None:
            kl = torch.zeros(len(logits), dtype=dtype, device=logits.device)
            for rows in _blocks(counted, logits.shape[1]):
                target = _block_target(reference_logits, labels, rows, settings, dtype)
                kl[rows] = clipped_kl(target, _load(logits, rows, workspace[0]), epsilon=0)
            return kl, kl.new_zeros(4, len(logits))
        sums = torch.ones(6, len(logits), dtype=dtype, device=logits.device)
        for rows in _blocks(counted, logits.shape[1]):
            scores = _load(logits, rows, workspace[0])
            sums[:, rows] = _block_sums(scores, labels[rows].unsqueeze(1), settings, workspace)
    kl, coefficients = _closed_form(RowSums(*sums), settings)
    return kl.masked_fill_(~counted, 0), coefficients


def row_gradient(
    grad_kl: Tensor,
    logits: Tensor,
    labels: Tensor,
    reference_logits: Tensor | None,
    coefficients: Tensor,
    settings: TargetSettings,
    ignore_index: int,
    *,
    out: Tensor,
) -> None:
    """Write the gradient of the logits ``(N, V)`` into out, which may be the logits themselves.

    Rows that are ignored or settled (grad_kl 0) get exact zeros and no work.
    """
    needed = (labels != ignore_index) & (grad_kl != 0)
    with torch.autocast(logits.device.type, enabled=False):
        workspace = _workspace(logits)
        for rows in _blocks(needed, logits.shape[1]):
            scores, index = _load(logits, rows, workspace[0]), labels[rows].unsqueeze(1)
            scale = grad_kl[rows].unsqueeze(1)
            # Rows in order and in working precision are worked out in place; others in the workspace, then copied.
            in_place = isinstance(rows, slice) and out.dtype == scores.dtype
            block = out[rows] if in_place else workspace[1, : len(scores)]
            if reference_logits is None:
                mask = workspace[2, : len(scores)]
                _block_gradient(scores, index, scale, coefficients[:, rows].unsqueeze(2), settings, mask, block)
            else:
                target = _block_target(reference_logits, labels, rows, settings, scores.dtype)
                torch.sub(scores.softmax(dim=1), target, out=block).mul_(scale)
            if not in_place:
                out[rows] = block.to(out.dtype)
    if not needed.all():
        out[~needed] = 0


def _block_target(
    reference_logits: Tensor, labels: Tensor, rows: Rows, settings: TargetSettings, dtype: torch.dtype
) -> Tensor:
    reference = reference_logits[rows].to(dtype)
    return build_target(reference, labels[rows], settings.n_sigma, settings.lam, settings.check)


class RowSums(NamedTuple):
    """What the closed form needs of each row, ``(N,)`` each; weights are exp(logit - top).

    Attributes:
        top: the largest logit.
        threshold: logits above it are kept; always below top.
        label: the true token's logit.
        rest: sum of the other tokens' weights.
        kept_rest: the same over those of them that are kept.
        runner_up: largest weight among the other tokens, where lam alone does not settle a tie; else 0.
    """

    top: Tensor
    threshold: Tensor
    label: Tensor
    rest: Tensor
    kept_rest: Tensor
    runner_up: Tensor


def _block_sums(scores: Tensor, index: Tensor, settings: TargetSettings, workspace: Tensor) -> Tensor:
    """The `RowSums` ``(6, B)`` of rows that fit in the cache: scores ``(B, V)``, index ``(B, 1)``."""
    work, mask = workspace[1, : len(scores)], workspace[2, : len(scores)]
    top = scores.amax(dim=1, keepdim=True)
    label = scores.gather(1, index)
    if settings.n_sigma is None:
        threshold = torch.full_like(top, float("-inf"))
    else:
        below_top = torch.nextafter(top, torch.full_like(top, float("-inf")))
        threshold = torch.minimum(top - settings.n_sigma * _row_std(scores, work), below_top)
    others = torch.sub(scores, top, out=work).exp_().scatter_(1, index, 0)
    rest = others.sum(dim=1, keepdim=True)
    if settings.n_sigma is None:
        kept_rest = rest
    else:
        kept_rest = torch.linalg.vecdot(others, torch.gt(scores, threshold, out=mask)).unsqueeze(1)
    tie_matters = settings.lam < torch.finfo(scores.dtype).eps
    runner_up = others.amax(dim=1, keepdim=True) if tie_matters else torch.zeros_like(top)
    return torch.cat([top, threshold, label, rest, kept_rest, runner_up], dim=1).t()


def _closed_form(row: RowSums, settings: TargetSettings) -> tuple[Tensor, Tensor]:
    """KL ``(N,)`` and the coefficients ``(4, N)`` of `row_kl`."""
    lam = settings.lam
    label_weight = (row.label - row.top).exp()
    total = row.rest + label_weight
    log_total = torch.log1p(row.rest + (label_weight - 1))
    label_log_prob = row.label - row.top - log_total
    label_kept = row.label > row.threshold
    kept_label_weight = torch.where(label_kept, label_weight, 0)
    kept = row.kept_rest + kept_label_weight
    kept_share = kept / total
    dropped_share = ((row.rest - row.kept_rest) + (label_weight - kept_label_weight)) / total
    label_filtered = kept_label_weight / kept
    label_target = lam + (1 - lam) * label_filtered

    own_part = torch.where(label_target == 0, 0, label_target * (label_target.log() - label_log_prob))
    kl = own_part if lam == 1 else own_part + (1 - lam) * (row.kept_rest / kept) * (math.log1p(-lam) - kept_share.log())
    kept_factor = (lam - dropped_share) / kept_share
    label_gradient = torch.where(
        label_kept,
        -lam * (row.rest / total) - (1 - lam) * label_filtered * dropped_share,
        label_weight / total - lam,
    )
    if settings.check:
        # The rival of a label on top is the runner-up, which has lost unless lam is lost in rounding.
        rival = torch.where(row.label < row.top, 1, row.runner_up) / kept
        passed = label_target > (1 - lam) * rival
        kl = torch.where(passed, kl, -label_log_prob)
        kept_factor = torch.where(passed, kept_factor, 1)
        label_gradient = torch.where(passed, label_gradient, -row.rest / total)
    return kl.clamp(min=0), torch.stack([row.top + log_total, row.threshold, kept_factor, label_gradient])


def _row_std(scores: Tensor, work: Tensor) -> Tensor:
    """`finite_std`, in two quick passes where every logit is finite (a row with a -inf has no finite mean)."""
    mean = scores.mean(dim=1, keepdim=True)
    if scores.shape[1] == 1 or scores.device.type != "cpu" or not mean.isfinite().all():
        return finite_std(scores)
    deviations = torch.sub(scores, mean, out=work)
    norm: Tensor = torch.linalg.vector_norm(deviations, dim=1, keepdim=True)
    return norm / math.sqrt(scores.shape[1] - 1)


def _block_gradient(
    scores: Tensor,
    index: Tensor,
    scale: Tensor,
    coefficients: Tensor,
    settings: TargetSettings,
    mask: Tensor,
    out: Tensor,
) -> None:
    """Write scale * dKL/ds of a block into out, which may be the scores themselves."""
    log_normaliser, threshold, kept_factor, label_gradient = coefficients
    if settings.n_sigma is None:
        factors = kept_factor * scale
    else:
        factors = torch.gt(scores, threshold, out=mask).mul_((kept_factor - 1) * scale).add_(scale)
    torch.sub(scores, log_normaliser, out=out).exp_().mul_(factors)
    out.scatter_(1, index, label_gradient * scale)


def _blocks(needed: Tensor, vocabulary: int) -> Iterator[Rows]:
    """The needed rows ``(N,)`` in cache-sized blocks: slices where every row is needed, else row numbers."""
    size = max(1, BLOCK_ELEMENTS // vocabulary)
    if needed.all():
        for start in range(0, len(needed), size):
            yield slice(start, min(start + size, len(needed)))
    else:
        yield from torch.split(needed.nonzero().squeeze(1), size)


class _Scratch(threading.local):
    """Each thread's working memory, kept: to fault it in for every call costs more than a small call's arithmetic."""

    def __init__(self) -> None:
        self.flat: dict[torch.dtype, Tensor] = {}


_scratch = _Scratch()


def _workspace(logits: Tensor) -> Tensor:
    """Three blocks of scratch in working precision, never in use by two calls at once."""
    size = min(max(1, BLOCK_ELEMENTS // logits.shape[1]), max(1, len(logits)))
    shape, dtype = (3, size, logits.shape[1]), working_dtype(logits)
    if logits.device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=logits.device)
    flat = _scratch.flat.get(dtype)
    if flat is None or len(flat) < math.prod(shape):
        with torch.inference_mode(False):
            flat = _scratch.flat[dtype] = torch.empty(math.prod(shape), dtype=dtype)
    return flat[: math.prod(shape)].view(shape)


def _load(logits: Tensor, rows: Rows, buffer: Tensor) -> Tensor:
    """Rows of the logits in working precision: a view where nothing has to change, else a copy in the buffer."""
    block = logits[rows]
    if isinstance(rows, slice) and block.dtype == buffer.dtype:
        return block
    return buffer[: len(block)].copy_(block)
