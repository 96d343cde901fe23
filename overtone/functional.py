"""OverTone as the paper writes it: Eq. 2, Eq. 3 and Algorithm 1, one short function a step.

Read this file to learn the method; `overtone.overtone_loss` computes the same numbers without any target tensor.
Source: Liu et al., "Mitigating Heterogeneous Token Overfitting in LLM Knowledge Editing", ICML 2025.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from overtone.anchor import AnchorValue, read_anchors
from overtone.checks import (
    Reduction,
    check_hyperparameters,
    check_labels,
    check_reduction,
    check_tensors,
    flatten_tokens,
    working_dtype,
)
from overtone.hold import Hold, HoldValue, read_hold, refuse_hold_in_graph
from overtone.old_hold_names import accepts_old_names

__all__ = [
    "anchored_kl",
    "build_target",
    "clipped_kl",
    "finite_std",
    "ground_truth_check",
    "mix_target",
    "reference_loss",
    "top_n_sigma_filter",
    "unclipped_kl",
]

BLOCK_ELEMENTS = 2**22
"""Logits of as many rows as `reference_loss` works on at a time.

That bounds what a block needs while it is worked on, not what its graph keeps: two tensors of the size of all logits.
"""


def finite_std(logits: Tensor) -> Tensor:
    """Unbiased standard deviation of each row's logits, as far as they have a probability.

    Left out are banned tokens: those at ``-inf``, and those so far below the maximum that their probability relative
    to it is below the smallest normal float32, ``s < max(s) - 87.33...``, in whatever precision. Many models ban with a
    number instead (``finfo.min``, ``-1e9``, ``-1e4``), which would widen the deviation until the filter keeps all.

    Args:
        logits: ``(..., V)``, float32 or float64.

    Returns:
        ``(..., 1)``; 0 where fewer than two logits take part.
    """
    underflow = -math.log(torch.finfo(torch.float32).tiny)
    counted = logits >= logits.amax(dim=-1, keepdim=True) - underflow
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


def unclipped_kl(target: Tensor, logits: Tensor) -> Tensor:
    """``KL(target || softmax(logits))`` (Eq. 2, without its maximum).

    Args:
        target: ``(..., V)``, probabilities.
        logits: ``(..., V)``.

    Returns:
        ``(...)``, in nats.
    """
    log_probs = logits.log_softmax(dim=-1)
    return torch.where(target == 0, 0, target * (target.log() - log_probs)).sum(dim=-1)


def clipped_kl(target: Tensor, logits: Tensor, epsilon: float) -> Tensor:
    """``max(KL(target || softmax(logits)), epsilon)``: a token closer than epsilon is let go (Eq. 2).

    Args:
        target: ``(..., V)``, probabilities.
        logits: ``(..., V)``.
        epsilon: in nats. Below it the value is the constant epsilon and the gradient exactly zero; 0 clips nothing.

    Returns:
        ``(...)``, in nats.
    """
    kl = unclipped_kl(target, logits)
    return torch.where(kl < epsilon, epsilon, kl) if epsilon > 0 else kl


def algorithm_1(
    logits: Tensor,
    labels: Tensor,
    *,
    epsilon: float = 0.05,
    n_sigma: float | None = 0.5,
    lam: float = 0.1,
    check: bool = True,
    unedited_logits: Tensor | None = None,
) -> Tensor:
    """The loss of each token, line by line (Algorithm 1).

    Args:
        logits: ``(..., V)``, float32 or float64.
        labels: ``(...)``, token ids in ``[0, V)``.
        epsilon, n_sigma, lam, check: as in `overtone.overtone_loss`.
        unedited_logits: ``(..., V)``, whose filtered distribution is mixed in; None for the logits themselves.

    Returns:
        ``(...)``, in nats.
    """
    knowledge = (logits if unedited_logits is None else unedited_logits).detach()
    target = build_target(knowledge, labels, n_sigma, lam, check)
    return clipped_kl(target, logits, epsilon)


def merge_others(probabilities: Tensor, ids: Tensor) -> Tensor:
    """Probabilities ``(..., k + 1)`` of the tokens in ids ``(..., k)`` and, last, of all others together."""
    others = probabilities.scatter(-1, ids, 0).sum(dim=-1, keepdim=True)
    return torch.cat([probabilities.gather(-1, ids), others], dim=-1)


def anchored_kl(logits: Tensor, unedited_log_probs: Tensor, ids: Tensor | None, epsilon: float) -> Tensor:
    """``max(KL(pi_0 || softmax(logits)), epsilon)``: how far a position has moved that was to stay.

    Args:
        logits: ``(..., V)``, float32 or float64.
        unedited_log_probs: log pi_0, ``(..., V)``; or ``(..., k + 1)``, of the tokens in ids and all others together.
        ids: ``(..., k)``; the KL is then that of k + 1 classes.
        epsilon: as in `clipped_kl`.

    Returns:
        ``(...)``, in nats.
    """
    class_logits = logits if ids is None else merge_others(logits.softmax(dim=-1), ids).log()
    return clipped_kl(unedited_log_probs.exp(), class_logits, epsilon)


@accepts_old_names
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
    hold: HoldValue = None,
    anchors: AnchorValue = None,
    anchor: float = 0.0,
    anchor_epsilon: float = 0.05,
) -> Tensor:
    """The OverTone loss by its definition, for readers and for tests; arguments as in `overtone.overtone_loss`.

    float64 is its yardstick: in float32 a KL near 0 may round to a little below it. What it holds is decided from the
    tokens of this process alone.

    Raises:
        ValueError, TypeError: as `overtone.overtone_loss`.
    """
    holding = read_hold(hold)
    check_hyperparameters(epsilon, n_sigma, lam, check)
    check_reduction(reduction, ignore_index)
    check_tensors(logits, labels, reference_logits)
    refuse_hold_in_graph(holding)
    groups = read_anchors(
        anchors, anchor, anchor_epsilon, labels, logits.shape[-1], ignore_index=ignore_index, reduction=reduction
    )
    token_logits, token_labels = flatten_tokens(logits, labels)
    if logits.device.type == "cpu":  # elsewhere a synchronisation
        check_labels(token_labels, logits.shape[-1], ignore_index)

    counted = token_labels != ignore_index
    truth = token_labels.where(counted, 0)
    scores = token_logits.where(counted.unsqueeze(1), 0).to(working_dtype(logits))
    unedited = scores if reference_logits is None else reference_logits.reshape(token_logits.shape).to(scores.dtype)
    size = max(1, BLOCK_ELEMENTS // logits.shape[-1])
    blocks = zip(*(tensor.split(size) for tensor in (scores, truth, unedited)), strict=True)
    kl = torch.cat(
        [
            algorithm_1(s, y, epsilon=0, n_sigma=n_sigma, lam=lam, check=check, unedited_logits=source)
            for s, y, source in blocks
        ]
    )
    kl = kl.where(counted, 0)
    correct = ground_truth_check(scores.detach(), truth) if holding.correct else counted
    token_loss = torch.where(counted & correct & (kl < epsilon), epsilon, kl) if epsilon > 0 else kl
    loss = token_loss.reshape(labels.shape)
    if reduction != "none":
        loss = token_loss.sum() / (counted.sum().clamp(min=1) if reduction == "mean" else 1)
    are_kept = True
    for group in groups:
        own, unedited_log_probs = token_logits[group.at.reshape(-1)].to(kl.dtype), group.log_probs.to(kl.dtype)
        anchored = anchored_kl(own, unedited_log_probs, group.ids, anchor_epsilon).sum()
        loss = loss + anchor * group.group_weight * anchored / (max(1, len(group)) if reduction == "mean" else 1)
        distance = anchored_kl(own.detach(), unedited_log_probs, group.ids, epsilon=0)
        are_kept &= len(group) == 0 or bool(distance.mean() <= anchor_epsilon)
    if holding and loss.requires_grad and are_kept and _is_held(holding, kl[counted], epsilon, correct[counted]):
        return loss.detach().requires_grad_().clone()
    return loss


def _is_held(hold: Hold, kl: Tensor, epsilon: float, correct: Tensor) -> bool:
    """Whether all that the hold names is true of the counted tokens ``(M,)``."""
    return (
        (not hold.correct or bool(correct.all()))
        and (not hold.settled or bool((kl < epsilon).all()))
        and (hold.mean is None or len(kl) == 0 or bool(kl.mean() <= hold.mean))
    )
