"""Putting the loss where a Hugging Face model computes its own, and taking it away again."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from overtone.config import OverToneConfig
from overtone.huggingface.fused_head import FusedHead, refuse_unfusable_model
from overtone.huggingface.loss import Observer, causal_lm_loss, causal_lm_loss_of_hidden, checked_config
from overtone.huggingface.verification import (
    find_causal_lm,
    note_call,
    refuse_bypassed_call,
    refuse_unsupported_model,
    verify_loss_is_called,
)

LossFunction = Callable[..., Tensor]

_SLOT = "_loss_function"
_RECORD = "_overtone_attachments"


@dataclass(frozen=True, eq=False)
class _CausalLMLoss:
    """What the slot holds: callable as transformers' `ForCausalLMLoss`, and picklable with the model, as a closure is
    not. (A module would be ignored by transformers.)"""

    config: OverToneConfig
    observer: Observer | None
    fused_head: FusedHead | None

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int | None = None,
        num_items_in_batch: int | Tensor | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        note_call()
        arguments: dict[str, Any] = {
            "num_items_in_batch": num_items_in_batch,
            "shift_labels": shift_labels,
            "loss_mask": loss_mask,
            "ignore_index": ignore_index,
        }
        diverted = None if self.fused_head is None else self.fused_head.take(logits)
        if diverted is not None:
            return causal_lm_loss_of_hidden(*diverted, labels, self.config, **arguments)
        return causal_lm_loss(logits, labels, self.config, observer=self.observer, **arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> _CausalLMLoss:
        """With the same observer, as a function would have: a copy of the model reports to it too."""
        return _CausalLMLoss(self.config, self.observer, copy.deepcopy(self.fused_head, memo))


@dataclass
class _Layer:
    """One attached loss, and what the slot held before: {} for transformers' default, so that nothing is left."""

    function: _CausalLMLoss
    replaced: dict[str, LossFunction]


@dataclass
class _Record:
    """The attached losses of a model, oldest first, the guard that watches its forward, and what the fused ones share;
    kept on the model itself, so that a deep copy of the model has its own."""

    guard: RemovableHandle
    fused_head: FusedHead | None = None
    layers: list[_Layer] = field(default_factory=list)


class Attachment:
    """What `attach` returns: the loss is on the model until `detach`, or until the end of its ``with`` block.

    Attributes:
        model: the Hugging Face model that computes the loss, found inside the wrappers.
        config: the settings of the loss.
    """

    def __init__(self, model: nn.Module, config: OverToneConfig, function: _CausalLMLoss) -> None:
        self.model = model
        self.config = config
        self._function = function

    def detach(self) -> None:
        """Put back what the model computed before; in any order among several attachments, and harmless if repeated.

        A loss that someone else has assigned on top of this one is left in its place, with a warning.
        """
        for layer in _layers(self.model):
            if layer.function is self._function:
                _remove_layer(self.model, layer)

    def __enter__(self) -> Attachment:
        """The attachment itself; the loss is already on the model."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Detach."""
        self.detach()

    def __repr__(self) -> str:
        """The model, the settings and whether the loss is still attached."""
        attached = any(layer.function is self._function for layer in _layers(self.model))
        return f"Attachment({type(self.model).__name__}, {self.config}, attached={attached})"


def attach(
    model: nn.Module,
    config: OverToneConfig | None = None,
    *,
    observer: Observer | None = None,
    fused: bool = False,
) -> Attachment:
    """Make ``model(..., labels=labels).loss`` the OverTone loss, until it is detached.

    The Hugging Face model inside PEFT, DDP, FSDP and torch.compile wrappers is the one that changes: its
    ``loss_function``, and nothing else of it. Its forward then also takes a ``loss_mask``, see `causal_lm_loss`, and
    adds the auxiliary loss of a mixture of experts as before. Generation is not touched.

    Args:
        model: a causal language model, bare or wrapped.
        config: the settings of the loss; None for the defaults. With its hold_settled, train in bf16 or float32: in
            a held step under float16 torch's GradScaler raises an AssertionError, since it finds no gradients.
        observer: called with logits and next tokens in every training step; ``TokenStatesCallback(...).observe``, say.
        fused: compute the loss from the hidden states, a chunk of logits at a time (`overtone.linear_overtone_loss`),
            in every forward with labels while gradients are enabled. The logits of its outputs are then None. Without
            labels, and under ``torch.no_grad()`` as in a Trainer's evaluation, they are there as ever.

    Returns:
        A handle with ``detach()``, which is also a context manager.

    Raises:
        TypeError: if there is no Hugging Face model inside, or config is not an OverToneConfig.
        ValueError: if the model would not call the loss: its forward computes its loss another way, it is not a causal
            language model, or Liger's fused loss is on it. One forward of two tokens finds out (not where parameters
            are sharded or not loaded; there the first training step does). With fused=True also if the logits are not
            those of a plain ``torch.nn.Linear`` (soft-capping, a scale, PEFT or quantisation on the output layer), if
            parameters are sharded or not loaded, or for an observer. Nothing has changed then.
        RuntimeError: later, from a training step whose loss was computed by something else: Liger's or TRL's fused
            loss, put on the model after `attach`; or whose output layer is no longer one that can be fused.
    """
    config = checked_config(config)
    causal_lm = find_causal_lm(model)
    refuse_unsupported_model(causal_lm)
    verify_loss_is_called(causal_lm, inside=model)
    if fused:
        if observer is not None:
            raise ValueError("observer must be None with fused=True, which makes no logits that it could be shown")
        refuse_unfusable_model(causal_lm, inside=model)

    record = causal_lm.__dict__.get(_RECORD)
    if record is None:
        guard = causal_lm.register_forward_hook(refuse_bypassed_call, with_kwargs=True, always_call=True)
        record = _Record(guard)
        setattr(causal_lm, _RECORD, record)
    if fused and record.fused_head is None:
        record.fused_head = FusedHead(causal_lm)
    function = _CausalLMLoss(config, observer, record.fused_head if fused else None)
    replaced = {_SLOT: causal_lm.__dict__[_SLOT]} if _SLOT in causal_lm.__dict__ else {}
    record.layers.append(_Layer(function, replaced))
    causal_lm.loss_function = function
    return Attachment(causal_lm, config, function)


def detach(model: nn.Module) -> None:
    """Take every attached loss off a model, bare or wrapped: for a deep copy, say, which has no handle of its own."""
    causal_lm = find_causal_lm(model)
    for layer in reversed(_layers(causal_lm)):
        _remove_layer(causal_lm, layer)


def _layers(model: nn.Module) -> list[_Layer]:
    record: _Record | None = model.__dict__.get(_RECORD)
    return list(record.layers) if record else []


def _remove_layer(model: nn.Module, layer: _Layer) -> None:
    record: _Record = model.__dict__[_RECORD]
    position = record.layers.index(layer)
    above = record.layers[position + 1] if position + 1 < len(record.layers) else None
    if above is not None and above.replaced.get(_SLOT) is layer.function:
        above.replaced = layer.replaced
    elif above is None and model.__dict__.get(_SLOT) is layer.function:
        delattr(model, _SLOT)
        model.__dict__.update(layer.replaced)
    else:
        warnings.warn(
            f"loss_function of {type(model).__name__} was assigned by something else after attach; that stays, "
            "and calls the attached loss if it wraps it",
            stacklevel=3,
        )
    record.layers.remove(layer)
    if record.fused_head is not None and all(other.function.fused_head is None for other in record.layers):
        record.fused_head.remove()
        record.fused_head = None
    if not record.layers:
        record.guard.remove()
        delattr(model, _RECORD)
