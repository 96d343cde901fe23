"""OverTone as the paper writes it: Eq. 2, Eq. 3 and Algorithm 1, one short function a step.

Read this file to learn the method; `overtone.overtone_loss` computes the same numbers without any target tensor.
Source: Liu et al., "Mitigating Heterogeneous Token Overfitting in LLM Knowledge Editing", ICML 2025.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from overtone.checks import (
    Reduction,
    check_hyperparameters,
    check_labels,
    check_reduction,
    check_tensors,
    flatten_tokens,
    reduce_tokens,
    working_dtype,
)
from overtone.hold import Hold, refuse_hold_when_distributed, release_when_held

__all__ = [
    "build_target",
    "clipped_kl",
    "finite_std",
    "ground_truth_check",
    "mix_target",
    "reference_loss",
    "top_n_sigma_filter",
]


def finite_std(logits: Tensor) -> Tensor:
    """Unbiased standard deviation of each row's logits, without those at ``-inf``.

    Args:
        logits: ``(..., V)``, float32 or float64.

    Returns:
        ``(..., 1)``; 0 where fewer than two logits are above ``-inf``.
    """
    counted = logits > -math.inf
    count = counted.sum(dim=-1, keepdim=True, dtype=torch.int32)
    mean = torch.where(counted, logits, 0).sum(dim=-1, keepdim=True) / count.clamp(min=1)
    squares = torch.where(counted, logits - mean, 0).square().sum(dim=-1, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt()


def top_n_sigma_filter(logits: Tensor, n_sigma: float | None) -> Tensor:
    """Drop the noise: logits at or below ``max - n_sigma * std`` become ``-inf`` (Algorithm 1, lines 8 and 9).

    The maximum itself is always kept, so a row without spread keeps every tied maximum.

    Args:
        logits: ``(..., V)``, float32 or float64.
        n_sigma: width of the kept region in standard deviations of the row; ``None`` keeps everything.

    Returns:
        ``(..., V)``: the kept logits, ``-inf`` elsewhere. (Tang et al. 2024, arXiv 2411.07641.)
    """
    if n_sigma is None:
        return logits
    top = logits.amax(dim=-1, keepdim=True)
    noise = (logits <= top - n_sigma * finite_std(logits)) & (logits < top)
    return logits.masked_fill(noise, float("-inf"))


def mix_target(filtered: Tensor, labels: Tensor, lam: float) -> Tensor:
    """Mix the true token into the model's filtered distribution: ``lam * onehot + (1 - lam) * filtered`` (Eq. 3).

    Args:
        filtered: ``(..., V)``, probabilities.
        labels: ``(...)``, token ids in ``[0, V)``.
        lam: share of the true token, in ``[0, 1]``.

    Returns:
        ``(..., V)``: the candidate target.
    """
    return lam * one_hot(labels, filtered.shape[-1]).to(filtered.dtype) + (1 - lam) * filtered


def ground_truth_check(candidate: Tensor, labels: Tensor) -> Tensor:
    """Whether the true token is strictly the most probable one of the candidate target (the condition of Eq. 3).

    Args:
        candidate: ``(..., V)``, probabilities.
        labels: ``(...)``, token ids in ``[0, V)``.

    Returns:
        ``(...)``, bool. A tie is not a win. A NaN candidate counts as passed, so that it reaches the loss.
    """
    index = labels.unsqueeze(-1)
    others = candidate.scatter(-1, index, float("-inf"))
    return ~(candidate.gather(-1, index).squeeze(-1) <= others.amax(dim=-1))


def build_target(logits: Tensor, labels: Tensor, n_sigma: float | None, lam: float, check: bool = True) -> Tensor:
    """The adaptive target: the candidate mixture where the true token stays on top of it, else that token (Eq. 3).

    Args:
        logits: ``(..., V)``, float32 or float64: the model whose knowledge is to be kept.
        labels: ``(...)``, token ids in ``[0, V)``.
        n_sigma, lam, check: as in `overtone.overtone_loss`.

    Returns:
        ``(..., V)``, probabilities.
    """
    filtered = top_n_sigma_filter(logits, n_sigma).softmax(dim=-1)
    candidate = mix_target(filtered, labels, lam)
    if not check:
        return candidate
    truth = one_hot(labels, logits.shape[-1]).to(candidate.dtype)
    return torch.where(ground_truth_check(candidate, labels).unsqueeze(-1), candidate, truth)


def clipped_kl(target: Tensor, logits: Tensor, epsilon: float) -> Tensor:
    """``max(KL(target || softmax(logits)), epsilon)``: a token closer than epsilon is let go (Eq. 2).

    Args:
        target: ``(..., V)``, probabilities.
        logits: ``(..., V)``.
        epsilon: in nats. Below it the value is the constant epsilon and the gradient exactly zero; 0 clips nothing.

    Returns:
        ``(...)``, in nats.
    """
    log_probs = logits.log_softmax(dim=-1)
    terms = torch.where(target == 0, 0, target * (target.log() - log_probs))
    kl = terms.sum(dim=-1)
    return torch.where(kl < epsilon, epsilon, kl) if epsilon > 0 else kl


def reference_loss(
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
    hold_correct: bool = False,
) -> Tensor:
    """The OverTone loss by its definition, for readers and for tests; arguments as in `overtone.overtone_loss`.

    float64 is its yardstick: in float32 a KL near 0 may round to a little below it.
    """
    check_hyperparameters(epsilon, n_sigma, lam, check, hold_settled, hold_correct)
    check_reduction(reduction, ignore_index)
    check_tensors(logits, labels, reference_logits)
    refuse_hold_when_distributed(hold_settled)
    token_logits, token_labels, token_reference = flatten_tokens(logits, labels, reference_logits)
    check_labels(token_labels, token_logits.shape[-1], ignore_index)

    counted = token_labels != ignore_index
    s = token_logits[counted].to(working_dtype(logits))
    y = token_labels[counted]
    source = s if token_reference is None else token_reference[counted].to(s.dtype)
    with torch.no_grad():
        target = build_target(source, y, n_sigma, lam, check)
        kl = clipped_kl(target, s, epsilon=0)

    clipped, correct = clipped_kl(target, s, epsilon), None
    if hold_correct:
        correct = ground_truth_check(s.detach(), y)
        clipped = torch.where(correct, clipped, clipped_kl(target, s, epsilon=0))
    token_loss = s.new_zeros(token_labels.shape).masked_scatter(counted, clipped)
    token_loss = release_when_held(token_loss, kl, epsilon, hold_settled, correct)
    return reduce_tokens(token_loss, counted, reduction).reshape(labels.shape if reduction == "none" else ())
