"""Putting the loss where a Hugging Face model computes its own, and taking it away again."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from overtone.config import OverToneConfig, checked_config
from overtone.hold import check_hold_group
from overtone.huggingface.attached_loss import AttachedLoss
from overtone.huggingface.calls import Calls
from overtone.huggingface.forward import RECORD, WatchedForward, unwatch, watch
from overtone.huggingface.fused_head import FusedHead, refuse_unfusable_model, spreads_vocabulary
from overtone.huggingface.holding import cut_off_added_terms
from overtone.huggingface.loss import EvalLoss, Observer, check_eval_loss, check_observer
from overtone.huggingface.reference import Reference, check_reference
from overtone.huggingface.verification import find_causal_lm, refuse_unsupported_model, verify_loss_is_called
from overtone.huggingface.wrappers import keeps_forward_of, peft_wrappers, refuse_replaced_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LossFunction = Callable[..., Tensor]

_SLOT = "_loss_function"

logger = logging.getLogger(__name__)


@dataclass
class _Layer:
    """One attached loss, and what the slot held before: {} for transformers' default, so that nothing is left."""

    function: AttachedLoss
    replaced: dict[str, LossFunction]


@dataclass
class Record:
    """What is attached to a model, oldest first; kept on the model itself, so that a deep copy of it has its own.

    Attributes:
        calls: the forwards that are running.
        position_of_labels: of the forward's arguments, for callers that do not name them.
        wrapper_hooks: on PEFT's modules around the model.
        keepers: those of them that hold the model's forward as their own.
        fused_head: what the fused losses share.
        layers: the losses.
    """

    calls: Calls
    position_of_labels: int
    wrapper_hooks: list[RemovableHandle] = field(default_factory=list)
    keepers: list[nn.Module] = field(default_factory=list)
    fused_head: FusedHead | None = None
    layers: list[_Layer] = field(default_factory=list)

    def of_copy(self) -> Record:
        """For a shallow copy of the model, which shares its modules, and around which there is no wrapper."""
        if self.fused_head is not None:
            self.fused_head.share()
        return replace(self, wrapper_hooks=[], keepers=[], layers=[replace(layer) for layer in self.layers])

    def __getstate__(self) -> dict[str, Any]:
        """Without the hooks of wrappers that are gone, which torch cannot copy."""
        alive = [handle for handle in self.wrapper_hooks if handle.hooks_dict_ref() is not None]
        return {**self.__dict__, "wrapper_hooks": alive}

    @property
    def can_be_held(self) -> bool:
        """Whether the newest loss may hold a step."""
        return self.layers[-1].function.config.hold is not None

    @property
    def has_anchors(self) -> bool:
        """Whether any loss measures a batch against an unedited model."""
        return any(layer.function.config.anchor for layer in self.layers)


class Attachment:
    """What `attach` returns: the loss is on the model until `detach`, or until the end of its ``with`` block.

    Attributes:
        model: the Hugging Face model that computes the loss, found inside the wrappers.
        config: the settings of the loss.
    """

    def __init__(self, model: nn.Module, config: OverToneConfig, function: AttachedLoss) -> None:
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
    fused: bool | None = None,
    eval_loss: EvalLoss = "cross_entropy",
    hold_group: ProcessGroup | None = None,
    reference: Reference | None = None,
    anchor_top_k: int | None = None,
) -> Attachment:
    """Make ``model(..., labels=labels).loss`` the OverTone loss, until it is detached.

    The Hugging Face model inside PEFT, DDP, FSDP and torch.compile wrappers is the one that changes: its
    ``loss_function``, and its class, to one of the same name in which every forward is watched, however it is called.
    Its forward then also takes a ``loss_mask``, see `causal_lm_loss`, and adds the auxiliary loss of a mixture of
    experts as before. Generation is not touched.

    A step that the config's hold holds is held as a whole: the router loss of a mixture of experts and what PEFT's
    AdaLoRA and Shadow add keep their value and give no gradient either.

    Args:
        model: a causal language model, bare or wrapped.
        config: the settings of the loss; None for the defaults. With a hold, train in bf16 or float32: in a held step
            under float16 on a GPU torch's GradScaler raises an AssertionError, since it finds no gradients.
        observer: called with logits and next tokens in every training step; ``TokenStatesCallback(...).observe``, say.
        fused: compute the loss from the hidden states, a chunk of logits at a time (`overtone.linear_overtone_loss`),
            in every forward with labels by name while gradients are enabled. The logits of its outputs are then None.
            Without labels, and under ``torch.no_grad()`` as in a Trainer's evaluation, they are there as ever. None:
            where tensor parallelism spreads the output layer over ranks, so that no rank makes all the logits.
        eval_loss: what the loss is while gradients are disabled: "cross_entropy", so that an evaluation can be
            compared and its exponential is a perplexity, or "overtone", which training without gradients needs (MeZO).
        hold_group: the ranks of torch.distributed that hold together, all or none, each of which has to make the call;
            None for all there are.
        reference: the unedited model, for a config with an anchor, and only for one. "adapter": this model without its
            PEFT adapters. A model: one that is called with the same arguments, and does not change. "logits": each
            training step gives ``reference_logits`` ``(batch, sequence, V)`` beside the labels. The unedited model is
            run once a batch, in evaluation mode and without gradients.
        anchor_top_k: keep only that many tokens of each of its distributions, and the others as one; see
            `overtone.Anchors`. None keeps them all.

    Returns:
        A handle with ``detach()``, which is also a context manager.

    Raises:
        TypeError: if there is no Hugging Face model inside, or for a config, observer, fused or hold_group of another
            type.
        ValueError: if the model would not call the loss: its forward computes its loss another way, it is not a causal
            language model, a Liger without ``skip_logits`` is on it, or PEFT's CPT around it. One forward of two tokens
            finds out (not where parameters are sharded or not loaded; there the first training step does). With
            fused=True also if the logits are not those of a plain ``torch.nn.Linear`` (soft-capping, a scale, PEFT or
            quantisation on the output layer), if parameters are sharded or not loaded, or for an observer. With
            an anchor if there is no reference, if it changes with what is trained or has another vocabulary, with
            prompt learning or a vocabulary spread over ranks. Nothing has changed then.
            Later, from a Trainer that computes another loss: label_smoothing_factor, a compute_loss_func.
        RuntimeError: later, from a training step whose loss was computed by something else: TRL's fused loss, put
            on the model after `attach`, or a Trainer that keeps the labels to itself; or whose output layer is no
            longer one that can be fused.
    """
    config = checked_config(config)
    check_eval_loss(eval_loss)
    check_observer(observer)
    check_hold_group(hold_group)
    if fused is not None and not isinstance(fused, bool):
        raise TypeError(
            f"fused must be True, False or None, got {fused!r} of type {type(fused).__name__}; leave it out"
        )
    causal_lm = find_causal_lm(model)
    refuse_unsupported_model(causal_lm)
    wrappers = list(peft_wrappers(model, causal_lm))
    for wrapper in wrappers:
        refuse_replaced_loss(wrapper)
    verify_loss_is_called(causal_lm, inside=model)
    if fused is None:
        fused = observer is None and spreads_vocabulary(causal_lm)
    if fused:
        if observer is not None:
            raise ValueError("observer must be None with fused=True, which makes no logits that it could be shown")
        refuse_unfusable_model(causal_lm, inside=model)
    check_reference(reference, config, anchor_top_k, inside=model, causal_lm=causal_lm)

    record = causal_lm.__dict__.get(RECORD)
    if record is None:
        parameters = list(inspect.signature(causal_lm.forward).parameters)
        record = Record(Calls(), parameters.index("labels") if "labels" in parameters else len(parameters))
        watch(causal_lm)
        setattr(causal_lm, RECORD, record)
    for wrapper in wrappers:
        if cut_off_added_terms not in wrapper._forward_hooks.values():
            record.wrapper_hooks.append(wrapper.register_forward_hook(cut_off_added_terms))
        if keeps_forward_of(causal_lm, wrapper):
            wrapper.forward = WatchedForward(causal_lm, wrapper.__dict__["forward"])
            record.keepers.append(wrapper)
    if fused and record.fused_head is None:
        record.fused_head = FusedHead(causal_lm, record.calls)
    function = AttachedLoss(
        config,
        observer,
        record.calls,
        record.fused_head if fused else None,
        eval_loss,
        hold_group,
        reference,
        anchor_top_k,
    )
    replaced = {_SLOT: causal_lm.__dict__[_SLOT]} if _SLOT in causal_lm.__dict__ else {}
    record.layers.append(_Layer(function, replaced))
    causal_lm.loss_function = function
    logger.info(
        "The loss of %s is OverTone's while gradients are enabled, and %s otherwise (eval_loss=%r)",
        type(causal_lm).__name__,
        "cross-entropy" if eval_loss == "cross_entropy" else "OverTone's too",
        eval_loss,
    )
    return Attachment(causal_lm, config, function)


def detach(model: nn.Module) -> None:
    """Take every attached loss off a model, bare or wrapped: for a deep copy, say, which has no handle of its own."""
    causal_lm = find_causal_lm(model)
    for layer in reversed(_layers(causal_lm)):
        _remove_layer(causal_lm, layer)


def _layers(model: nn.Module) -> list[_Layer]:
    record: Record | None = model.__dict__.get(RECORD)
    return list(record.layers) if record else []


def _remove_layer(model: nn.Module, layer: _Layer) -> None:
    record: Record = model.__dict__[RECORD]
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
        record.fused_head.leave()
        record.fused_head = None
    if not record.layers:
        for handle in record.wrapper_hooks:
            handle.remove()
        for keeper in record.keepers:
            if isinstance(keeper.forward, WatchedForward):
                keeper.forward = keeper.forward.forward
        delattr(model, RECORD)
        unwatch(model)
