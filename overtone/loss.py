"""The loss as a function of logits, and as a module in the place of `torch.nn.CrossEntropyLoss`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from overtone.anchor import AnchorValue, read_anchors
from overtone.anchored import AnchoredTerm, anchored_rows, anchored_term
from overtone.checks import (
    Reduction,
    check_hyperparameters,
    check_reduction,
    check_tensors,
    flatten_tokens,
    reduce_tokens,
)
from overtone.config import OverToneConfig
from overtone.derivatives import raise_for_second_derivative, refuse_forward_mode
from overtone.functional import ground_truth_check, reference_loss
from overtone.hold import (
    Hold,
    HoldValue,
    check_hold_group,
    is_settled,
    read_hold,
    refuse_hold_in_graph,
    release_when_held,
)
from overtone.kernels import Clip, Kernel, Target, choose
from overtone.old_hold_names import accepts_old_names
from overtone.shard import (
    VocabularyShard,
    as_dtensor,
    check_shard,
    refuse_anchors_with_shard,
    refuse_reference_with_shard,
    take_shard,
)
from overtone.torch_state import is_transformed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["OverToneLoss", "overtone_loss"]


@accepts_old_names
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
    hold: HoldValue = None,
    hold_group: ProcessGroup | None = None,
    shard: VocabularyShard | None = None,
    anchors: AnchorValue = None,
    anchor: float = 0.0,
    anchor_epsilon: float = 0.05,
) -> Tensor:
    """The OverTone loss: ``max(KL(target || softmax(logits)), epsilon)`` a token (Eq. 2, Eq. 3, Algorithm 1).

    The target is the model's own distribution without its noise, mixed with the true token, and is used only if the
    true token stays on top of it; otherwise it is the true token alone. It is a constant for differentiation.

    Args:
        logits: ``(..., V)``, float64, float32, bfloat16 or float16; never written to. Entries at ``-inf`` have
            probability 0 and take no part; nor, in the filter, do those that are finite but banned all the same: more
            than 87.33 below the maximum, where the probability relative to it underflows in float32 (see
            `overtone.functional.finite_std`). NaN logits give a NaN loss.
        labels: ``(...)``, integer token ids in ``[0, V)``, or ignore_index.
        epsilon: in nats. A token whose KL is below it is settled: its loss is the constant epsilon, its gradient
            exactly zero. 0 clips nothing (the paper's ablation "w/o clip").
        n_sigma: the filter keeps logits above ``max - n_sigma * std``; None keeps all ("w/o flt").
        lam: share of the true token in the target, in ``[0, 1]``; with 1 and ``epsilon=0`` this is cross-entropy.
        check: False always uses the mixture, on top or not ("w/o chk").
        reference_logits: ``(..., V)``, the unedited model's logits; given, the filtered distribution comes from them
            instead of from logits ("w/o dyn"). Computed by the definition, so many times slower.
        ignore_index: label of positions that do not count: loss 0, gradient 0.
        reduction: "mean" over the counted tokens (0 if there is none), "sum", or "none" for one loss a token.
        hold: beyond the paper, when a step needs nothing more: the call then gives no gradient at all, so that an
            optimiser skips its step. "settled": when every counted token is settled (with ``epsilon=0`` none ever is).
            "correct": when every label is strictly the model's first choice; a token is then not settled otherwise
            either, where another one could still be a little more probable. A number of nats: when the mean KL is at or
            below it; a mean hides single tokens. A tuple of these, such as ``("correct", 0.2)``: when all are true. A
            call without counted tokens is held by any. `torch.amp.GradScaler` raises in a step without gradients, so
            use it with float32 or bfloat16, not with float16 autocast.
        hold_group: the ranks of torch.distributed that hold together, all or none; each has to make the call. None for
            all there are, which is what data parallelism needs.
        shard: where the logits lie if they are this rank's part ``(..., V_local)`` of a vocabulary that is spread over
            ranks, as Megatron leaves them; labels are then those of the whole vocabulary, and every rank of the shard's
            group gets the same loss. A DTensor placed as ``Shard(-1)`` says so itself.
        anchors: beyond the paper, what must stay as it was: positions whose labels are ignore_index, and the unedited
            model's distribution pi_0 there; see `overtone.Anchors`. Several groups have a mean each. The loss is then

                targets' loss + anchor * sum over groups of group_weight * mean of max(KL(pi_0 || pi), anchor_epsilon)

            (sums for reduction "sum"), and a group without positions counts 0. A hold also waits until the mean KL of
            every group, before the clip, is at or below anchor_epsilon; on several ranks, of each rank's groups.
        anchor: the weight of the anchored term; above 0 with anchors, 0 without.
        anchor_epsilon: in nats. An anchored position whose KL is below it has a gradient of exactly zero.

    Returns:
        A scalar, or ``(...)`` for reduction "none"; float64 for float64 logits, else float32.

    Raises:
        ValueError: for shapes that do not match, integer logits, labels out of range (on a CUDA device torch's own
            device-side assertion reports them), hyper-parameters out of range, a hold
            inside of torch.compile(fullgraph=True), a DTensor whose rows are split otherwise, anchors without an
            anchor or the other way round, anchors at labels, with reduction "none" or with a shard.
        TypeError: for an argument of the wrong type.
        NotImplementedError: under forward-mode differentiation; the loss has first derivatives in reverse mode.
    """
    is_anchored = anchors is not None or anchor != 0
    if torch.compiler.is_compiling() and (is_anchored or shard is not None or as_dtensor(logits) is not None):
        from overtone.kernels.graph import call_outside  # imported while it traces, with much of the compiler

        settings: dict[str, Any] = {"epsilon": epsilon, "n_sigma": n_sigma, "lam": lam, "check": check, "hold": hold}
        others = {"ignore_index": ignore_index, "reduction": reduction, "hold_group": hold_group, "shard": shard}
        settings["reference_logits"] = reference_logits  # refused there, as without torch.compile
        settings |= {"anchors": anchors, "anchor": anchor, "anchor_epsilon": anchor_epsilon}
        outside: Tensor = call_outside(overtone_loss, logits, labels, **settings, **others)
        return outside
    logits, labels, shard = take_shard(logits, labels, shard)
    if reference_logits is not None:
        refuse_reference_with_shard(shard)
    holding = read_hold(hold)
    check_hold_group(hold_group)
    check_hyperparameters(epsilon, n_sigma, lam, check)
    check_reduction(reduction, ignore_index)
    check_tensors(logits, labels, reference_logits, may_be_empty=shard is not None)
    refuse_hold_in_graph(holding)
    if reference_logits is None:
        refuse_forward_mode(logits)
    token_logits, token_labels = flatten_tokens(logits, labels)
    term: AnchoredTerm | None = None
    if is_anchored:
        refuse_anchors_with_shard(shard)
        groups = read_anchors(
            anchors, anchor, anchor_epsilon, labels, logits.shape[-1], ignore_index=ignore_index, reduction=reduction
        )
        token_logits, term = anchored_term(token_logits, anchored_rows(groups, anchor, anchor_epsilon, reduction))
    if reference_logits is not None:  # no kernel has it
        target = {"n_sigma": n_sigma, "lam": lam, "check": check, "reference_logits": reference_logits}
        logits = logits if term is None else token_logits.reshape(logits.shape)
        return _by_definition(logits, labels, target, epsilon, ignore_index, reduction, holding, hold_group, term)
    kernel = choose(token_logits, shard)
    correct_only = holding.correct
    loss: Tensor
    needs_context = torch.compiler.is_compiling() or is_transformed()
    function = _OverTone if needs_context else _OrdinaryOverTone
    loss, kl, coefficients, _ = function.apply(  # type: ignore[no-untyped-call]
        token_logits,
        token_labels,
        _room_for_gradient(token_logits, reduction, kernel),
        _Options(
            kernel,
            Target(None if n_sigma is None else float(n_sigma), float(lam), check),
            Clip(float(epsilon), correct_only),
            reduction,
            ignore_index,
        ),
    )
    if term is not None:
        loss = loss + term.loss
    if holding:
        counted = token_labels != ignore_index
        correct = coefficients[4, counted] != 0 if correct_only else None
        moved = None if term is None else term.moved
        loss = release_when_held(loss, kl[counted], epsilon, holding, correct, hold_group, moved)
    return loss.reshape(labels.shape) if reduction == "none" else loss


def _by_definition(
    logits: Tensor,
    labels: Tensor,
    target: dict[str, Any],
    epsilon: float,
    ignore_index: int,
    reduction: Reduction,
    hold: Hold,
    hold_group: ProcessGroup | None,
    term: AnchoredTerm | None,
) -> Tensor:
    """The loss with a target of which no kernel knows: its KL is the literal one, with a graph of its own."""
    kl = reference_loss(logits, labels, epsilon=0.0, ignore_index=ignore_index, reduction="none", **target)
    counted = labels != ignore_index
    correct = ground_truth_check(logits.detach(), labels.where(counted, 0).long()) if hold.correct else None
    settled = counted & is_settled(kl.clamp(min=0), epsilon, correct)  # a KL near 0 may be rounded to below it
    loss = reduce_tokens(torch.where(settled, epsilon, kl), counted, reduction)
    if term is not None:
        loss = loss + term.loss
    if hold:
        waits_for = None if correct is None else correct[counted]
        moved = None if term is None else term.moved
        loss = release_when_held(loss, kl.detach()[counted], epsilon, hold, waits_for, hold_group, moved)
    return loss


class OverToneLoss(nn.Module):
    """`overtone_loss` in the place of `torch.nn.CrossEntropyLoss`: ``module(logits, labels)``.

    Args:
        config: the settings; None for the defaults.
        ignore_index: label of positions that do not count.
        reduction: "mean", "sum" or "none".
        weight, label_smoothing, size_average, reduce: there so that a call written for CrossEntropyLoss is understood;
            any value but CrossEntropyLoss's default raises a ValueError, since the loss could not honour it.
        hold_group, shard: as in `overtone_loss`.

    Raises:
        TypeError: for a config that is no OverToneConfig, an ignore_index that is no integer, or another hold_group or
            shard.
        ValueError: for another reduction, and for what CrossEntropyLoss has and this loss does not. The call raises as
            `overtone_loss` does.
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
        hold_group: ProcessGroup | None = None,
        shard: VocabularyShard | None = None,
    ) -> None:
        super().__init__()
        if config is not None and not isinstance(config, OverToneConfig):
            raise TypeError(
                f"config must be an OverToneConfig or None, got {type(config).__name__}; there are no class weights"
            )
        check_reduction(reduction, ignore_index)
        check_hold_group(hold_group)
        check_shard(shard)
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
        self.hold_group = hold_group
        self.shard = shard

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        reference_logits: Tensor | None = None,
        anchors: AnchorValue = None,
    ) -> Tensor:
        """The loss of logits ``(..., V)`` and labels ``(...)``; arguments, result and errors are `overtone_loss`'s."""
        return overtone_loss(
            logits,
            labels,
            reference_logits=reference_logits,
            anchors=anchors,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            hold_group=self.hold_group,
            shard=self.shard,
            **self.config.as_kwargs(),
        )

    def extra_repr(self) -> str:
        """The settings, as repr shows them."""
        settings = {**self.config.as_kwargs(), "ignore_index": self.ignore_index, "reduction": self.reduction}
        return ", ".join(f"{name}={value!r}" for name, value in settings.items())


def _room_for_gradient(logits: Tensor, reduction: Reduction, kernel: Kernel) -> Tensor | None:
    """A tensor to write the gradient to while the loss is worked out, where that pays: each token weighs alike."""
    if reduction == "none" or not torch.is_grad_enabled() or not logits.requires_grad:
        return None
    return logits.new_empty(logits.shape) if logits.numel() <= kernel.gradient_with_fit_up_to else None


class _Options(NamedTuple):
    """What is no tensor."""

    kernel: Kernel
    target: Target
    clip: Clip
    reduction: Reduction
    ignore_index: int


class _OverTone(torch.autograd.Function):
    """`Kernel.fit` of tokens ``(N, V)``, of which the loss alone is differentiable."""

    @staticmethod
    def forward(
        logits: Tensor,
        labels: Tensor,
        gradient: Tensor | None,
        options: _Options,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        kernel, target, clip, reduction, ignore_index = options
        fit = kernel.fit(
            logits, labels, target, clip, reduction=reduction, ignore_index=ignore_index, gradient=gradient
        )
        return fit.loss, fit.kl, fit.coefficients, fit.row_weights

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, labels, ctx.gradient, options = inputs
        _, kl, coefficients, row_weights = output
        ctx.kernel = options.kernel
        ctx.save_for_backward(logits, labels, coefficients, row_weights)
        ctx.mark_non_differentiable(kl, coefficients, row_weights)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 4
        # Handed out once: whoever gets it may keep it, or write to it.
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is not None and torch.is_grad_enabled():
            gradient = None  # its derivative is asked for, and refused by _Gradient
        if gradient is not None and (scale := grad_loss.item()) != 1:
            # In half precision what a loss scale could have saved is lost by now; and 0 times NaN would be NaN.
            gradient = gradient.mul_(scale) if scale != 0 and gradient.dtype == grad_loss.dtype else None
        if gradient is None:
            logits, labels, coefficients, row_weights = ctx.saved_tensors
            gradient = _Gradient.apply(  # type: ignore[no-untyped-call]
                grad_loss * row_weights, logits, labels, coefficients, ctx.kernel
            )
        return gradient, None, None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        logits: Tensor,
        labels: Tensor,
        gradient: Tensor | None,
        options: _Options,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """A batch of calls ``(B, N, V)`` is one call of as many rows, reduced apart."""
        size = info.batch_size
        logits, labels = (
            _batch_first(tensor, dim, size) for tensor, dim in zip((logits, labels), in_dims[:2], strict=True)
        )
        token_loss, kl, coefficients, row_weights = _OverTone.apply(  # type: ignore[no-untyped-call]
            logits.flatten(0, 1), labels.flatten(), None, options._replace(reduction="none")
        )
        token_loss, kl, row_weights = (values.view(labels.shape) for values in (token_loss, kl, row_weights))
        loss = token_loss if options.reduction == "none" else token_loss.sum(dim=1)
        if options.reduction == "mean":
            count = (labels != options.ignore_index).sum(dim=1).clamp(min=1)
            loss, row_weights = loss / count, row_weights / count.unsqueeze(1)
        return (loss, kl, coefficients.view(5, *labels.shape), row_weights), (0, 0, 1, 0)


class _OrdinaryOverTone(_OverTone):
    """The same outside of torch.func: in each call of a Function with a setup_context torch inspects its signature.

    That takes as long as the loss of eight tokens.
    """

    setup_context = torch.autograd.Function.setup_context

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        output = _OverTone.forward(*inputs)
        _OverTone.setup_context(ctx, inputs, output)
        return output


class _Gradient(torch.autograd.Function):
    """`Kernel.gradient` as a function whose own derivative is refused."""

    @staticmethod
    def forward(grad_kl: Tensor, logits: Tensor, labels: Tensor, coefficients: Tensor, kernel: Kernel) -> Tensor:
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        kernel.gradient(grad_kl, logits, labels, coefficients, out=gradient)
        return gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> None:
        raise_for_second_derivative()

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        grad_kl: Tensor,
        logits: Tensor,
        labels: Tensor,
        coefficients: Tensor,
        kernel: Kernel,
    ) -> tuple[Tensor, int]:
        """As that of _OverTone."""
        grad_kl, logits, labels, coefficients = (
            _batch_first(tensor, dim, info.batch_size)
            for tensor, dim in zip((grad_kl, logits, labels, coefficients), in_dims, strict=False)
        )
        gradient: Tensor = _Gradient.apply(  # type: ignore[no-untyped-call]
            grad_kl.flatten(), logits.flatten(0, 1), labels.flatten(), coefficients.transpose(0, 1).flatten(1), kernel
        )
        return gradient.view(logits.shape), 0


def _batch_first(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """With the dimension that torch.vmap goes over in front."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
