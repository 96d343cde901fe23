"""The loss from hidden states: the output layer and the loss a chunk of rows at a time, never all logits at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from overtone.anchor import AnchorValue, read_anchors
from overtone.anchored import AnchoredTerm, anchored_rows
from overtone.anchored_linear import anchored_layer_term
from overtone.checks import (
    Reduction,
    check_hyperparameters,
    check_labels,
    check_layer,
    check_reduction,
    check_tensors,
    reduce_tokens,
    working_dtype,
)
from overtone.derivatives import refuse_second_derivative
from overtone.hold import (
    HoldValue,
    check_hold_group,
    is_settled,
    read_hold,
    release_when_held,
)
from overtone.kernels import Clip, Fit, Kernel, Target, choose
from overtone.loss import overtone_loss
from overtone.old_hold_names import accepts_old_names
from overtone.shard import VocabularyShard, refuse_anchors_with_shard, take_layer_shard
from overtone.torch_state import in_autocast_dtype, is_transformed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["linear_overtone_loss"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

CHUNK_ELEMENTS = 2**25

CHUNK_MULTIPLE = 64
"""A matrix product in bfloat16 takes up to a tenth longer for a number of rows that its tiles do not divide."""


def _outside_graphs(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function, at which torch.compile breaks its graph."""

    @wraps(function)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if torch.compiler.is_compiling():
            from overtone.kernels.graph import call_outside  # imported while it traces, with much of the compiler

            result: Result = call_outside(function, *args, **kwargs)
            return result
        return function(*args, **kwargs)

    return wrapped


@accepts_old_names
@_outside_graphs
def linear_overtone_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_size: int | None = None,
    epsilon: float = 0.05,
    n_sigma: float | None = 0.5,
    lam: float = 0.1,
    check: bool = True,
    reference_logits: None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    hold: HoldValue = None,
    hold_group: ProcessGroup | None = None,
    shard: VocabularyShard | None = None,
    anchors: AnchorValue = None,
    anchor: float = 0.0,
    anchor_epsilon: float = 0.05,
) -> Tensor:
    """`overtone_loss(F.linear(hidden, weight, bias), labels, ...)` without ever holding all the logits.

    The gradients are worked out in the forward pass, while a chunk's logits are there, for rows that weigh alike, as
    the reductions "mean" and "sum" make them; if the rows turn out to weigh differently (reduction "none" with weights
    on top) the backward pass goes through the chunks once more.

    Args:
        hidden: ``(..., H)``, the last hidden states. Ignored positions that are no anchors cost nothing.
        weight: ``(V, H)``, of the output layer, in the precision of hidden (cast by autocast, where that is on). Its
            gradient is only worked out if it is wanted, and never added up in low precision; a weight tied to the
            embedding is fine.
        labels: ``(...)``, token ids in ``[0, V)``, or ignore_index.
        bias: ``(V,)`` or None.
        chunk_size: rows whose logits are held at once, or as many logits of a slice of the vocabulary of at least 64
            tokens; None for as many rows as make 2**25 logits, in multiples of 64 and at least 64.
        epsilon, n_sigma, lam, check, ignore_index, reduction, hold, hold_group: as in `overtone_loss`.
        shard: where the weight's tokens lie if they are this rank's part of a vocabulary that is spread over ranks, on
            which hidden and labels are alike. The gradient of hidden is summed over them, once. A DTensor weight placed
            as ``Shard(0)`` says so itself, and hidden and labels may be replicated DTensors.
        anchors, anchor, anchor_epsilon: as in `overtone_loss`; see `overtone.Anchors.record_hidden`. Where the gradient
            of weight is wanted, that of the anchored term is held beside it until the backward pass.
        reference_logits: None, since it would be all the logits of another model, which this function is there to
            avoid; pass it to `overtone_loss` with this model's logits.

    Returns:
        A scalar, or ``(...)`` for reduction "none"; float64 for float64 hidden states, else float32.

    Raises:
        ValueError, TypeError: as `overtone_loss`, and for a weight, bias or chunk_size that does not fit.
    """
    if is_transformed():  # by torch.func, which wants functions of one form; the logits are then held as a whole
        return overtone_loss(
            torch.nn.functional.linear(hidden, weight, bias),
            labels,
            epsilon=epsilon,
            n_sigma=n_sigma,
            lam=lam,
            check=check,
            ignore_index=ignore_index,
            reduction=reduction,
            hold=hold,
            hold_group=hold_group,
            shard=shard,
            anchors=anchors,
            anchor=anchor,
            anchor_epsilon=anchor_epsilon,
        )
    holding = read_hold(hold)
    check_hold_group(hold_group)
    check_hyperparameters(epsilon, n_sigma, lam, check)
    check_reduction(reduction, ignore_index)
    if reference_logits is not None:
        raise ValueError(
            "reference_logits must be None: all logits of an unedited model are what linear_overtone_loss never holds; "
            "pass them to overtone_loss(F.linear(hidden, weight, bias), labels, reference_logits=...)"
        )
    _check_types(hidden, weight, bias)
    hidden, weight, bias, labels, shard = take_layer_shard(hidden, weight, bias, labels, shard)
    hidden, weight, bias = in_autocast_dtype(hidden, weight, bias)
    check_layer(hidden, weight, bias)
    if chunk_size is not None and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size must be a whole number of rows, 1 or more, or None, got {chunk_size!r}")
    vocabulary = len(weight) if shard is None else shard.size
    check_tensors(hidden.new_empty(()).expand(*hidden.shape[:-1], vocabulary), labels)
    token_labels = labels.reshape(-1).long()
    check_labels(token_labels, vocabulary, ignore_index)
    counted = token_labels != ignore_index
    rows = counted.nonzero().squeeze(1)

    chunk_size = chunk_size or CHUNK_MULTIPLE * max(1, CHUNK_ELEMENTS // CHUNK_MULTIPLE // vocabulary)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    term: AnchoredTerm | None = None
    if anchors is not None or anchor != 0:
        refuse_anchors_with_shard(shard)
        groups = read_anchors(
            anchors, anchor, anchor_epsilon, labels, vocabulary, ignore_index=ignore_index, reduction=reduction
        )
        anchored = anchored_rows(groups, anchor, anchor_epsilon, reduction)
        hidden, weight, bias, term = anchored_layer_term(hidden, weight, bias, anchored, chunk_size)

    # In float16 a mean's gradients would vanish before a loss scale could save them: they are divided afterwards.
    is_divided_now = reduction == "mean" and hidden.dtype != torch.float16
    tokens = _Tokens(
        labels=token_labels[rows],
        target=Target(n_sigma, float(lam), check),
        clip=Clip(float(epsilon), holding.correct),
        chunk_size=chunk_size,
        row_weight=1 / max(1, len(rows)) if is_divided_now else 1.0,
        correct=torch.empty_like(rows, dtype=torch.bool),
        shard=shard,
    )
    kl: Tensor = _LinearKl.apply(  # type: ignore[no-untyped-call]
        hidden[rows], weight, bias, tokens, torch.is_grad_enabled()
    )
    token_loss = kl.new_zeros(token_labels.shape).index_copy(0, rows, torch.where(tokens.settled(kl), epsilon, kl))
    loss = reduce_tokens(token_loss, counted, reduction).reshape(labels.shape if reduction == "none" else ())
    if term is not None:
        loss = loss + term.loss
    moved = None if term is None else term.moved
    return release_when_held(loss, kl.detach(), epsilon, holding, tokens.correct, hold_group, moved)


def _check_types(hidden: object, weight: object, bias: object) -> None:
    for name, value in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if not isinstance(value, Tensor) and not (name == "bias" and value is None):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if isinstance(hidden, Tensor) and not hidden.is_floating_point():
        raise ValueError(f"hidden must be floating point, got {hidden.dtype}")


class _Tokens(NamedTuple):
    """What is constant for differentiation.

    Attributes:
        labels: ``(M,)``, of the counted tokens.
        target, clip: the settings of the loss.
        chunk_size: rows to work on at a time.
        row_weight: what each token's gradient is multiplied by in the forward pass, as the reduction will.
        correct: ``(M,)``, filled in: whether each label is strictly the model's first choice.
        shard: where the weight's tokens lie, if they are a part of the vocabulary.
    """

    labels: Tensor
    target: Target
    clip: Clip
    chunk_size: int
    row_weight: float
    correct: Tensor
    shard: VocabularyShard | None

    def settled(self, kl: Tensor) -> Tensor:
        """Whether each token is let go, given its KL."""
        return is_settled(kl, self.clip.epsilon, self.correct if self.clip.correct_only else None)


class _Gradients(NamedTuple):
    """Gradients of hidden ``(M, H)``, weight ``(V, H)`` and bias ``(V,)``; None where not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def _chunked(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: _Tokens,
    row_weights: float | Tensor,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, _Gradients]:
    """KL of each row, and the wanted gradients of ``sum(row_weights * clipped KL)``, a number or ``(M,)``.

    The gradients of weight and bias are in working precision where they are sums over chunks.
    """
    rows, vocabulary = len(hidden), len(weight)
    dtype = working_dtype(hidden)
    kl = hidden.new_empty(rows, dtype=dtype)
    is_split = rows > tokens.chunk_size
    # A sum over chunks in bfloat16 would need one in float32 beside it, twice as large as the weight: there the
    # vocabulary is split afterwards instead, which makes each row of the gradient in one product. In float16, whose
    # mean is divided afterwards, that product could overflow.
    by_slices = is_split and hidden.dtype == torch.bfloat16
    sums_dtype = dtype if is_split and not by_slices else hidden.dtype
    made = torch.empty_like if by_slices else torch.zeros_like
    gradients = _Gradients(
        torch.empty_like(hidden) if wanted[0] else None,
        made(weight, dtype=sums_dtype) if wanted[1] else None,
        made(weight[:, 0], dtype=sums_dtype) if wanted[2] else None,
    )
    grad_kl = torch.zeros_like(kl)
    coefficients = kl.new_empty(5, rows)
    buffer = hidden.new_empty(min(tokens.chunk_size, rows), vocabulary)
    kernel = choose(buffer, tokens.shard)
    is_wanted_now = wanted[0] or (any(wanted) and not by_slices)
    for start in range(0, rows, tokens.chunk_size):
        chunk = slice(start, min(start + tokens.chunk_size, rows))
        logits = buffer[: chunk.stop - start]
        _write_logits(hidden[chunk], weight, bias, out=logits)
        weights = row_weights if isinstance(row_weights, float) else row_weights[chunk]
        fit = _fit_chunk(kernel, logits, tokens.labels[chunk], tokens, weights, overwrite=is_wanted_now)
        kl[chunk], coefficients[:, chunk], grad_kl[chunk] = fit.kl, fit.coefficients, fit.row_weights
        tokens.correct[chunk] = fit.coefficients[4] != 0
        if not is_wanted_now:
            continue
        if gradients.hidden is not None:
            torch.mm(logits, weight, out=gradients.hidden[chunk])
        if not by_slices:
            _add_gradients(gradients, logits, hidden[chunk])
    if gradients.hidden is not None and tokens.shard is not None:
        tokens.shard.total(gradients.hidden)
    if by_slices and (wanted[1] or wanted[2]):
        _write_gradients_by_slices(
            gradients, hidden, weight, bias, tokens, kernel, coefficients, grad_kl, buffer.view(-1)
        )
    return kl, gradients


def _fit_chunk(
    kernel: Kernel, logits: Tensor, labels: Tensor, tokens: _Tokens, row_weights: float | Tensor, *, overwrite: bool
) -> Fit:
    """The fit of a chunk's rows, with row_weights, zeros where settled; on request their gradient for the logits."""
    scale, gradient = (row_weights, logits) if isinstance(row_weights, float) else (1.0, None)
    fit = kernel.fit(
        logits,
        labels,
        tokens.target,
        tokens.clip,
        reduction="sum",
        ignore_index=-1,
        scale=scale,
        gradient=gradient if overwrite else None,
    )
    if isinstance(row_weights, Tensor):
        fit = fit._replace(row_weights=fit.row_weights * row_weights)
        if overwrite:
            kernel.gradient(fit.row_weights, logits, labels, fit.coefficients, out=logits)
    return fit


def _write_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor) -> None:
    if bias is None:
        torch.mm(hidden, weight.t(), out=out)
    else:
        torch.addmm(bias, hidden, weight.t(), out=out)


def _add_gradients(gradients: _Gradients, logits_gradient: Tensor, hidden: Tensor) -> None:
    """Add what a chunk of rows gives to the gradients of weight and bias, which may be in a higher precision."""
    if gradients.weight is not None:
        if gradients.weight.dtype == hidden.dtype:
            gradients.weight.addmm_(logits_gradient.t(), hidden)
        else:
            # In parts, so that the product in low precision is never as large as the weight.
            parts = zip(gradients.weight.chunk(16), logits_gradient.chunk(16, dim=1), strict=True)
            for part, part_gradient in parts:
                part.add_(part_gradient.t() @ hidden)
    if gradients.bias is not None:
        gradients.bias.add_(logits_gradient.sum(dim=0, dtype=gradients.bias.dtype))


def _write_gradients_by_slices(
    gradients: _Gradients,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: _Tokens,
    kernel: Kernel,
    coefficients: Tensor,
    grad_kl: Tensor,
    buffer: Tensor,
) -> None:
    """Write the gradients of weight and bias, a slice of the vocabulary at a time; the logits are worked out again.

    Args:
        gradients: to write to, in the precision of hidden.
        hidden, weight, bias, tokens: as in `_chunked`.
        kernel: that of the fit.
        coefficients: ``(5, M)``, of the fit.
        grad_kl: ``(M,)``.
        buffer: ``(chunk_size * V,)``, for the logits of a slice.
    """
    needed = grad_kl.nonzero().squeeze(1)
    labels = tokens.labels
    if len(needed) < len(grad_kl):
        hidden, labels, coefficients, grad_kl = hidden[needed], labels[needed], coefficients[:, needed], grad_kl[needed]
    width = CHUNK_MULTIPLE * max(1, len(buffer) // max(1, len(hidden)) // CHUNK_MULTIPLE)
    if len(buffer) < len(hidden) * min(width, len(weight)):
        buffer = hidden.new_empty(len(hidden) * min(width, len(weight)))
    for start in range(0, len(weight), width):
        part = slice(start, min(start + width, len(weight)))
        logits = buffer[: len(hidden) * (part.stop - start)].view(len(hidden), part.stop - start)
        _write_logits(hidden, weight[part], None if bias is None else bias[part], out=logits)
        kernel.gradient(grad_kl, logits, labels - start, coefficients, out=logits)
        if gradients.weight is not None:
            torch.mm(logits.t(), hidden, out=gradients.weight[part])
        if gradients.bias is not None:
            gradients.bias[part] = logits.sum(dim=0, dtype=grad_kl.dtype).to(hidden.dtype)


class _LinearKl(torch.autograd.Function):
    """KL of each row of ``hidden @ weight.T + bias``, differentiable in all three."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: _Tokens, grad_enabled: bool
    ) -> Tensor:
        of_hidden, of_weight, of_bias = (grad_enabled and needed for needed in ctx.needs_input_grad[:3])
        wanted = (of_hidden, of_weight, of_bias)
        kl, ctx.gradients = _chunked(hidden, weight, bias, tokens, tokens.row_weight, wanted)
        ctx.set_materialize_grads(False)
        ctx.tokens, ctx.wanted = tokens, wanted
        ctx.save_for_backward(hidden, weight, bias, kl.detach())
        return kl

    @staticmethod
    def backward(ctx: Any, grad_kl: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_kl is None:
            return (None,) * 5
        hidden, weight, bias, kl = ctx.saved_tensors
        # Handed out once, so that the optimiser's gradient is not a second copy of the weight's size.
        gradients, ctx.gradients = ctx.gradients, None
        # Rows that weigh alike have the same gradient but for the settled ones, of which it is 0.
        common = grad_kl.amax() if len(grad_kl) else grad_kl.new_tensor(ctx.tokens.row_weight)
        alike = torch.equal(grad_kl, torch.where(ctx.tokens.settled(kl), 0, common))
        if gradients is None or not alike:
            _, gradients = _chunked(hidden, weight, bias, ctx.tokens, grad_kl, ctx.wanted)
        elif common != ctx.tokens.row_weight:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(common / ctx.tokens.row_weight)
        found = [None if gradient is None else gradient.to(hidden.dtype) for gradient in gradients]
        if torch.is_grad_enabled():
            inputs = hidden, weight, bias
            found = [None if gradient is None else refuse_second_derivative(gradient, *inputs) for gradient in found]
        return *found, None, None
