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
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

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
    kl = torch.zeros(len(logits), dtype=dtype, device=logits.device)
    coefficients = torch.zeros(4, len(logits), dtype=dtype, device=logits.device)
    if logits.device.type == "cpu":
        check_labels(labels, logits.shape[1], ignore_index)
    with torch.autocast(logits.device.type, enabled=False):
        workspace = _workspace(logits)
        for rows in _blocks(labels != ignore_index, logits.shape[1]):
            scores, index = _load(logits, rows, workspace[0]), labels[rows].unsqueeze(1)
            if reference_logits is None:
                kl[rows], coefficients[:, rows] = _block_kl(scores, index, settings, workspace)
            else:
                kl[rows] = clipped_kl(_block_target(reference_logits, labels, rows, settings, dtype), scores, epsilon=0)
    return kl, coefficients


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


def _block_kl(scores: Tensor, index: Tensor, settings: TargetSettings, workspace: Tensor) -> tuple[Tensor, Tensor]:
    """`row_kl` for rows that fit in the cache: scores ``(B, V)``, index ``(B, 1)``."""
    lam, n_sigma = settings.lam, settings.n_sigma
    work, kept_mask = workspace[1, : len(scores)], workspace[2, : len(scores)]
    top = scores.amax(dim=1, keepdim=True)
    label_score = scores.gather(1, index)
    if n_sigma is None:
        threshold = torch.full_like(top, float("-inf"))
    else:
        below_top = torch.nextafter(top, torch.full_like(top, float("-inf")))
        threshold = torch.minimum(top - n_sigma * _row_std(scores, work), below_top)

    weights = torch.sub(scores, top, out=work).exp_()
    label_weight = weights.gather(1, index)
    others = weights.scatter_(1, index, 0)
    rest = others.sum(dim=1, keepdim=True)
    if n_sigma is None:
        kept_rest = rest
    else:
        torch.gt(scores, threshold, out=kept_mask)
        kept_rest = torch.linalg.vecdot(others, kept_mask).unsqueeze(1)

    total = rest + label_weight
    log_total = torch.log1p(rest + (label_weight - 1))
    label_log_prob = label_score - top - log_total
    label_kept = label_score > threshold
    kept = kept_rest + torch.where(label_kept, label_weight, 0)
    dropped_share = ((rest - kept_rest) + torch.where(label_kept, 0, label_weight)) / total
    kept_share = kept / total
    label_filtered = torch.where(label_kept, label_weight, 0) / kept
    label_target = lam + (1 - lam) * label_filtered

    if settings.check:
        # The rival of a label on top is the runner-up; lam alone decides against it unless lam is lost in rounding.
        runner_up = others.amax(dim=1, keepdim=True) if lam < torch.finfo(scores.dtype).eps else torch.zeros_like(top)
        rival = torch.where(label_score < top, 1, runner_up) / kept
        passed = label_target > (1 - lam) * rival
    else:
        passed = torch.ones_like(label_kept)

    own_part = torch.where(label_target > 0, label_target * (label_target.log() - label_log_prob), 0)
    if lam < 1:
        kept_part = (1 - lam) * (kept_rest / kept) * (math.log1p(-lam) - kept_share.log())
    else:
        kept_part = torch.zeros_like(own_part)
    kl = torch.where(passed, own_part + kept_part, -label_log_prob).clamp(min=0)

    kept_factor = torch.where(passed, (lam - dropped_share) / kept_share, 1)
    mixed_gradient = torch.where(
        label_kept,
        -lam * (rest / total) - (1 - lam) * label_filtered * dropped_share,
        label_weight / total - lam,
    )
    label_gradient = torch.where(passed, mixed_gradient, -rest / total)
    return kl.squeeze(1), torch.stack([top + log_total, threshold, kept_factor, label_gradient]).squeeze(2)


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


def _workspace(logits: Tensor) -> Tensor:
    """Three blocks of scratch in working precision."""
    size = min(max(1, BLOCK_ELEMENTS // logits.shape[1]), max(1, len(logits)))
    return torch.empty(3, size, logits.shape[1], dtype=working_dtype(logits), device=logits.device)


def _load(logits: Tensor, rows: Rows, buffer: Tensor) -> Tensor:
    """Rows of the logits in working precision: a view where nothing has to change, else a copy in the buffer."""
    block = logits[rows]
    if isinstance(rows, slice) and block.dtype == buffer.dtype:
        return block
    return buffer[: len(block)].copy_(block)
