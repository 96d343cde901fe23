"""The forward of an attached model, watched however it is called.

Hooks run when a model is called, not when its ``forward`` is, as some PEFT tuners do; and a wrapper put around
``forward`` is gone once someone assigns another one. So an attached model's class becomes a subclass of its own, of
the same name, in which ``forward`` is a descriptor: whatever is assigned there is watched.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from overtone.huggingface.calls import Call
from overtone.huggingface.holding import cut_off_added_terms, cut_off_output
from overtone.huggingface.reference import Batch
from overtone.huggingface.trainers import calling_frames, calling_trainer, items_that_count, smooths_labels, trains
from overtone.huggingface.verification import WAY_OUT, bypassing_loss, can_be_asked_for_logits
from overtone.huggingface.wrappers import added_loss, for_virtual_tokens, refuse_replaced_loss

if TYPE_CHECKING:
    from overtone.huggingface.attachment import Record

RECORD = "_overtone_attachments"
OF_THE_ANCHOR = frozenset(("reference_logits", "anchor_groups"))
"""Arguments that no model takes."""


class WatchedForward:
    """A model's forward, called as it is; without attachments it does nothing else."""

    def __init__(self, model: nn.Module, forward: Callable[..., Any]) -> None:
        self.model = model
        self.forward = forward

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """For `inspect.signature`, by which Trainer learns what the model takes."""
        return self.forward

    @property
    def __code__(self) -> CodeType:
        """For `torch.export`, which notes where a model's forward is written."""
        code: CodeType = inspect.unwrap(self.forward).__code__
        return code

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward, and a look at whether its loss was the attached one."""
        record: Record | None = self.model.__dict__.get(RECORD)
        if record is None:
            return self.forward(*args, **kwargs)
        labels = kwargs.get("labels", kwargs.get("shift_labels"))
        if labels is None and len(args) > record.position_of_labels:
            labels = args[record.position_of_labels]
        is_trained = torch.is_grad_enabled()
        if is_trained and not torch.compiler.is_compiling():
            _refuse_callers(self.model, record, has_labels=labels is not None)
        elif is_trained and labels is None and self.model.training:
            _refuse_callers_outside_the_graph(self.model, record, has_labels=False)
        if kwargs.get("loss_mask") is not None:
            kwargs = _with_whole_mask(kwargs)
        if labels is not None and can_be_asked_for_logits(self.forward):
            kwargs = {**kwargs, "skip_logits": False}

        call = Call(outer=record.calls.current)
        if record.has_anchors or not OF_THE_ANCHOR.isdisjoint(kwargs):
            kwargs = _take_batch(call, record, self, args, kwargs)
        record.calls.current = call
        try:
            if record.fused_head is not None:
                record.fused_head.begin(self.model, call, kwargs)
            output = self.forward(*args, **kwargs)
        finally:
            record.calls.current = call.outer
        if call.empty_logits is not None:
            output = _without_logits(output, call)

        if call.outer is not None:
            call.outer.has_asked |= call.has_asked
            call.outer.is_held |= call.is_held
        elif is_trained and labels is not None and not call.has_asked and _has_loss(output):
            culprit = bypassing_loss(self.model, kwargs) or "a forward that does not call self.loss_function"
            raise RuntimeError(
                f"the loss attached to {type(self.model).__name__} was bypassed by {culprit}; detach it and {WAY_OUT}"
            )
        elif call.is_held and _has_loss(output):
            output = cut_off_output(output)
        return output


class _ForwardSlot:
    """``model.forward`` of an attached model; what is assigned is kept where it would be without this."""

    def __set_name__(self, owner: Any, name: str) -> None:
        self.owner = owner

    def __get__(self, model: Any, owner: Any) -> Any:
        if model is None:
            return self._of_the_class(owner)
        return WatchedForward(model, model.__dict__.get("forward") or self._of_the_class(model))

    def __set__(self, model: Any, forward: Callable[..., Any]) -> None:
        while isinstance(forward, WatchedForward) and forward.model is model:
            forward = forward.forward
        if forward == self._of_the_class(model):
            model.__dict__.pop("forward", None)
        else:
            model.__dict__["forward"] = forward

    def __delete__(self, model: Any) -> None:
        try:
            del model.__dict__["forward"]
        except KeyError:
            raise AttributeError("forward") from None

    def _of_the_class(self, model_or_class: Any) -> Callable[..., Any]:
        forward: Callable[..., Any] = getattr(super(self.owner, model_or_class), "forward")  # noqa: B009
        return forward


def watch(model: nn.Module) -> None:
    """Give an unwatched model the class in which its forward is watched."""
    kind: Any = type(model)
    if not any(isinstance(one.__dict__.get("forward"), _ForwardSlot) for one in kind.__mro__):
        model.__class__ = _watched_class(kind)


def unwatch(model: nn.Module) -> None:
    """Give a model its own class back; where another one was put on top (FSDP's), that stays and nothing is watched."""
    slot = type(model).__dict__.get("forward")
    if isinstance(slot, _ForwardSlot):
        model.__class__ = type(model).__bases__[0]


@functools.cache
def _watched_class(base: Any) -> Any:
    def train(self: Any, mode: bool = True) -> Any:
        # Trainer calls it in every step, in compiled models too, where nobody could look at the stack later.
        found = calling_trainer("training_step", "evaluation_loop")
        if RECORD in self.__dict__ and found is not None and trains(found[0], self):
            _refuse_trainer(self, found[0])
        return super(watched, self).train(mode)

    def reduce(self: Any, protocol: Any) -> Any:
        return _rebuild, (base,), self.__dict__

    def copied(self: Any) -> Any:
        copy = _rebuild(base)
        copy.__dict__.update(self.__dict__)
        if RECORD in self.__dict__:
            copy.__dict__[RECORD] = self.__dict__[RECORD].of_copy()
        return copy

    watched: Any = type(
        base.__name__,
        (base,),
        {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "__reduce_ex__": reduce,
            "__copy__": copied,
            "forward": _ForwardSlot(),
            "train": train,
        },
    )
    return watched


def _rebuild(base: Any) -> Any:
    watched = _watched_class(base)
    return watched.__new__(watched)


def _refuse_trainer(model: nn.Module, trainer: Any) -> None:
    from overtone.huggingface.outputs import ComputeLoss

    if isinstance(trainer.compute_loss_func, ComputeLoss):
        return
    if problem := smooths_labels(trainer):
        raise ValueError(f"{problem}; pass label_smoothing_factor=0, or detach the loss from {type(model).__name__}")
    if trainer.compute_loss_func is not None:
        raise ValueError(
            f"compute_loss_func={trainer.compute_loss_func!r} takes the place of the loss attached to "
            f"{type(model).__name__}; leave it out, or detach"
        )


def _refuse_callers(model: nn.Module, record: Record, *, has_labels: bool) -> None:
    """Raise an error where what called this forward uses another loss than the attached one, or adds to a held one."""
    if not has_labels:
        found = calling_trainer("compute_loss")
        if found is not None and trains(found[0], model):
            _refuse_trainer(model, found[0])
            if found[0].compute_loss_func is None:
                raise RuntimeError(
                    f"{type(found[0]).__name__} calls {type(model).__name__} without labels, and so trains on a loss "
                    "of its own, not on the attached one; detach it, or pass the labels to the model"
                )
        return
    wrappers = [
        frame.f_locals.get("self")
        for frame in calling_frames()
        if frame.f_code.co_name in ("forward", "_cpt_forward") and frame.f_globals["__name__"].startswith("peft.")
    ]
    for wrapper in wrappers:
        refuse_replaced_loss(wrapper)
        if record.can_be_held:
            _refuse_unheld_terms(wrapper, model, outermost=wrappers[-1])


# Callers cannot be seen from inside a graph, so it breaks here: only where a model is trained without labels.
_refuse_callers_outside_the_graph = torch.compiler.disable(_refuse_callers)


def _refuse_unheld_terms(wrapper: Any, model: nn.Module, outermost: Any) -> None:
    """Raise a ValueError for a wrapper that adds to the loss unseen; the outermost one is what its user has."""
    is_hooked = any(hook is cut_off_added_terms for hook in wrapper._forward_hooks.values())
    if not is_hooked and (culprit := added_loss(wrapper)):
        raise ValueError(
            f"a held step would not hold {culprit}: attach to the {type(outermost).__name__}, "
            f"not to the {type(model).__name__} that it wraps"
        )


def _with_whole_mask(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with a loss_mask as long as the labels, and a number of tokens without those that it leaves out."""
    mask = inputs["loss_mask"]
    labels = inputs.get("labels") if inputs.get("shift_labels") is None else inputs["shift_labels"]
    if labels is None or not isinstance(mask, torch.Tensor):
        return inputs
    added = labels.shape[-1] - mask.shape[-1]
    # PEFT's prompt tuning puts embeddings before the user's, with labels that are ignored.
    if added > 0 and inputs.get("inputs_embeds") is not None and (labels[..., :added] == -100).all():
        inputs = {**inputs, "loss_mask": for_virtual_tokens(mask, labels.shape[-1], 0)}
    number = inputs.get("num_items_in_batch")
    if number is not None:
        inputs = {**inputs, "num_items_in_batch": _items_that_count(number, inputs)}
    return inputs


_items_that_count = torch.compiler.disable(items_that_count)


def _take_batch(
    call: Call, record: Record, forward: WatchedForward, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Keep for anchors what a forward is called with; the arguments without those of the anchor."""
    given = {name: kwargs[name] for name in OF_THE_ANCHOR if kwargs.get(name) is not None}
    if "reference_logits" in given and all(layer.function.reference != "logits" for layer in record.layers):
        raise ValueError(
            f"reference_logits must be None for {type(forward.model).__name__}: its loss is not attached with "
            "reference='logits'"
        )
    if "anchor_groups" in given and not record.layers[-1].function.config.anchor:
        raise ValueError(
            f"anchor_groups must be None for {type(forward.model).__name__}: its loss is not attached with an anchor"
        )
    kwargs = {name: value for name, value in kwargs.items() if name not in OF_THE_ANCHOR}
    if call.outer is not None and call.outer.batch is not None:
        outer = call.outer.batch
        given = {name: getattr(outer, name) for name in OF_THE_ANCHOR} | given
    call.batch = Batch(forward.model, forward.forward, args, kwargs, **given)
    return kwargs


def _has_loss(output: Any) -> bool:
    # With return_dict=False the loss has no name, but comes with the labels as ever.
    return isinstance(output, tuple) or getattr(output, "loss", None) is not None


def _without_logits(output: Any, call: Call) -> Any:
    if isinstance(output, tuple):
        return tuple(None if item is call.empty_logits else item for item in output)
    return dataclasses.replace(output, logits=None)
