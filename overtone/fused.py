"""The same loss in closed form: a few sums a row, no target tensor, one gradient buffer.

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
from typing import TypeAlias

import torch
from torch import Tensor

from overtone.contract import (
    Reduction,
    check_hyperparameters,
    check_labels,
    check_tensors,
    flatten_tokens,
    reduce_tokens,
    working_dtype,
)
from overtone.functional import build_target, clipped_kl, finite_std
from overtone.hold import Hold, refuse_hold_when_distributed, release_when_held

__all__ = ["overtone_loss"]

BLOCK_ELEMENTS = 2**19

Rows: TypeAlias = slice | Tensor


def overtone_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    epsilon: float = 0.05,
    n_sigma: float | None = 0.5,
    lam: float = 0.1,
    check: bool = True,
    reference_logits: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    hold_settled: Hold = False,
) -> Tensor:
    """The OverTone loss: ``max(KL(target || softmax(logits)), epsilon)`` a token (Eq. 2, Eq. 3, Algorithm 1).

    The target is the model's own distribution without its noise, mixed with the true token, and is used only if the
    true token stays on top of it; otherwise it is the true token alone. It is a constant for differentiation.

    Args:
        logits: ``(..., V)``, float64, float32, bfloat16 or float16; never written to. Entries at ``-inf`` have
            probability 0 and take no part. NaN logits give a NaN loss.
        labels: ``(...)``, integer token ids in ``[0, V)``, or ignore_index.
        epsilon: in nats. A token whose KL is below it is settled: its loss is the constant epsilon, its gradient
            exactly zero. 0 clips nothing (the paper's ablation "w/o clip").
        n_sigma: the filter keeps logits above ``max - n_sigma * std``; None keeps all ("w/o flt").
        lam: share of the true token in the target, in ``[0, 1]``; with 1 and ``epsilon=0`` this is cross-entropy.
        check: False always uses the mixture, on top or not ("w/o chk").
        reference_logits: ``(..., V)``, the unedited model's logits; given, the filtered distribution comes from them
            instead of from logits ("w/o dyn").
        ignore_index: label of positions that do not count: loss 0, gradient 0.
        reduction: "mean" over the counted tokens (0 if there is none), "sum", or "none" for one loss a token.
        hold_settled: beyond the paper. True: when every counted token is settled, the call gives no gradient at all,
            so that an optimiser skips its step. A number: the same when the mean KL is at or below it.

    Returns:
        A scalar, or ``(...)`` for reduction "none"; float64 for float64 logits, else float32.

    Raises:
        ValueError: for shapes that do not match, integer logits, labels out of range (on a CUDA device torch's own
            device-side assertion reports them), hyper-parameters out of range, or a hold under torch.distributed.
        TypeError: for an argument of the wrong type.
    """
    check_hyperparameters(epsilon=epsilon, n_sigma=n_sigma, lam=lam, reduction=reduction, hold_settled=hold_settled)
    check_tensors(logits, labels, reference_logits)
    refuse_hold_when_distributed(hold_settled)
    token_logits, token_labels, reference = flatten_tokens(logits, labels, reference_logits)
    counted = token_labels != ignore_index
    sigmas = None if n_sigma is None else float(n_sigma)
    kl, _ = _token_kl(token_logits, token_labels, reference, sigmas, float(lam), check, ignore_index)
    token_loss = torch.where(counted & (kl < epsilon), epsilon, kl)
    if hold_settled is not False:
        token_loss = release_when_held(token_loss, kl.detach()[counted], epsilon, hold_settled)
    return reduce_tokens(token_loss, counted, reduction).reshape(labels.shape if reduction == "none" else ())


@torch.library.custom_op(
    "overtone::token_kl",
    mutates_args=(),
    schema="(Tensor logits, Tensor labels, Tensor? reference_logits, float? n_sigma, float lam, bool check, "
    "int ignore_index) -> (Tensor, Tensor)",
)
def _token_kl(
    logits: Tensor,
    labels: Tensor,
    reference_logits: Tensor | None,
    n_sigma: float | None,
    lam: float,
    check: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """KL(target || softmax(logits)) of each row, and what its gradient needs.

    Returns:
        kl ``(N,)``, 0 where ignored; coefficients ``(4, N)``: log of the normaliser, smallest kept logit (exclusive),
        factor of a kept token's probability in the gradient, gradient of the true token's logit.
    """
    rows_total, vocabulary = logits.shape
    dtype = working_dtype(logits)
    kl = torch.zeros(rows_total, dtype=dtype, device=logits.device)
    coefficients = torch.zeros(4, rows_total, dtype=dtype, device=logits.device)
    if logits.device.type == "cpu":
        check_labels(labels, vocabulary, ignore_index)
    with torch.autocast(logits.device.type, enabled=False):
        workspace = _workspace(logits)
        for rows in _blocks(labels != ignore_index, vocabulary):
            scores = _load(logits, rows, workspace[0])
            index = labels[rows].unsqueeze(1)
            if reference_logits is None:
                kl[rows], coefficients[:, rows] = _block_kl(scores, index, n_sigma, lam, check, workspace)
            else:
                target = build_target(reference_logits[rows].to(dtype), labels[rows], n_sigma, lam, check)
                kl[rows] = clipped_kl(target, scores, epsilon=0)
    return kl, coefficients


def _block_kl(
    scores: Tensor, index: Tensor, n_sigma: float | None, lam: float, check: bool, workspace: Tensor
) -> tuple[Tensor, Tensor]:
    """`_token_kl` for rows that fit in the cache: scores ``(B, V)``, index ``(B, 1)``."""
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

    if check:
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


@torch.library.custom_op(
    "overtone::token_kl_backward",
    mutates_args=(),
    schema="(Tensor grad_kl, Tensor logits, Tensor labels, Tensor? reference_logits, Tensor coefficients, "
    "float? n_sigma, float lam, bool check, int ignore_index) -> Tensor",
)
def _token_kl_backward(
    grad_kl: Tensor,
    logits: Tensor,
    labels: Tensor,
    reference_logits: Tensor | None,
    coefficients: Tensor,
    n_sigma: float | None,
    lam: float,
    check: bool,
    ignore_index: int,
) -> Tensor:
    """Gradient of the logits ``(N, V)``; rows that are ignored or settled get exact zeros and no work."""
    needed = (labels != ignore_index) & (grad_kl != 0)
    gradient = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    with torch.autocast(logits.device.type, enabled=False):
        workspace = _workspace(logits)
        for rows in _blocks(needed, logits.shape[1]):
            scores = _load(logits, rows, workspace[0])
            index = labels[rows].unsqueeze(1)
            scale = grad_kl[rows].unsqueeze(1)
            # float32 rows in order are worked out in place; others in the workspace, then copied and rounded.
            in_place = isinstance(rows, slice) and gradient.dtype == scores.dtype
            out = gradient[rows] if in_place else workspace[1, : len(scores)]
            if reference_logits is None:
                block_coefficients = coefficients[:, rows].unsqueeze(2)
                _block_gradient(scores, index, scale, block_coefficients, n_sigma, workspace[2], out)
            else:
                target = build_target(reference_logits[rows].to(scores.dtype), labels[rows], n_sigma, lam, check)
                torch.sub(scores.softmax(dim=1), target, out=out).mul_(scale)
            if not in_place:
                gradient[rows] = out.to(gradient.dtype)
    return gradient


def _block_gradient(
    scores: Tensor,
    index: Tensor,
    scale: Tensor,
    coefficients: Tensor,
    n_sigma: float | None,
    kept_mask: Tensor,
    out: Tensor,
) -> None:
    """Write scale * dKL/ds of a block into out."""
    log_normaliser, threshold, kept_factor, label_gradient = coefficients
    torch.sub(scores, log_normaliser, out=out).exp_()
    if n_sigma is None:
        out.mul_(kept_factor * scale)
    else:
        factors = torch.gt(scores, threshold, out=kept_mask[: len(scores)])
        out.mul_(factors.mul_((kept_factor - 1) * scale).add_(scale))
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


@_token_kl.register_fake
def _(logits, labels, reference_logits, n_sigma, lam, check, ignore_index):  # type: ignore[no-untyped-def]
    rows, dtype = logits.shape[0], working_dtype(logits)
    return logits.new_empty(rows, dtype=dtype), logits.new_empty(4, rows, dtype=dtype)


@_token_kl_backward.register_fake
def _(grad_kl, logits, labels, reference_logits, coefficients, n_sigma, lam, check, ignore_index):  # type: ignore[no-untyped-def]
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    logits, labels, reference_logits, *ctx.settings = inputs
    coefficients = output[1]
    ctx.mark_non_differentiable(coefficients)
    ctx.save_for_backward(logits, labels, reference_logits, coefficients)


def _propagate(ctx, grad_kl, _):  # type: ignore[no-untyped-def]
    logits, labels, reference_logits, coefficients = ctx.saved_tensors
    gradient = _token_kl_backward(grad_kl, logits, labels, reference_logits, coefficients, *ctx.settings)
    return gradient, None, None, None, None, None, None


_token_kl.register_autograd(_propagate, setup_context=_save)
