"""The anchored term of the loss: how far anchored positions have moved, and its gradient, a block of rows at a time.

With pi_0 the unedited model's distribution at a position and s its logits now,

    KL(pi_0 || pi) = sum of pi_0 * (log pi_0 - log pi),    dKL/ds = pi - pi_0

and where of pi_0 only k tokens are known, all others are one class more, r, with dKL/ds = pi * (1 - pi_0(r) / pi(r))
for each of them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from overtone.anchor import Anchors, log_rest, row_blocks
from overtone.checks import working_dtype
from overtone.derivatives import refuse_second_derivative
from overtone.hold import is_settled
from overtone.torch_state import is_transformed

FLOAT16_SCALE = 2.0**15
"""What gradients, which are between -1 and 1, are multiplied by while they are kept in float16."""


class AnchoredTerm(NamedTuple):
    """What a call says of its anchors.

    Attributes:
        loss: ``()``, weighted.
        moved: ``()``, how many groups have a mean KL, before the clip, above anchor_epsilon.
    """

    loss: Tensor
    moved: Tensor


class AnchoredRows(NamedTuple):
    """The anchored rows of a call, group after group.

    Attributes:
        groups: of anchors.
        factors: what the sum over each group's KLs is multiplied by in the loss.
        epsilon: the clip, in nats.
    """

    groups: tuple[Anchors, ...]
    factors: tuple[float, ...]
    epsilon: float

    @property
    def numbers(self) -> Tensor:
        """``(A,)``, of the rows among all tokens."""
        return torch.cat([group.at.reshape(-1).nonzero().squeeze(1) for group in self.groups])

    @property
    def largest(self) -> float:
        """The largest factor, by which gradients are multiplied last: in half precision they would vanish else."""
        return max(self.factors) or 1.0

    def term(self, kl: Tensor) -> AnchoredTerm:
        """The term, given the KL ``(A,)`` of each row."""
        loss, moved = kl.new_zeros(()), torch.zeros((), dtype=torch.int64, device=kl.device)
        for of_group, factor in zip(kl.split([len(group) for group in self.groups]), self.factors, strict=True):
            clipped = of_group.masked_fill(is_settled(of_group, self.epsilon, None), self.epsilon)
            if factor:  # 0 times infinity would be NaN
                loss = loss + factor * clipped.sum()
            if len(of_group):
                moved = moved + ~(of_group.detach().mean() <= self.epsilon)  # NaN has moved
        return AnchoredTerm(loss, moved)


def anchored_rows(groups: tuple[Anchors, ...], anchor: float, anchor_epsilon: float, reduction: str) -> AnchoredRows:
    """The rows of checked groups; arguments as in `overtone.overtone_loss`."""
    counts = [max(1, len(group)) if reduction == "mean" else 1 for group in groups]
    factors = tuple(anchor * group.group_weight / count for group, count in zip(groups, counts, strict=True))
    return AnchoredRows(groups, factors, float(anchor_epsilon))


def anchored_term(logits: Tensor, rows: AnchoredRows) -> tuple[Tensor, AnchoredTerm | None]:
    """The anchored term of logits ``(N, V)``.

    Returns:
        The logits, for the targets' loss, and the term, None without groups. In the backward pass the term adds its
        gradient, in place, to the one that comes to these logits: there is no second one of their size.
    """
    if not rows.groups:
        return logits, None
    if is_transformed():  # by torch.func, which wants functions of one form
        return logits, rows.term(_differentiable_kl(logits.to(working_dtype(logits))[rows.numbers], rows.groups))
    is_trained = torch.is_grad_enabled() and logits.requires_grad
    logits, loss, moved = _AnchoredLogits.apply(logits, rows, is_trained)  # type: ignore[no-untyped-call]
    return logits, AnchoredTerm(loss, moved)


def fit_anchored(
    logits: Tensor, log_probs: Tensor, ids: Tensor | None, epsilon: float, factor: float
) -> tuple[Tensor, Tensor]:
    """KL ``(B,)`` of rows, and factor times its gradient ``(B, V)`` for their logits, both in working precision.

    Args:
        logits: ``(B, V)``.
        log_probs, ids: of these rows, as of `Anchors`.
        epsilon: a row whose KL is below it has a gradient of exact zeros.
        factor: of the gradient.
    """
    log_pi = logits.to(working_dtype(logits)).log_softmax(dim=1)
    log_probs = log_probs.to(log_pi.dtype)
    probs = log_probs.exp()
    if ids is None:
        kl = _kl(log_pi, log_probs, probs)
        gradient = log_pi.exp_().sub_(probs)
    else:
        rest = log_rest(log_pi, ids)
        kl = _kl(torch.cat([log_pi.gather(1, ids), rest], dim=1), log_probs, probs)
        share = torch.where(rest == -math.inf, 0, (log_pi - rest).exp_()).mul_(probs[:, -1:])
        gradient = log_pi.exp_().sub_(share.scatter_(1, ids, probs[:, :-1]))
    factors = torch.full_like(kl, factor).masked_fill_(is_settled(kl, epsilon, None), 0)
    return kl, gradient.mul_(factors.unsqueeze(1))


def _kl(log_pi: Tensor, log_probs: Tensor, probs: Tensor) -> Tensor:
    terms = (log_probs - log_pi).mul(probs).masked_fill(probs == 0, 0)
    return terms.sum(dim=1).clamp(min=0)  # rounding can leave a KL of 0 a little below it


def _differentiable_kl(scores: Tensor, groups: tuple[Anchors, ...]) -> Tensor:
    """KL ``(A,)`` of the rows of all groups, with a graph of torch's own."""
    kls = []
    for own, group in zip(scores.split([len(group) for group in groups]), groups, strict=True):
        log_pi, log_probs = own.log_softmax(dim=1), group.log_probs.to(own.dtype)
        if group.ids is not None:
            log_pi = torch.cat([log_pi.gather(1, group.ids), log_rest(log_pi, group.ids)], dim=1)
        kls.append(_kl(log_pi, log_probs, log_probs.exp()))
    return torch.cat(kls)


class _AnchoredLogits(torch.autograd.Function):
    """The logits as they are, and the anchored term of some of their rows."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: AnchoredRows, is_trained: bool) -> tuple[Tensor, Tensor, Tensor]:
        numbers = rows.numbers
        kl = logits.new_empty(len(numbers), dtype=working_dtype(logits))
        gradient = logits.new_empty(len(numbers), logits.shape[1]) if is_trained else None
        ctx.scale = FLOAT16_SCALE if logits.dtype == torch.float16 else 1.0
        start = 0
        for group, factor in zip(rows.groups, rows.factors, strict=True):
            for block in row_blocks(len(group), logits):
                here = slice(start + block.start, start + block.stop)
                ids = None if group.ids is None else group.ids[block]
                kl[here], own_gradient = fit_anchored(
                    logits[numbers[here]], group.log_probs[block], ids, rows.epsilon, factor / rows.largest * ctx.scale
                )
                if gradient is not None:
                    gradient[here] = own_gradient
            start += len(group)
        term = rows.term(kl)
        ctx.largest = rows.largest
        ctx.save_for_backward(logits, numbers, gradient)
        ctx.mark_non_differentiable(term.moved)
        ctx.set_materialize_grads(False)
        return logits.view_as(logits), term.loss, term.moved

    @staticmethod
    def backward(
        ctx: Any, grad_logits: Tensor | None, grad_loss: Tensor | None, _: None
    ) -> tuple[Tensor | None, None, None]:
        logits, numbers, gradient = ctx.saved_tensors
        if grad_loss is None or gradient is None or grad_loss.item() == 0:  # 0 times NaN would be NaN
            return grad_logits, None, None
        if grad_logits is None:
            grad_logits = torch.zeros_like(logits)
        elif torch.is_grad_enabled():
            grad_logits = grad_logits.clone()
        grad_logits = grad_logits.contiguous()  # that of a sum is one number, seen from every place
        factor = grad_loss * (ctx.largest / ctx.scale)
        for block in row_blocks(len(numbers), logits):
            weighted = gradient[block].to(factor.dtype) * factor
            # In place: what comes from the targets belongs to nobody else, and in a graph of gradients it is a copy.
            grad_logits.index_add_(0, numbers[block], weighted.to(logits.dtype))
        if torch.is_grad_enabled():  # the targets' loss may be torch's own, which has a second derivative
            grad_logits = refuse_second_derivative(grad_logits, logits)
        return grad_logits, None, None
