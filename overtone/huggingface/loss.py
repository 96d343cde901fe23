"""The loss of a causal language model's logits, normalised as transformers normalises its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import index
from typing import TYPE_CHECKING, Literal, SupportsIndex, TypeAlias, get_args

import torch
from torch import Tensor, nn

from overtone.anchor import AnchorValue
from overtone.checks import check_number, check_tensors
from overtone.config import OverToneConfig, checked_config
from overtone.linear import linear_overtone_loss
from overtone.loss import overtone_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Observer: TypeAlias = Callable[[Tensor, Tensor], None]
"""Sees the logits ``(..., V)`` and the next tokens ``(...)`` of every training step; returns nothing."""

EvalLoss: TypeAlias = Literal["cross_entropy", "overtone"]
"""What the loss is while gradients are disabled."""

CROSS_ENTROPY = OverToneConfig(epsilon=0.0, n_sigma=None, lam=1.0)
"""The settings with which the loss is cross-entropy."""


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    config: OverToneConfig | None = None,
    *,
    num_items_in_batch: int | Tensor | None = None,
    shift_labels: Tensor | None = None,
    loss_mask: Tensor | None = None,
    ignore_index: int = -100,
    observer: Observer | None = None,
    hold_group: ProcessGroup | None = None,
    anchors: AnchorValue = None,
) -> Tensor:
    """The OverTone loss of next-token prediction, as transformers' `ForCausalLMLoss` computes cross-entropy.

    Args:
        logits: ``(batch, sequence, V)``; never copied, cut or written to. A DTensor may be sharded over V.
        labels: ``(batch, sequence)``, aligned with the input: position t is predicted from the logits at t - 1.
        config: the settings of the loss; None for the defaults.
        num_items_in_batch: divides the sum over the tokens; the label tokens of the whole accumulated batch, on all
            devices. None divides by the label tokens of this call (by their weights, with a loss_mask).
        shift_labels: ``(batch, sequence)``, aligned with the logits, in place of labels.
        loss_mask: ``(batch, sequence)``, a weight of 0 or above for each token, aligned with the labels (with
            shift_labels, if those are given). A token of weight 0 counts as ignored.
        ignore_index: label of positions that do not count.
        observer: called with logits and next tokens whenever gradients are enabled.
        hold_group: the ranks that hold together, as in `overtone.overtone_loss`.
        anchors: what must stay, at positions ``(batch, sequence)`` of the logits, where config has an anchor. With
            num_items_in_batch the anchored term, a mean over this call's positions, counts with this call's share of
            those label tokens: over all micro-batches of a step the shares make 1. A loss_mask is then refused.

    Returns:
        A scalar (of the shape of num_items_in_batch if that is a tensor with dimensions); 0 with its graph if no
        token counts.

    Raises:
        ValueError, TypeError: as `overtone.overtone_loss`, for a loss_mask of another shape, with negative or
            non-finite weights, and for a num_items_in_batch that is a negative or non-finite Python number, or none.
    """
    config = checked_config(config)
    _check_num_items(num_items_in_batch)
    next_tokens, weights = _next_tokens(logits, labels, shift_labels, loss_mask, ignore_index)
    if observer is not None and torch.is_grad_enabled():
        observer(logits.detach(), next_tokens)
    arguments = {**config.as_kwargs(), "ignore_index": ignore_index, "hold_group": hold_group, "anchors": anchors}
    loss = partial(overtone_loss, logits, next_tokens, **arguments)
    return _normalised(loss, next_tokens, weights, num_items_in_batch, ignore_index, is_anchored=config.anchor > 0)


def causal_lm_loss_of_hidden(
    hidden: Tensor,
    head: nn.Linear,
    labels: Tensor | None,
    config: OverToneConfig,
    *,
    num_items_in_batch: int | Tensor | None = None,
    shift_labels: Tensor | None = None,
    loss_mask: Tensor | None = None,
    ignore_index: int = -100,
    hold_group: ProcessGroup | None = None,
    anchors: AnchorValue = None,
) -> Tensor:
    """`causal_lm_loss` of ``head(hidden)`` without ever holding all the logits.

    Args:
        hidden: ``(batch, sequence, H)``, what the output layer would be given.
        head: the output layer, of H inputs and V outputs.
        labels, config, num_items_in_batch, shift_labels, loss_mask, ignore_index, hold_group, anchors: as in
            `causal_lm_loss`.

    Returns:
        As `causal_lm_loss`.

    Raises:
        ValueError, TypeError: as `causal_lm_loss`, and `overtone.linear_overtone_loss` for the layer.
    """
    _check_num_items(num_items_in_batch)
    shape_of_logits = hidden.new_empty(()).expand(*hidden.shape[:-1], head.out_features)
    next_tokens, weights = _next_tokens(shape_of_logits, labels, shift_labels, loss_mask, ignore_index)
    loss = partial(
        linear_overtone_loss,
        hidden,
        head.weight,
        next_tokens,
        bias=head.bias,
        **config.as_kwargs(),
        ignore_index=ignore_index,
        hold_group=hold_group,
        anchors=anchors,
    )
    return _normalised(loss, next_tokens, weights, num_items_in_batch, ignore_index, is_anchored=config.anchor > 0)


def check_observer(observer: object) -> None:
    """Raise a TypeError for what cannot be called, but None."""
    if observer is not None and not callable(observer):
        raise TypeError(
            f"observer must be a function of logits and labels or None, got {observer!r} of type "
            f"{type(observer).__name__}; pass TokenStatesCallback(config).observe, say"
        )


def check_eval_loss(eval_loss: str) -> None:
    """Raise a ValueError for anything but the two names."""
    if eval_loss not in get_args(EvalLoss):
        raise ValueError(f"eval_loss must be one of {get_args(EvalLoss)}, got {eval_loss!r}")


def _next_tokens(
    logits: Tensor, labels: Tensor | None, shift_labels: Tensor | None, loss_mask: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor | None]:
    """The token that each position predicts ``(batch, sequence)``, and its weight where there is a mask."""
    tokens = labels if shift_labels is None else shift_labels
    if tokens is None:
        raise ValueError("labels must be given: the loss needs the true tokens, got None (does the batch have labels?)")
    if isinstance(tokens, Tensor):
        tokens = tokens.to(logits.device)
    check_tensors(logits, tokens)
    if shift_labels is None and tokens.dim() == 0:
        raise ValueError("labels must be (batch, sequence), got a single one; call overtone.overtone_loss for it")
    # Before anything is filled in: ignore_index need not fit into the integers that the labels come in.
    tokens = tokens.long()
    next_tokens = _shifted(tokens, ignore_index) if shift_labels is None else tokens
    if loss_mask is None:
        return next_tokens, None
    _check_mask(loss_mask, next_tokens)
    weights = (_shifted(loss_mask, 0) if shift_labels is None else loss_mask).to(logits.device)
    return next_tokens.masked_fill(weights == 0, ignore_index), weights


def _normalised(
    loss: Callable[..., Tensor],
    next_tokens: Tensor,
    weights: Tensor | None,
    num_items_in_batch: int | Tensor | None,
    ignore_index: int,
    *,
    is_anchored: bool,
) -> Tensor:
    """The weighted sum of a loss that takes a reduction, divided as transformers divides."""
    if is_anchored:
        if weights is not None:
            raise ValueError("loss_mask must be None with an anchor: give tokens that are no targets the label -100")
        if num_items_in_batch is None:
            return loss()
        total = loss() * (next_tokens != ignore_index).sum()
    elif weights is None:
        if num_items_in_batch is None:
            return loss()
        total = loss(reduction="sum")
    else:
        total = (loss(reduction="none") * weights).sum()
        if num_items_in_batch is None:
            # Half precision counts no further than a few hundred.
            num_items_in_batch = weights[next_tokens != ignore_index].sum(dtype=total.dtype)
    return total / _or_one_if_zero(num_items_in_batch, total)


def _shifted(per_token: Tensor, fill: int) -> Tensor:
    """The next position's value at each position: the labels move, so that the logits need not be cut and copied."""
    if per_token.shape[-1] == 0:
        return per_token
    return torch.nn.functional.pad(per_token[..., 1:], (0, 1), value=fill)


def _check_mask(loss_mask: Tensor, next_tokens: Tensor) -> None:
    if not isinstance(loss_mask, Tensor):
        raise TypeError(f"loss_mask must be a torch.Tensor or None, got {type(loss_mask).__name__}")
    if loss_mask.shape != next_tokens.shape:
        raise ValueError(
            f"loss_mask must have the shape of the labels {tuple(next_tokens.shape)}, got {tuple(loss_mask.shape)}"
        )
    if (loss_mask < 0).any() or not loss_mask.isfinite().all():
        raise ValueError(
            "loss_mask must hold finite weights of 0 or above: a settled token has no gradient to ascend on"
        )


def _check_num_items(num_items: object) -> None:
    """Raise a ValueError or TypeError for what a sum cannot be divided by; a tensor's values stay on their device."""
    if num_items is None or isinstance(num_items, Tensor):
        return
    if not isinstance(num_items, int) and isinstance(num_items, SupportsIndex):
        num_items = index(num_items)  # numpy's; a compiler would fix the value of an int here
    expected = "a number of tokens, 0 or above, a tensor of one, or None"
    check_number("num_items_in_batch", num_items, expected, lambda value: value >= 0)


def _or_one_if_zero(num_items: int | Tensor, total: Tensor) -> int | Tensor:
    """What to divide a sum by; a batch in which no token counts is 0, not 0 / 0."""
    if isinstance(num_items, Tensor):
        num_items = num_items.to(total.device)
        return torch.where(num_items == 0, 1, num_items)
    return num_items or 1
