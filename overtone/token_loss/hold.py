"""When an edit needs nothing more: the value of `hold`, read and written in one way."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

HoldValue = None | str | float | tuple[str | float, ...]
"""None, "settled", "correct", a mean KL in nats, or several of them, all of which must be true."""


@dataclass(frozen=True)
class Hold:
    """The conditions, all of which must be true; none of them set: never held.

    Attributes:
        correct: every label is strictly the model's first choice.
        settled: every token is below the loss's epsilon.
        mean: the mean KL of the label tokens is at or below this many nats.
    """

    correct: bool = False
    settled: bool = False
    mean: float | None = None

    def __bool__(self) -> bool:
        """Whether there is any condition."""
        return self.correct or self.settled or self.mean is not None

    @property
    def value(self) -> HoldValue:
        """The shortest value of `hold` that says the same."""
        words = ["correct"] * self.correct + ["settled"] * self.settled
        parts: tuple[str | float, ...] = (*words, *([] if self.mean is None else [self.mean]))
        if len(parts) < 2:
            return parts[0] if parts else None
        return parts

    def __str__(self) -> str:
        """As tables and figures say it: "not held", "held", "held at 0.2", "held at the first choice and 0.2"."""
        if not self:
            return "not held"
        names = ["the first choice"] * self.correct + ["settled"] * self.settled
        names += [] if self.mean is None else [f"{self.mean:g}"]
        return "held" if names == ["settled"] else f"held at {' and '.join(names)}"

    def is_met(self, token_kl: Tensor, epsilon: float, correct: Tensor | None) -> bool:
        """Whether a call with these label tokens is held; one without any needs nothing.

        Args:
            token_kl: ``(M,)``, unclipped, in nats.
            epsilon: a token is settled below it.
            correct: ``(M,)``, bool; needed where the hold waits for it.
        """
        if not self:
            return False
        if token_kl.numel() == 0:
            return True
        met = torch.ones((), dtype=torch.bool, device=token_kl.device)
        if self.correct:
            assert correct is not None
            met = met & correct.all()
        if self.settled:
            met = met & (token_kl < epsilon).all()
        if self.mean is not None:
            met = met & (token_kl.mean() <= self.mean)
        return bool(met)


NEVER = Hold()


def read_hold(value: object) -> Hold:
    """The conditions that a value of `hold` names.

    Raises:
        ValueError: for anything but None, False, True ("settled"), a word, a number above 0, or a list of words and at
            most one number.
    """
    expected = 'none, "settled", "correct", a mean KL in nats above 0, or a list of these'
    if value is None or value is False:
        return NEVER
    parts = list(value) if isinstance(value, (list, tuple)) else [value]
    words = ["settled" if part is True else part for part in parts if part is True or part in ("settled", "correct")]
    numbers = [part for part in parts if isinstance(part, (int, float)) and not isinstance(part, bool)]
    if math.inf in numbers:
        raise ValueError(f'hold={value!r} would hold every call: give "correct", or a number of nats')
    is_known = len(words) + len(numbers) == len(parts) and all(number > 0 for number in numbers)
    if not parts or not is_known or len(numbers) > 1:
        raise ValueError(f"hold must be {expected}, got {value!r}")
    return Hold("correct" in words, "settled" in words, numbers[0] if numbers else None)


def read_old_hold(hold_settled: object, hold_correct: object) -> Hold:
    """The same conditions in the words of before: two fields, and infinity for the second one alone."""
    if not isinstance(hold_correct, bool):
        raise ValueError(f"hold_correct must be True or False, got {hold_correct!r}; write hold: correct instead")
    if not hold_correct:
        return read_hold(hold_settled)
    if hold_settled is False:
        raise ValueError("hold_correct=True holds nothing without hold_settled: write hold: correct instead")
    return read_hold("correct" if hold_settled == math.inf else ("correct", hold_settled))
