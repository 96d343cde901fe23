"""The arguments hold_settled and hold_correct, which are now one argument, hold: they mean what they meant."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from overtone.hold import HoldValue, read_hold

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
OLD_NAMES = ("hold_settled", "hold_correct")


def old_values(value: HoldValue) -> dict[str, bool | float]:
    """What hold was called when it was two arguments."""
    hold = read_hold(value)
    if not hold:
        return {"hold_settled": False, "hold_correct": False}
    first = True if hold.settled else math.inf if hold.mean is None else hold.mean
    return {"hold_settled": first, "hold_correct": hold.correct}


def replace_old_names(hold: HoldValue, old: dict[str, object]) -> HoldValue:
    """What the arguments hold_settled and hold_correct say, in their places in hold.

    Args:
        hold: what they do not say.
        old: those of the two that were given. hold_settled is True, False, a number, or math.inf to leave it to
            hold_correct; hold_correct is True or False.

    Raises:
        ValueError, TypeError: for values that they did not take.
    """
    first, correct = {**old_values(hold), **old}.values()
    if not isinstance(correct, bool):
        raise TypeError(f"hold_correct must be True or False, got {correct!r} of type {type(correct).__name__}")
    if not isinstance(first, (bool, int, float)):
        raise TypeError(f"hold_settled must be True, False or a number, got {first!r} of type {type(first).__name__}")
    if first is False:
        if old.get("hold_correct"):
            warnings.warn("hold_correct=True does nothing without a hold: pass hold='correct'", stacklevel=3)
        return None
    if first == math.inf and correct:
        return "correct"
    if first is not True and not 0 < first < math.inf:
        raise ValueError(f"hold_settled must be True, False or a number of nats above 0, got {first!r}")
    word = "settled" if first is True else first
    return ("correct", word) if correct else word


def accepts_old_names(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function with an argument hold that still takes hold_settled and hold_correct, with a DeprecationWarning."""

    names = inspect.signature(function).parameters

    @wraps(function)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if "hold_settled" in kwargs or "hold_correct" in kwargs:
            old = {name: kwargs.pop(name) for name in OLD_NAMES if name in kwargs}
            # Settings of which a part is changed (a preset, dataclasses.replace) come with both.
            if kwargs.get("hold") is not None and "self" not in names:
                raise ValueError(f"hold and {next(iter(old))} are both given: keep hold alone, got {kwargs['hold']!r}")
            hold = replace_old_names(kwargs.get("hold"), old)  # type: ignore[arg-type]
            said = ", ".join(f"{name}={value!r}" for name, value in old.items())
            warnings.warn(f"{said} is now called hold={hold!r}", DeprecationWarning, stacklevel=2)
            kwargs["hold"] = hold
        return function(*args, **kwargs)

    return wrapped
