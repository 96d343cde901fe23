"""Which Trainer is calling: neither a model nor a loss function is told, but the call stack knows.

A Trainer can take the labels out of a batch before the model sees them, smooth them itself, and count tokens that a
mask leaves out. Only the Trainer knows, and it passes nothing on, hence the look at the frames that called.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch import nn


def calling_frames() -> Iterator[FrameType]:
    """The frames that called the function which asks, innermost first."""
    frame = sys._getframe(1)
    while frame := frame.f_back:  # type: ignore[assignment]
        yield frame


def calling_trainer(*functions: str) -> tuple[Any, dict[str, Any]] | None:
    """The Trainer in whose method of one of these names we are, and that method's variables; or None."""
    module = sys.modules.get("transformers.trainer")
    if module is None:
        return None
    for frame in calling_frames():
        # A frame's variables, once looked at, live as long as it does: look at no more frames than needed.
        if frame.f_code.co_name in functions:
            variables = frame.f_locals
            if isinstance(variables.get("self"), module.Trainer):
                return variables["self"], variables
    return None


def smooths_labels(trainer: Any) -> str | None:
    """What is wrong with a Trainer that smooths labels itself, or None."""
    if getattr(trainer, "label_smoother", None) is None:
        return None
    return (
        f"label_smoothing_factor must be 0, got {trainer.args.label_smoothing_factor} in {type(trainer).__name__}: it "
        "is another loss in the place of this one, which smooths each target adaptively (lam)"
    )


def trains(trainer: Any, model: nn.Module) -> bool:
    """Whether the model is the trainer's, or within the trainer's."""
    return any(module is model for module in trainer.model.modules())


def items_that_count(num_items_in_batch: Any, batch: dict[str, Any]) -> Any:
    """What to divide by: where a Trainer has counted a step's tokens, without those that a loss_mask leaves out.

    Args:
        num_items_in_batch: what the Trainer passed.
        batch: this call's "labels" or "shift_labels", and "loss_mask".
    """
    if num_items_in_batch is None or batch.get("loss_mask") is None:
        return num_items_in_batch
    found = calling_trainer("compute_loss")
    if found is None:
        return num_items_in_batch
    trainer = found[0]
    batches = next((f.f_locals["batch_samples"] for f in calling_frames() if _holds_batches(f, trainer)), [batch])
    batches = [_without_masked_labels(one) for one in batches]
    # The trainer's own way of counting, over processes too; older ones are not told the device.
    arguments = iter(batches), len(batches), trainer.args.device
    return trainer.get_batch_samples(*arguments[: len(inspect.signature(trainer.get_batch_samples).parameters)])[1]


def _holds_batches(frame: FrameType, trainer: Any) -> bool:
    return (
        "batch_samples" in frame.f_code.co_varnames
        and frame.f_locals.get("self") is trainer
        and "batch_samples" in frame.f_locals
    )


def _without_masked_labels(batch: dict[str, Any]) -> dict[str, Any]:
    mask = batch.get("loss_mask")
    if mask is None:
        return batch
    labels = {name: batch[name] for name in ("labels", "shift_labels") if batch.get(name) is not None}
    return {**batch, **{name: values.masked_fill(mask == 0, -100) for name, values in labels.items()}}
