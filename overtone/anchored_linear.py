"""The anchored term from hidden states: the output layer and the term a chunk of rows at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from overtone.anchor import row_blocks
from overtone.anchored import AnchoredRows, AnchoredTerm, fit_anchored
from overtone.checks import working_dtype


def anchored_layer_term(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: AnchoredRows, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor | None, AnchoredTerm | None]:
    """The anchored term of ``hidden @ weight.T + bias``.

    Args:
        hidden: ``(N, H)``.
        weight: ``(V, H)``.
        bias: ``(V,)`` or None.
        rows: the anchored ones.
        chunk_size: rows whose logits are held at once.

    Returns:
        hidden, weight and bias, for the targets' loss, and the term, None without groups. In the backward pass it adds
        its gradients, in place, to those that come to these three.
    """
    if not rows.groups:
        return hidden, weight, bias, None
    is_trained = torch.is_grad_enabled()
    hidden, weight, bias, loss, moved = _AnchoredLayer.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, rows, chunk_size, is_trained
    )
    return hidden, weight, bias, AnchoredTerm(loss, moved)


class _AnchoredLayer(torch.autograd.Function):
    """A layer's input and parameters as they are, and the anchored term of some rows of its logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: AnchoredRows,
        chunk_size: int,
        is_trained: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        of_hidden, of_weight, of_bias = (is_trained and needed for needed in ctx.needs_input_grad[:3])
        numbers, dtype = rows.numbers, working_dtype(hidden)
        picked = hidden[numbers]
        kl = hidden.new_empty(len(numbers), dtype=dtype)
        # Sums over chunks, so never in low precision.
        hidden_gradient = torch.empty_like(picked) if of_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=dtype) if of_weight else None
        bias_gradient = torch.zeros_like(weight[:, 0], dtype=dtype) if of_bias else None
        start = 0
        for group, factor in zip(rows.groups, rows.factors, strict=True):
            for first in range(0, len(group), chunk_size):
                own = slice(first, min(first + chunk_size, len(group)))
                here = slice(start + own.start, start + own.stop)
                logits = torch.nn.functional.linear(picked[here], weight, bias)
                for block in row_blocks(len(logits), logits):
                    ids = None if group.ids is None else group.ids[own][block]
                    kl[here][block], logits[block] = fit_anchored(
                        logits[block], group.log_probs[own][block], ids, rows.epsilon, factor / rows.largest
                    )
                if hidden_gradient is not None:
                    torch.mm(logits, weight, out=hidden_gradient[here])
                if weight_gradient is not None:
                    weight_gradient += logits.t() @ picked[here]
                if bias_gradient is not None:
                    bias_gradient += logits.sum(dim=0, dtype=dtype)
            start += len(group)
        term = rows.term(kl)
        ctx.largest = rows.largest
        ctx.save_for_backward(hidden, weight, bias, numbers, hidden_gradient, weight_gradient, bias_gradient)
        ctx.mark_non_differentiable(term.moved)
        ctx.set_materialize_grads(False)
        same_bias = None if bias is None else bias.view_as(bias)
        return hidden.view_as(hidden), weight.view_as(weight), same_bias, term.loss, term.moved

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, numbers, *own = ctx.saved_tensors
        *of_targets, grad_loss, _ = grads
        if grad_loss is None or grad_loss.item() == 0:  # 0 times NaN would be NaN
            return *of_targets, None, None, None
        factor = grad_loss * ctx.largest
        totals: list[Tensor | None] = []
        for total, gradient, like in zip(of_targets, own, (hidden, weight, bias), strict=True):
            if gradient is None:
                totals.append(total)
                continue
            # What comes from the targets belongs to nobody else and refuses second derivatives, which makes it a view.
            if total is None:
                total = torch.zeros_like(like)
            elif torch.is_grad_enabled():
                total = total.clone()
            weighted = (gradient.to(factor.dtype) * factor).to(like.dtype)
            if like is hidden:
                total.index_add_(0, numbers, weighted)
            else:
                total += weighted
            totals.append(total)
        return *totals, None, None, None
