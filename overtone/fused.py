"""The loss on logits: the closed form as an operator of its own, which autograd and torch.compile know."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from overtone.contract import (
    Reduction,
    check_hyperparameters,
    check_reduction,
    check_tensors,
    flatten_tokens,
    reduce_tokens,
    working_dtype,
)
from overtone.hold import Hold, refuse_hold_when_distributed, release_when_held
from overtone.rows import TargetSettings, row_gradient, row_kl

__all__ = ["overtone_loss"]


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
            so that an optimiser skips its step (with ``epsilon=0`` nothing ever settles). A number: the same when the
            mean KL is at or below it. A call without counted tokens is held by either. `torch.amp.GradScaler` raises
            in a step without gradients, so use it with float32 or bfloat16, not with float16 autocast.

    Returns:
        A scalar, or ``(...)`` for reduction "none"; float64 for float64 logits, else float32.

    Raises:
        ValueError: for shapes that do not match, integer logits, labels out of range (on a CUDA device torch's own
            device-side assertion reports them), hyper-parameters out of range, or a hold under torch.distributed.
        TypeError: for an argument of the wrong type.
        NotImplementedError: under forward-mode differentiation; the loss has first derivatives in reverse mode.
    """
    check_hyperparameters(epsilon, n_sigma, lam, check, hold_settled)
    check_reduction(reduction, ignore_index)
    check_tensors(logits, labels, reference_logits)
    refuse_hold_when_distributed(hold_settled)
    _refuse_forward_mode(logits)
    token_logits, token_labels, reference = flatten_tokens(logits, labels, reference_logits)
    counted = token_labels != ignore_index
    sigmas = None if n_sigma is None else float(n_sigma)
    kl, _ = _token_kl(token_logits, token_labels, reference, sigmas, float(lam), check, ignore_index)
    token_loss = torch.where(counted & (kl < epsilon), epsilon, kl)
    if hold_settled is not False:
        token_loss = release_when_held(token_loss, kl.detach()[counted], epsilon, hold_settled)
    return reduce_tokens(token_loss, counted, reduction).reshape(labels.shape if reduction == "none" else ())


def _refuse_forward_mode(logits: Tensor) -> None:
    """The operator has no tangents; torch would take them to be zero."""
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(logits).tangent is not None:
        raise NotImplementedError(
            "overtone_loss has no forward-mode derivative: use backward(), or overtone.functional.reference_loss"
        )


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
    return row_kl(logits, labels, reference_logits, TargetSettings(n_sigma, lam, check), ignore_index)


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
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    settings = TargetSettings(n_sigma, lam, check)
    row_gradient(grad_kl, logits, labels, reference_logits, coefficients, settings, ignore_index, out=gradient)
    return gradient


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
