"""Cross-entropy, and the losses that are cross-entropy with a weight, a temperature or a softer target."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from overtone.checks import working_dtype


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """``-log p_y``; with smoothing the target is ``(1 - smoothing) * onehot(y) + smoothing / V``.

    Args:
        logits: ``(N, V)``.
        labels: ``(N,)``.
        smoothing: in ``[0, 1]``.

    Returns:
        ``(N,)``, in nats; float64 for float64 logits, else float32.
    """
    logits = logits.to(working_dtype(logits))
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)


def dft(logits: Tensor, labels: Tensor) -> Tensor:
    """Dynamic fine-tuning: ``-sg(p_y) * log p_y``, sg: a constant for differentiation (Wu et al., arXiv 2508.05629).

    Args and result as of `cross_entropy`.
    """
    loss = cross_entropy(logits, labels)
    return (-loss.detach()).exp() * loss


def gem(logits: Tensor, labels: Tensor, beta: float) -> Tensor:
    """GEM with a linear h: ``sum_k sg(q_k) * (log p_k - log p_y)``, q = softmax(s / beta).

    (Li et al., arXiv 2408.16673.) Its gradient is ``q - onehot(y)``. The value here is that of the function which has
    this gradient, ``beta * -log softmax(s / beta)_y``: the formula's own falls below 0 as soon as y is the most
    probable token, and does not say how far a token is.

    Args:
        logits, labels: as of `cross_entropy`.
        beta: temperature, above 0; with 1 this is cross-entropy.
    """
    return beta * cross_entropy(logits.to(working_dtype(logits)) / beta, labels)


def eaft(logits: Tensor, labels: Tensor, top_k: int) -> Tensor:
    """Entropy-adaptive fine-tuning: ``-sg(H / ln K) * log p_y`` (Diao et al., arXiv 2601.02151).

    H is the entropy of the distribution over the K most probable tokens, so that a token which the model is sure of,
    though of another one, counts little.

    Args:
        logits, labels: as of `cross_entropy`.
        top_k: K, 2 or more; the paper takes 20.
    """
    k = min(top_k, logits.shape[-1])
    with torch.no_grad():
        top = logits.to(working_dtype(logits)).topk(k, dim=-1).values
        entropy = torch.special.entr(top.softmax(dim=-1)).sum(dim=-1)
    loss: Tensor = entropy / math.log(k) * cross_entropy(logits, labels)
    return loss
