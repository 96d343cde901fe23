"""The closed form of the loss: a few sums a row instead of a target tensor, in plain PyTorch.

With S the kept set of the top-n-sigma filter, p = softmax(s), Z = sum of p over S and q_y = p_y / Z (0 if y is not in
S), the target has t_y = lam + (1 - lam) q_y and

    KL(target || p) = (1 - lam) (1 - q_y) log((1 - lam) / Z) + t_y log(t_y / p_y)
    dKL/ds          = p * (1 - (1 - lam) / Z * [k in S]) - lam * onehot(y)

where the ground-truth check passed; elsewhere the target is onehot(y), so KL = -log p_y and dKL/ds = p - onehot(y).
Differences of nearly equal numbers (p_y - 1, 1 - (1 - lam) / Z) are rewritten as sums over the other tokens, so that
confident rows keep their digits. A compiler can turn each function into one pass over a row, in the cache.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

UNDERFLOW_DISTANCE = -math.log(torch.finfo(torch.float32).tiny)
"""Logits further below their row's maximum, about 87.3, take no part in the standard deviation."""


class TargetTensors(NamedTuple):
    """What decides the target of a token, as tensors ``()`` of the working precision: new values compile nothing anew.

    Attributes:
        n_sigma: infinite for no filter.
        lam: in ``[0, 1]``.
        check: 1 or 0.
    """

    n_sigma: Tensor
    lam: Tensor
    check: Tensor


class RowSums(NamedTuple):
    """What the loss needs to know of rows, each ``(B,)`` in working precision.

    Attributes:
        top: the highest logit.
        label: the label's logit.
        threshold: of the filter, which keeps the logits above it, and those at the top.
        below: sum of exp(logit - top) over the logits below the top.
        kept_below: the same over those of them that the filter keeps.
        on_top: how many logits are at the top; NaN where the top is infinite.
    """

    top: Tensor
    label: Tensor
    threshold: Tensor
    below: Tensor
    kept_below: Tensor
    on_top: Tensor


def fit_rows(logits: Tensor, labels: Tensor, target: TargetTensors) -> tuple[Tensor, Tensor]:
    """`fit_sums` of the rows of logits ``(B, V)`` and labels ``(B,)``, int64, each in ``[0, V)``."""
    scores = logits.to(target.lam.dtype)
    top = scores.amax(dim=1)
    label = scores.gather(1, labels.unsqueeze(1)).squeeze(1)
    threshold = filter_threshold(top, _standard_deviation(scores, top), target)
    # Weights are exp(logit - top). The top's own, which is always kept, is summed apart from the others: where it is
    # the label, the weight of all other tokens is then never got by a subtraction from 1.
    weights = (scores - top.unsqueeze(1)).exp()
    is_below = scores < top.unsqueeze(1)
    below_weights = torch.where(is_below, weights, 0)
    below = below_weights.sum(dim=1)
    kept_below = torch.where(scores > threshold.unsqueeze(1), below_weights, 0).sum(dim=1)
    # A count, since the weight of each is 1; top - top is 0, but NaN where the top is infinite.
    on_top = (~is_below).sum(dim=1, dtype=torch.int32) + (top - top)
    return fit_sums(RowSums(top, label, threshold, below, kept_below, on_top), target)


def filter_threshold(top: Tensor, standard_deviation: Tensor, target: TargetTensors) -> Tensor:
    """``top - n_sigma * std``, ``-inf`` without a filter; arguments ``(B,)``."""
    return torch.where(target.n_sigma == math.inf, -math.inf, top - target.n_sigma * standard_deviation)


def fit_sums(sums: RowSums, target: TargetTensors) -> tuple[Tensor, Tensor]:
    """KL(target || softmax(logits)) of each row, and what its gradient needs.

    Args:
        sums: of the rows.
        target: its settings.

    Returns:
        kl ``(B,)`` and coefficients ``(5, B)`` in working precision: log of the normaliser, threshold of the filter
        (logits above it are kept), factor of a kept token's probability in the gradient, gradient of the true token,
        and 1 where the true token is strictly the most probable one, else 0.
    """
    top, label, threshold, below, kept_below, on_top = sums
    _, lam, check = target
    label_on_top = label == top
    label_weight = (label - top).exp()
    label_below = torch.where(label < top, label_weight, 0)
    label_kept = (label > threshold) | label_on_top
    kept_label_weight = torch.where(label_kept, label_weight, 0)
    others_on_top = on_top - label_on_top.to(top.dtype)
    rest = others_on_top + (below - label_below)
    kept_rest = others_on_top + (kept_below - torch.where(label_kept, label_below, 0))
    total = rest + label_weight
    log_total = torch.log1p(rest + (label_weight - 1))
    label_log_prob = label - top - log_total
    kept = kept_rest + kept_label_weight
    kept_share = kept / total
    dropped_share = (below - kept_below) / total
    label_filtered = kept_label_weight / kept
    label_target = lam + (1 - lam) * label_filtered

    own_part = torch.where(label_target == 0, 0, label_target * (label_target.log() - label_log_prob))
    others_part = (1 - lam) * (kept_rest / kept) * (torch.log1p(-lam) - kept_share.log())
    mixture_kl = own_part + torch.where(lam < 1, others_part, 0)
    mixture_gradient = torch.where(
        label_kept,
        -lam * (rest / total) - (1 - lam) * label_filtered * dropped_share,
        label_weight / total - lam,
    )
    # A label that is alone on top stays there whatever is mixed in.
    is_mixed = (label_target > (1 - lam) / kept) | (others_on_top == 0) | (check == 0)
    kl = torch.where(is_mixed, mixture_kl, -label_log_prob)
    kept_factor = torch.where(is_mixed, (lam - dropped_share) / kept_share, 1)
    label_gradient = torch.where(is_mixed, mixture_gradient, -rest / total)
    is_first_choice = (label_on_top & (others_on_top == 0)).to(kl.dtype)
    # Just below the top at most, so that the gradient keeps the top too without knowing it. What is just below 0 is 0
    # where denormal numbers are flushed.
    below_top = torch.nextafter(top, torch.full_like(top, -math.inf))
    threshold = torch.minimum(threshold, torch.where(top == 0, -torch.finfo(top.dtype).tiny, below_top))
    coefficients = torch.stack([top + log_total, threshold, kept_factor, label_gradient, is_first_choice])
    return kl.clamp(min=0), coefficients


def _standard_deviation(scores: Tensor, top: Tensor) -> Tensor:
    """Of each row, unbiased, without what is too far below its top ``(B,)`` to have a probability."""
    counted = scores >= (top - UNDERFLOW_DISTANCE).unsqueeze(1)
    count = counted.sum(dim=1, dtype=torch.int32)
    mean = torch.where(counted, scores, 0).sum(dim=1) / count.clamp(min=1)
    squares = torch.where(counted, scores - mean.unsqueeze(1), 0).square().sum(dim=1)
    return (squares / (count - 1).clamp(min=1)).sqrt()


def sums_of_part(logits: Tensor, top: Tensor) -> Tensor:
    """`overtone.kernels.kernel.Kernel.sums` of a part ``(B, V_local)`` of rows with these tops ``(B,)``."""
    scores = logits.to(top.dtype)
    distance = scores - top.unsqueeze(1)
    counted = scores >= (top - UNDERFLOW_DISTANCE).unsqueeze(1)
    count = counted.sum(dim=1).to(scores.dtype)
    mean = torch.where(counted, scores, 0).sum(dim=1) / count.clamp(min=1)
    squares = torch.where(counted, scores - mean.unsqueeze(1), 0).square().sum(dim=1)
    below = torch.where(distance < 0, distance.exp(), 0).sum(dim=1)
    on_top = (distance == 0).sum(dim=1).to(scores.dtype)
    return torch.stack([count, mean, squares, below, on_top])


def kept_of_part(logits: Tensor, top: Tensor, threshold: Tensor) -> Tensor:
    """`overtone.kernels.kernel.Kernel.kept` of a part ``(B, V_local)`` of rows."""
    scores = logits.to(top.dtype)
    kept = (scores > threshold.unsqueeze(1)) & (scores < top.unsqueeze(1))
    return torch.where(kept, (scores - top.unsqueeze(1)).exp(), 0).sum(dim=1)


def gradient_of_others(logits: Tensor, coefficients: Tensor, grad_kl: Tensor) -> Tensor:
    """``grad_kl * dKL/dlogits`` ``(B, V)`` of every token but the label; exact zeros where grad_kl is 0.

    The label's own is `gradient_of_labels`, which is put in its place afterwards: to pick out one token in a pass over
    all of them would take a quarter of its time.

    Args:
        logits: as in `fit_rows`, which gave the coefficients.
        coefficients: ``(5, B)``.
        grad_kl: ``(B,)``, the gradient of each row's KL.

    Returns:
        In working precision.
    """
    scores, scale = logits.to(coefficients.dtype), grad_kl.unsqueeze(1)
    log_normaliser, threshold, kept_factor = coefficients[:3].unsqueeze(2)
    probabilities = (scores - log_normaliser).exp()
    return torch.where(scale == 0, 0, probabilities * torch.where(scores > threshold, kept_factor * scale, scale))


def gradient_of_labels(coefficients: Tensor, grad_kl: Tensor) -> Tensor:
    """``grad_kl * dKL/dlogit`` ``(B,)`` of the label; arguments as in `gradient_of_others`."""
    return torch.where(grad_kl == 0, 0, coefficients[3] * grad_kl)


def write_gradient_of_others(logits: Tensor, coefficients: Tensor, grad_kl: Tensor, out: Tensor) -> None:
    """Write `gradient_of_others` into out ``(B, V)``, which shares no memory with the logits."""
    out.copy_(gradient_of_others(logits, coefficients, grad_kl))


def become_gradient_of_others(logits: Tensor, coefficients: Tensor, grad_kl: Tensor) -> None:
    """Overwrite the logits with `gradient_of_others`; a function apart, since a compiler takes an alias badly."""
    logits.copy_(gradient_of_others(logits, coefficients, grad_kl))
