"""What an attached model's anchors are measured against: the unedited model's logits for the same batch."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from overtone.anchor import Anchors
from overtone.config import OverToneConfig
from overtone.huggingface.fused_head import FusedHead, spreads_vocabulary
from overtone.huggingface.verification import how_sharded_or_unloaded, undisturbed
from overtone.huggingface.wrappers import (
    changes_base_weights,
    has_adapters,
    has_merged_adapters,
    is_of_peft,
    virtual_tokens,
    without_adapters,
)

Reference: TypeAlias = nn.Module | Literal["adapter", "logits"]
"""The unedited model: the trained one without its adapters, another module, or logits that come with the batch."""

NAMES = ("adapter", "logits")
_OF_THE_LOSS = ("labels", "shift_labels", "num_items_in_batch", "loss_mask")


@dataclass(frozen=True, eq=False)
class Batch:
    """What a running forward was called with.

    Attributes:
        model: whose forward it is.
        forward: to call it again.
        args, kwargs: its arguments, without those that follow.
        reference_logits: ``(batch, sequence, V)``, if they came with the batch.
        anchor_groups: ``(batch, sequence)``, if they came with the batch.
    """

    model: nn.Module
    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reference_logits: Tensor | None = None
    anchor_groups: Tensor | None = None

    @property
    def inputs(self) -> dict[str, Any]:
        """The arguments by name, without those of the loss."""
        signature = inspect.signature(self.forward)
        named = signature.bind_partial(*self.args, **self.kwargs).arguments
        others = [name for name, one in signature.parameters.items() if one.kind is inspect.Parameter.VAR_KEYWORD]
        inputs = {**named, **{key: value for name in others for key, value in named.pop(name, {}).items()}}
        inputs = {name: value for name, value in inputs.items() if name not in (*_OF_THE_LOSS, *others)}
        if inputs.get("past_key_values") is not None:
            raise ValueError("past_key_values must be None with an anchor, whose reference would write to them too")
        if "use_cache" in signature.parameters:
            inputs["use_cache"] = False
        return {**inputs, "return_dict": True}


def check_reference(
    reference: Reference | None, config: OverToneConfig, top_k: int | None, *, inside: nn.Module, causal_lm: Any
) -> None:
    """Raise a ValueError or TypeError unless the reference is one that an anchor can be measured against.

    Args:
        reference, config, top_k: as of `attach`.
        inside: the model that it was given.
        causal_lm: the Hugging Face model in it.
    """
    if not config.anchor:
        if reference is not None or top_k is not None:
            raise ValueError(
                "reference and anchor_top_k must be None without an anchor: pass OverToneConfig(anchor=1.0), say"
            )
        return
    if reference is None:
        raise ValueError(
            f"reference must be given with anchor={config.anchor}: 'adapter' (the model without its PEFT adapters), a "
            "frozen copy of the model, or 'logits' (model(..., reference_logits=...))"
        )
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"anchor_top_k must be a whole number of tokens, 1 or more, or None, got {top_k!r}")
    vocabulary = getattr(causal_lm.get_output_embeddings(), "out_features", None)
    if top_k is not None and vocabulary is not None and top_k >= vocabulary:
        raise ValueError(
            f"anchor_top_k must be below the {vocabulary} tokens of {type(causal_lm).__name__}, or None for all of "
            f"them, got {top_k}"
        )
    if not isinstance(reference, nn.Module) and reference not in NAMES:
        raise ValueError(f"reference must be a model, 'adapter' or 'logits', got {reference!r:.200}")
    if virtual_tokens(inside) or any(_is_prompt_learning(module) for module in inside.modules()):
        raise ValueError(
            "anchor must be 0 with prompt learning (prompt tuning, prefix tuning): the unedited model has no virtual "
            "tokens, so that its positions are others; train LoRA, say"
        )
    if spreads_vocabulary(causal_lm):
        raise ValueError("anchor must be 0 for a model whose output layer is spread over ranks (tensor parallelism)")
    if reference == "adapter":
        _refuse_adapters(inside, causal_lm)
    elif isinstance(reference, nn.Module):
        _refuse_trained(reference, inside)
        _refuse_unlike(reference, vocabulary)


@torch.no_grad()
def record_anchors(
    reference: Reference,
    batch: Batch,
    labels: Tensor | None,
    shift_labels: Tensor | None,
    *,
    ignore_index: int,
    top_k: int | None,
    like: Tensor,
    vocabulary: int,
    fused_head: FusedHead | None,
) -> tuple[Anchors, ...]:
    """The positions of a batch that must stay, group by group, and the unedited model's distributions there.

    Args:
        reference: the unedited model.
        batch: of the running forward.
        labels, shift_labels, ignore_index: as of `overtone.huggingface.causal_lm_loss`, one of the labels not None.
        top_k: as of `overtone.Anchors.record`.
        like: the edited model's logits, or whatever stands for them, on the device of the loss.
        vocabulary: V, of the edited model.
        fused_head: given, an adapter's reference makes no logits but those of a block of rows.
    """
    inputs = batch.inputs
    own = positions_that_stay(inputs, labels, shift_labels, ignore_index, getattr(batch.model, "config", None))
    own = own.to(like.device)
    groups = [own] if batch.anchor_groups is None else _chosen_groups(batch.anchor_groups, own)
    if not any(at.any() for at in groups):
        warnings.warn(
            "the anchor keeps nothing in a batch in which every token is a target or leads to one: give the prompts' "
            "tokens the label -100"
            if batch.anchor_groups is None
            else "the anchor keeps nothing in a batch whose anchor_groups are all 0: number the positions to keep",
            stacklevel=2,
        )
    if reference == "adapter":
        _refuse_missing_adapters(batch.model, type(batch.model).__name__)
        with evaluating(batch.model), without_adapters(batch.model):
            if fused_head is not None:
                hidden, head = fused_head.divert(batch.forward, inputs)
                return tuple(
                    Anchors.record_hidden(hidden, head.weight, at, bias=head.bias, top_k=top_k) for at in groups
                )
            logits: Tensor = batch.forward(**inputs).logits
    elif isinstance(reference, nn.Module):
        with evaluating(reference):
            logits = reference(**inputs).logits
    elif batch.reference_logits is not None:
        logits = batch.reference_logits
        if not isinstance(logits, Tensor):
            raise TypeError(f"reference_logits must be a torch.Tensor, got {type(logits).__name__}")
    else:
        raise ValueError(
            "reference_logits must be given to the model in every training step, since it is attached with "
            "reference='logits': the unedited model's logits for this batch, (batch, sequence, V)"
        )
    if logits.shape[:-1] != own.shape:
        raise ValueError(
            f"reference must give logits for the {tuple(own.shape)} positions of the labels, got {tuple(logits.shape)}"
        )
    if logits.shape[-1] != vocabulary:
        raise ValueError(_another_vocabulary(logits.shape[-1], vocabulary))
    logits = logits.to(like.device)
    return tuple(Anchors.record(logits, at, top_k=top_k) for at in groups)


def _chosen_groups(anchor_groups: Tensor, may_stay: Tensor) -> list[Tensor]:
    """Where each group stands, ``(batch, sequence)``, bool; 0 is none.

    Raises:
        TypeError: anchor_groups are no whole numbers.
        ValueError: they have another shape than the labels, are negative, or stand on a target, on a position whose
            prediction is one, or on padding.
    """
    if not isinstance(anchor_groups, Tensor) or anchor_groups.is_floating_point() or anchor_groups.is_complex():
        kind = anchor_groups.dtype if isinstance(anchor_groups, Tensor) else type(anchor_groups).__name__
        raise TypeError(f"anchor_groups must be a tensor of whole numbers, 0 for none, got {kind}")
    if anchor_groups.shape != may_stay.shape:
        raise ValueError(
            f"anchor_groups must have the shape of the labels {tuple(may_stay.shape)}, got {tuple(anchor_groups.shape)}"
        )
    anchor_groups = anchor_groups.to(may_stay.device)
    if (anchor_groups < 0).any():
        raise ValueError(f"anchor_groups must be 0 (none) or above, got {int(anchor_groups.min())}")
    if (wrong := (anchor_groups > 0) & ~may_stay).any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"anchor_groups must be 0 at targets, where a target is predicted, and at padding, got "
            f"{int(anchor_groups[row, column])} at position {column} of row {row}"
        )
    named = [group for group in anchor_groups.unique().tolist() if group > 0]
    return [anchor_groups == group for group in named or (1,)]


def positions_that_stay(
    inputs: dict[str, Any], labels: Tensor | None, shift_labels: Tensor | None, ignore_index: int, config: Any
) -> Tensor:
    """Where the logits belong to no target: ``(batch, sequence)``, bool.

    Those of real tokens that are no targets themselves and are not followed by one, whose prediction they would be.
    A token is real where the attention mask is 1; without a mask, where it is not the padding token.
    """
    if shift_labels is None:
        assert labels is not None
        is_target = labels != ignore_index
        is_followed = torch.nn.functional.pad(is_target[..., 1:], (0, 1))
    else:
        is_followed = shift_labels != ignore_index
        is_target = torch.nn.functional.pad(is_followed[..., :-1], (1, 0))
    at = ~is_target & ~is_followed
    mask, tokens = inputs.get("attention_mask"), inputs.get("input_ids")
    padding = getattr(config, "pad_token_id", None)
    if isinstance(mask, Tensor) and mask.shape == at.shape:
        at = at & mask.to(at.device).bool()
    elif isinstance(tokens, Tensor) and tokens.shape == at.shape and padding is not None:
        at = at & (tokens.to(at.device) != padding)
    return at


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, each module's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _is_prompt_learning(module: nn.Module) -> bool:
    return is_of_peft(module) and bool(
        getattr(getattr(module, "active_peft_config", None), "is_prompt_learning", False)
    )


def _refuse_missing_adapters(causal_lm: nn.Module, name: str) -> None:
    """Raise a ValueError unless a model, of which the error says the name, has adapters to be switched off."""
    if not has_adapters(causal_lm):
        raise ValueError(
            f"reference='adapter' needs a model with PEFT adapters, got {name} without: pass a frozen copy, "
            "reference=copy.deepcopy(model)"
        )
    if has_merged_adapters(causal_lm):
        raise ValueError(
            "reference='adapter' needs adapters that are not merged into the weights: call model.unmerge_adapter()"
        )


def _refuse_adapters(inside: nn.Module, causal_lm: Any) -> None:
    """Raise a ValueError unless the model without its adapters is the unedited one, whatever is trained."""
    _refuse_missing_adapters(causal_lm, type(inside).__name__)
    if culprit := changes_base_weights(inside):
        raise ValueError(
            f"reference='adapter' cannot be the unedited model with {culprit}, which changes the weights below the "
            "adapter: pass a copy from before, or the logits"
        )
    if how_sharded_or_unloaded(inside):
        return
    trained = {name: parameter for name, parameter in inside.named_parameters() if parameter.requires_grad}
    tokens = torch.zeros(1, 2, dtype=torch.long, device=causal_lm.get_input_embeddings().weight.device)
    with undisturbed(causal_lm), without_adapters(causal_lm), torch.enable_grad():
        logits = causal_lm(input_ids=tokens).logits
        if not (trained and logits.requires_grad):
            return
        gradients = torch.autograd.grad(logits.float().sum(), list(trained.values()), allow_unused=True)
    reached = [name for name, gradient in zip(trained, gradients, strict=True) if gradient is not None]
    if reached:
        raise ValueError(
            f"reference='adapter' cannot be the unedited model: {len(reached)} trained parameters are used without the "
            f"adapters too ({reached[0]}); pass a frozen copy, reference=copy.deepcopy(model)"
        )


def _refuse_trained(reference: nn.Module, inside: nn.Module) -> None:
    trained = {id(parameter) for parameter in inside.parameters() if parameter.requires_grad}
    shared = [name for name, parameter in reference.named_parameters() if id(parameter) in trained]
    if shared or reference is inside:
        raise ValueError(
            f"reference must not change with the model, but shares {len(shared)} trained parameters with it"
            f"{f' ({shared[0]})' if shared else ''}: pass copy.deepcopy(model), or 'adapter' for a PEFT model"
        )


def _refuse_unlike(reference: Any, vocabulary: int | None) -> None:
    """Raise a ValueError unless a reference makes logits of two tokens, of that vocabulary where it is known.

    Where its parameters are not all here, the first training step finds out.
    """
    if how_sharded_or_unloaded(reference):
        return
    weight = next(reference.parameters(), None)
    tokens = torch.zeros(1, 2, dtype=torch.long, device=None if weight is None else weight.device)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    try:
        with undisturbed(reference), torch.no_grad():
            found = reference(**inputs, return_dict=True).logits.shape[-1]
    except Exception as error:
        raise ValueError(
            "reference must be a model that is called as the trained one and returns logits, but "
            f"{type(reference).__name__} failed on two tokens ({type(error).__name__}: {error}): pass "
            "copy.deepcopy(model)"
        ) from error
    if vocabulary is not None and found != vocabulary:
        raise ValueError(_another_vocabulary(found, vocabulary))


def _another_vocabulary(found: int, vocabulary: int) -> str:
    return (
        f"reference must be of the model's own vocabulary, V = {vocabulary}, got logits of {found} tokens: pass a copy "
        "of the model from before the edit, or its logits"
    )
