"""A model's output layer, passed by in its training steps: the loss gets the hidden states, and no logits are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from overtone.huggingface.calls import Call, Calls
from overtone.huggingface.verification import how_sharded_or_unloaded, run_on_two_tokens
from overtone.shard import as_dtensor

_SLOT = "_loss_function"


class FusedHead:
    """Gives the output layer no rows (one if it is spread over ranks) in a training step, and its input to the loss.

    It works by a hook, which is copied, pickled and removed with no trace; every method stays what it was.
    """

    def __init__(self, model: Any, calls: Calls) -> None:
        """Hook into a model that `refuse_unfusable_model` has let pass, and whose running forwards are in calls."""
        self._calls = calls
        head = model.get_output_embeddings()
        self._handle: RemovableHandle | None = head.register_forward_pre_hook(self._divert)
        self._models = 1

    def begin(self, model: Any, call: Call, inputs: dict[str, Any]) -> None:
        """Before the model's forward: expect a call of the output layer if the fused loss will be computed."""
        is_in_use = getattr(model.__dict__.get(_SLOT), "fused_head", None) is self
        if not is_in_use or inputs.get("labels") is None or not torch.is_grad_enabled():
            return
        if obstacle := _obstacle(model, model) or self._is_elsewhere(model):
            raise RuntimeError(
                f"the fused loss attached to {type(model).__name__} cannot be computed with {obstacle}; detach it and "
                "attach without fused=True"
            )
        call.expects_head = True

    def take(self, empty_logits: Tensor) -> tuple[Tensor, nn.Linear] | None:
        """Hidden states ``(batch, sequence, H)`` and output layer, for the loss; None if there are logits as ever."""
        call = self._calls.current
        if call is None or call.diverted is None:
            return None
        diverted, call.diverted = call.diverted, None
        call.empty_logits = empty_logits
        return diverted

    def divert(self, forward: Callable[..., Any], inputs: dict[str, Any]) -> tuple[Tensor, nn.Linear]:
        """What a forward of the model without labels gives its output layer, and the layer."""
        call = Call(outer=self._calls.current, expects_head=True)
        self._calls.current = call
        try:
            forward(**inputs)
        finally:
            self._calls.current = call.outer
        if call.diverted is None:
            raise RuntimeError("the forward has not called the output layer that the fused loss is attached to")
        return call.diverted

    def share(self) -> None:
        """Serve a shallow copy of the model too, which has the same output layer."""
        self._models += 1

    def leave(self) -> None:
        """Serve a model less; after the last one the hook is taken off."""
        self._models -= 1
        if self._models == 0 and self._handle is not None:
            self._handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        """For a deep copy: of one model, without the hook of an output layer that is gone, which torch cannot copy."""
        is_alive = self._handle is not None and self._handle.hooks_dict_ref() is not None
        return {**self.__dict__, "_handle": self._handle if is_alive else None, "_models": 1}

    def _divert(self, head: nn.Linear, args: tuple[Tensor]) -> tuple[Tensor] | None:
        """Before the output layer's forward: keep its input, and leave no rows of it."""
        call = self._calls.current
        if call is None or not call.expects_head:
            return None
        (hidden,) = args
        call.expects_head, call.diverted = False, (hidden, head)
        # A DTensor of no rows is more than torch can reshape.
        rows = 0 if as_dtensor(head.weight) is None else 1
        return (hidden[..., :rows, :],)

    def _is_elsewhere(self, model: Any) -> str | None:
        hooks = model.get_output_embeddings()._forward_pre_hooks.values()
        return None if self._divert in hooks else "another output layer than it was attached to"


def refuse_unfusable_model(model: Any, *, inside: nn.Module) -> None:
    """Raise a ValueError unless the logits are what a plain output layer returns; leave no trace of having run.

    A forward of two tokens, in which the output layer returns large values, finds out whether they reach the loss
    unchanged. (Small ones would pass a soft-capping with hardly a change.)
    """
    name = type(model).__name__
    way_out = "attach without fused=True"
    if obstacle := _obstacle(model, inside):
        raise ValueError(f"fused cannot be True for {name} with {obstacle}; {way_out}")
    returned: list[Tensor] = []
    reached: list[Tensor] = []

    def return_large(_: nn.Module, __: tuple[Tensor], output: Tensor) -> Tensor:
        returned.append(torch.linspace(-1e3, 1e3, output.numel()).reshape(output.shape).to(output))
        return returned[-1]

    def keep(logits: Tensor, *_: Any, **__: Any) -> Tensor:
        reached.append(logits)
        return logits.new_zeros(())

    handle = model.get_output_embeddings().register_forward_hook(return_large)
    try:
        run_on_two_tokens(model, keep)
    finally:
        handle.remove()
    if len(returned) != 1:
        raise ValueError(
            f"fused cannot be True for {name}, whose forward calls its output layer {len(returned)} times, not once; "
            f"{way_out}"
        )
    if len(reached) != 1 or not torch.equal(reached[0].float(), returned[0].float()):
        raise ValueError(
            f"fused cannot be True for {name}, which changes its logits after the output layer (soft-capping, a scale, "
            f"a slice); {way_out}"
        )


def spreads_vocabulary(model: Any) -> bool:
    """Whether tensor parallelism has given each rank a part of the output layer's tokens (transformers' tp_plan)."""
    head = model.get_output_embeddings()
    weight = as_dtensor(getattr(head, "weight", None))
    return (
        bool(getattr(model, "tp_size", None)) and weight is not None and any(p.is_shard(0) for p in weight.placements)
    )


def _obstacle(model: Any, inside: nn.Module) -> str | None:
    """What keeps the loss from computing the logits itself, or None."""
    is_spread = spreads_vocabulary(model)
    if not is_spread and (where := how_sharded_or_unloaded(inside)):
        return f"parameters that are not all here: {where}"
    if getattr(model, "_is_replica", False) or any(isinstance(m, nn.DataParallel) for m in inside.modules()):
        return "torch.nn.DataParallel, whose replicas run in threads"
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        # Its full name says whether that is PEFT's adapter or copy, a quantised layer, or none at all.
        return f"an output layer of type {type(head).__module__}.{type(head).__qualname__}, no plain torch.nn.Linear"
    if not is_spread and "forward" in head.__dict__:
        return "an output layer whose forward is replaced (by Accelerate's device_map, say)"
    hooks = (*head._forward_hooks.values(), *head._forward_pre_hooks.values())
    if any(not isinstance(getattr(hook, "__self__", None), FusedHead) for hook in hooks):
        return "forward hooks on its output layer"
    for tensor in (head.weight, head.bias):
        if not is_spread and tensor is not None and type(tensor) not in (nn.Parameter, Tensor):
            return f"an output layer whose parameters are of type {type(tensor).__name__}, no plain tensors"
    return None
