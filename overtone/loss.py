"""The loss as a function of logits, and as a module in the place of `torch.nn.CrossEntropyLoss`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from overtone.checks import (
    Reduction,
    check_hyperparameters,
    check_reduction,
    check_tensors,
    flatten_tokens,
    reduce_tokens,
    working_dtype,
)
from overtone.config import OverToneConfig
from overtone.hold import Hold, is_settled, refuse_hold_when_distributed, release_when_held
from overtone.native import native_for
from overtone.once import refuse_second_derivative
from overtone.rows import row_gradient, row_kl
from overtone.settings import TargetSettings

__all__ = ["OverToneLoss", "overtone_loss"]

GRADIENT_UP_TO = 2**22
"""Logits of a call up to which the gradient is worked out with the loss, though the backward pass may want another."""


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
    hold_correct: bool = False,
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
            so that an optimiser skips its step (with ``epsilon=0`` nothing ever settles). A number: the same when the
            mean KL is at or below it; ``math.inf`` leaves it to hold_correct. A call without counted tokens is held by
            either. `torch.amp.GradScaler` raises in a step without gradients, so use it with float32 or bfloat16, not
            with float16 autocast.
        hold_correct: beyond the paper. True: a token is settled, and a call held, only where the label is strictly the
            model's first choice. Otherwise a token can be let go while another one is still a little more probable, and
            a mean hides single tokens.

    Returns:
        A scalar, or ``(...)`` for reduction "none"; float64 for float64 logits, else float32.

    Raises:
        ValueError: for shapes that do not match, integer logits, labels out of range (on a CUDA device torch's own
            device-side assertion reports them), hyper-parameters out of range, or a hold under torch.distributed.
        TypeError: for an argument of the wrong type.
        NotImplementedError: under forward-mode differentiation; the loss has first derivatives in reverse mode.
    """
    check_hyperparameters(epsilon, n_sigma, lam, check, hold_settled, hold_correct)
    check_reduction(reduction, ignore_index)
    check_tensors(logits, labels, reference_logits)
    refuse_hold_when_distributed(hold_settled)
    _refuse_forward_mode(logits)
    token_logits, token_labels, reference = flatten_tokens(logits, labels, reference_logits)
    settings = TargetSettings(None if n_sigma is None else float(n_sigma), float(lam), check)
    can_be_held = hold_settled is not False
    outputs = _OverTone.apply(  # type: ignore[no-untyped-call]
        token_logits,
        token_labels,
        reference,
        settings,
        float(epsilon),
        hold_correct,
        ignore_index,
        reduction,
        torch.is_grad_enabled() and token_logits.requires_grad,
        can_be_held,
    )
    loss: Tensor
    if not can_be_held:
        loss = outputs
    else:
        loss, kl, correct = outputs
        counted = token_labels != ignore_index
        waits_for = correct[counted] if hold_correct else None
        loss = release_when_held(loss, kl[counted], epsilon, hold_settled, waits_for)
    return loss.reshape(labels.shape) if reduction == "none" else loss


class OverToneLoss(nn.Module):
    """`overtone_loss` in the place of `torch.nn.CrossEntropyLoss`: ``module(logits, labels)``.

    Args:
        config: the settings; None for the defaults.
        ignore_index: label of positions that do not count.
        reduction: "mean", "sum" or "none".
        weight, label_smoothing, size_average, reduce: there so that a call written for CrossEntropyLoss is understood;
            any value but CrossEntropyLoss's default raises a ValueError, since the loss could not honour it.
    """

    def __init__(
        self,
        config: OverToneConfig | None = None,
        *,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        size_average: bool | None = None,
        reduce: bool | None = None,
    ) -> None:
        super().__init__()
        if config is not None and not isinstance(config, OverToneConfig):
            raise TypeError(
                f"config must be an OverToneConfig or None, got {type(config).__name__}; there are no class weights"
            )
        check_reduction(reduction, ignore_index)
        if weight is not None:
            raise ValueError(
                "weight must be None: OverTone has no class weights; use torch.nn.CrossEntropyLoss for them"
            )
        if label_smoothing != 0.0:
            raise ValueError(
                f"label_smoothing must be 0, got {label_smoothing!r}: OverTone smooths each target adaptively (see lam)"
            )
        if size_average is not None or reduce is not None:
            raise ValueError("size_average and reduce must be None: pass reduction='mean', 'sum' or 'none'")
        self.config = config or OverToneConfig()
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def forward(self, logits: Tensor, labels: Tensor, reference_logits: Tensor | None = None) -> Tensor:
        """The loss of logits ``(..., V)`` and labels ``(...)``; see `overtone_loss`."""
        return overtone_loss(
            logits,
            labels,
            reference_logits=reference_logits,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            **self.config.as_kwargs(),
        )

    def extra_repr(self) -> str:
        """The settings, as repr shows them."""
        settings = {**self.config.as_kwargs(), "ignore_index": self.ignore_index, "reduction": self.reduction}
        return ", ".join(f"{name}={value!r}" for name, value in settings.items())


def _refuse_forward_mode(logits: Tensor) -> None:
    """Torch would refuse it too, but not say what to do instead."""
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(logits).tangent is not None:
        raise NotImplementedError(
            "overtone_loss has no forward-mode derivative: use backward(), or overtone.functional.reference_loss"
        )


class _OverTone(torch.autograd.Function):
    """The loss of tokens ``(N, V)``; if the call can be held, their KL and first choices ``(N,)`` too, as constants."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        reference_logits: Tensor | None,
        settings: TargetSettings,
        epsilon: float,
        hold_correct: bool,
        ignore_index: int,
        reduction: Reduction,
        is_trained: bool,
        can_be_held: bool,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.gradient = settings, None
        loss: Tensor
        # While a graph is traced, it has the loss as nodes of its own.
        is_one_call = reference_logits is None and reduction != "none" and not torch.compiler.is_compiling()
        native = native_for(logits) if is_one_call else None
        if native is not None:
            if is_trained and logits.numel() <= GRADIENT_UP_TO:
                ctx.gradient = logits.new_empty(logits.shape)
            fit = native.fit(
                logits,
                labels,
                settings,
                ignore_index,
                epsilon=epsilon,
                hold_correct=hold_correct,
                row_weight=None if reduction == "mean" else 1.0,
                gradient=ctx.gradient,
            )
            loss, kl, coefficients, row_weight = fit
        else:
            token_kl = _token_kl_operator if torch.compiler.is_compiling() else _token_kl
            kl, coefficients = token_kl(logits, labels, reference_logits, *settings, ignore_index)
            counted = labels != ignore_index
            settled = counted & is_settled(kl, epsilon, coefficients[4] != 0 if hold_correct else None)
            row_weight = (counted ^ settled).to(kl.dtype)
            loss = reduce_tokens(kl.masked_fill(settled, epsilon), counted, reduction)
            if reduction == "mean":
                row_weight /= counted.sum().clamp(min=1)
        ctx.save_for_backward(logits, labels, reference_logits, coefficients, row_weight)
        if not can_be_held:
            return loss
        correct = coefficients[4] != 0
        ctx.mark_non_differentiable(kl, correct)
        return loss, kl, correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 10
        # Handed out once: whoever gets it may keep it, or write to it.
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is not None and (scale := grad_loss.item()) != 1:
            # In half precision what a loss scale could have saved is lost by now; and 0 times NaN would be NaN.
            gradient = gradient.mul_(scale) if scale != 0 and gradient.dtype == grad_loss.dtype else None
        if gradient is None:
            logits, labels, reference_logits, coefficients, row_weight = ctx.saved_tensors
            arguments = grad_loss * row_weight, logits, labels, reference_logits, coefficients, *ctx.settings
            if torch.compiler.is_compiling():
                return _token_kl_backward_operator(*arguments), *[None] * 9
            gradient = _token_kl_backward(*arguments)
        if torch.is_grad_enabled():
            gradient = refuse_second_derivative(gradient, ctx.saved_tensors[0])
        return gradient, *[None] * 9


def _token_kl(
    logits: Tensor,
    labels: Tensor,
    reference_logits: Tensor | None,
    n_sigma: float | None,
    lam: float,
    check: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    return row_kl(logits, labels, reference_logits, TargetSettings(n_sigma, lam, check), ignore_index)


def _token_kl_backward(
    grad_kl: Tensor,
    logits: Tensor,
    labels: Tensor,
    reference_logits: Tensor | None,
    coefficients: Tensor,
    n_sigma: float | None,
    lam: float,
    check: bool,
) -> Tensor:
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    settings = TargetSettings(n_sigma, lam, check)
    row_gradient(grad_kl, logits, labels, reference_logits, coefficients, settings, out=gradient)
    return gradient


# Operators of torch's own, so that a user's compiled training step has them as whole nodes of its one graph. Outside of
# one they would cost time: their dispatch takes longer than that of a function.
_token_kl_operator = torch.library.custom_op(
    "overtone::token_kl",
    _token_kl,
    mutates_args=(),
    schema="(Tensor logits, Tensor labels, Tensor? reference_logits, float? n_sigma, float lam, bool check, "
    "int ignore_index) -> (Tensor, Tensor)",
)
_token_kl_backward_operator = torch.library.custom_op(
    "overtone::token_kl_backward",
    _token_kl_backward,
    mutates_args=(),
    schema="(Tensor grad_kl, Tensor logits, Tensor labels, Tensor? reference_logits, Tensor coefficients, "
    "float? n_sigma, float lam, bool check) -> Tensor",
)


@_token_kl_operator.register_fake
def _(logits, labels, reference_logits, n_sigma, lam, check, ignore_index):  # type: ignore[no-untyped-def]
    rows, dtype = logits.shape[0], working_dtype(logits)
    return logits.new_empty(rows, dtype=dtype), logits.new_empty(5, rows, dtype=dtype)


@_token_kl_backward_operator.register_fake
def _(grad_kl, logits, labels, reference_logits, coefficients, n_sigma, lam, check):  # type: ignore[no-untyped-def]
    return torch.empty_like(logits, memory_format=torch.contiguous_format)
