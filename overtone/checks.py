"""What every version of the loss promises alike: its argument checks, its shapes and its reductions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

Reduction = Literal["none", "mean", "sum"]
REDUCTIONS = get_args(Reduction)

INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_hyperparameters(epsilon: float, n_sigma: float | None, lam: float, check: bool) -> None:
    """Raise a ValueError or TypeError that names the argument, its value and what was expected."""
    check_number("epsilon", epsilon, "a finite number of nats, 0 or above", lambda value: value >= 0)
    if n_sigma is not None:
        check_number("n_sigma", n_sigma, "a finite number above 0, or None for no filter", lambda value: value > 0)
    check_number("lam", lam, "a number in [0, 1]", lambda value: 0 <= value <= 1)
    if not isinstance(check, bool):
        raise TypeError(f"check must be True or False, got {check!r} of type {type(check).__name__}")


def check_anchor(anchor: float, anchor_epsilon: float) -> None:
    """Raise a ValueError or TypeError that names the argument, its value and what was expected."""
    check_number("anchor", anchor, "a finite number, 0 or above", lambda value: value >= 0)
    check_number("anchor_epsilon", anchor_epsilon, "a finite number of nats, 0 or above", lambda value: value >= 0)


def check_reduction(reduction: str, ignore_index: int) -> None:
    """Raise a ValueError or TypeError unless both are what CrossEntropyLoss takes."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(
            f"ignore_index must be an integer label, got {ignore_index!r} of type {type(ignore_index).__name__}"
        )
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must be a label as int64 holds them, got {ignore_index}")


def check_number(name: str, value: object, expected: str, accepted: Callable[[float], bool]) -> None:
    """Raise a ValueError or TypeError unless the value is a finite number that is accepted."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"{name} must be {expected}, got {value!r} of type {type(value).__name__}; pass a Python number"
        )
    # Not math.isfinite, which torch.compile cannot trace once a second value has made a setting symbolic; and a Python
    # integer can be finite and yet no float.
    if not -sys.float_info.max <= value <= sys.float_info.max or not accepted(value):
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def check_tensors(
    logits: Tensor, labels: Tensor, reference_logits: Tensor | None = None, *, may_be_empty: bool = False
) -> None:
    """Raise a ValueError or TypeError unless logits are ``(..., V)`` floats and labels ``(...)`` integers.

    Args:
        logits, labels, reference_logits: as in `overtone.overtone_loss`.
        may_be_empty: V may be 0, of a rank that has no part of the vocabulary.
    """
    for name, value in (("logits", logits), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating point, got {logits.dtype}: pass the model's raw scores")
    if labels.dtype not in INTEGER_DTYPES:
        raise ValueError(f"labels must be integer token ids, got {labels.dtype}: class probabilities are not supported")
    if logits.dim() == 0 or logits.shape[:-1] != labels.shape:
        raise ValueError(_shape_message(logits, labels))
    if logits.shape[-1] == 0 and not may_be_empty:
        raise ValueError(f"logits must have a vocabulary in their last dimension, got shape {tuple(logits.shape)}")
    if logits.device != labels.device:
        raise ValueError(f"labels must be on the device of logits ({logits.device}), got {labels.device}")
    if reference_logits is not None:
        check_reference(logits, reference_logits)


def check_layer(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise a ValueError unless an output layer's weight ``(V, H)`` and bias ``(V,)`` fit hidden ``(..., H)``."""
    if weight.dim() != 2 or hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            "weight must be (V, H) for hidden (..., H), "
            f"got weight {tuple(weight.shape)} for hidden {tuple(hidden.shape)}"
        )
    if hidden.shape[-1] == 0:
        raise ValueError(f"hidden must have features in its last dimension, got shape {tuple(hidden.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({len(weight)},) for weight {tuple(weight.shape)}, got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype != hidden.dtype or tensor.device != hidden.device):
            raise ValueError(
                f"{name} must be {hidden.dtype} on {hidden.device} like hidden, got {tensor.dtype} on {tensor.device}"
            )


def check_reference(logits: Tensor, reference_logits: Tensor) -> None:
    """Raise a ValueError or TypeError unless the unedited model's logits match the edited model's."""
    if not isinstance(reference_logits, Tensor):
        raise TypeError(f"reference_logits must be a torch.Tensor or None, got {type(reference_logits).__name__}")
    if reference_logits.shape != logits.shape:
        raise ValueError(
            f"reference_logits must have the shape of logits {tuple(logits.shape)}, got {tuple(reference_logits.shape)}"
        )
    if not reference_logits.is_floating_point() or reference_logits.device != logits.device:
        raise ValueError(
            f"reference_logits must be floating point on {logits.device}, "
            f"got {reference_logits.dtype} on {reference_logits.device}"
        )


def _shape_message(logits: Tensor, labels: Tensor) -> str:
    message = (
        f"labels must have the shape of logits without its last dimension: "
        f"logits (..., V) is {tuple(logits.shape)}, labels (...) is {tuple(labels.shape)}"
    )
    if logits.dim() > 2 and (logits.shape[0], *logits.shape[2:]) == tuple(labels.shape):
        message += "; the classes look second, as torch.nn.CrossEntropyLoss takes them: pass logits.movedim(1, -1)"
    return message


def check_labels(labels: Tensor, vocabulary: int, ignore_index: int | None) -> None:
    """Raise a ValueError for a label outside ``[0, V)``; reads the labels, so it costs a host synchronisation.

    Args:
        labels: ``(...)``.
        vocabulary: V.
        ignore_index: another label that is allowed; None for none.
    """
    wrong = (labels < 0) | (labels >= vocabulary)
    if ignore_index is not None:
        wrong = wrong & (labels != ignore_index)
    if wrong.any():
        allowed = "" if ignore_index is None else f" or equal ignore_index={ignore_index}"
        raise ValueError(f"labels must lie in [0, {vocabulary}){allowed}, got {labels[wrong][0].item()}")


def flatten_tokens(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """``(..., V)`` to ``(N, V)`` and ``(...)`` to ``(N,)`` int64."""
    # What is flat already stays as it is: a view of it would be a node of the graph, or time, for nothing.
    flat_logits = logits if logits.dim() == 2 else logits.reshape(labels.numel(), logits.shape[-1])
    flat_labels = labels if labels.dim() == 1 else labels.reshape(-1)
    return flat_logits, flat_labels.long()


def working_dtype(logits: Tensor) -> torch.dtype:
    """float64 for float64 logits, float32 for every other precision."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def reduce_tokens(token_loss: Tensor, counted: Tensor, reduction: Reduction) -> Tensor:
    """Reduce ``(N,)`` losses, zero where not counted, as CrossEntropyLoss does; the mean over no token is 0."""
    if reduction == "none":
        return token_loss
    # Divided first: a banned label costs as much as float32 can hold, and a sum of two would be infinite.
    return token_loss.sum() if reduction == "sum" else (token_loss / counted.sum().clamp(min=1)).sum()
