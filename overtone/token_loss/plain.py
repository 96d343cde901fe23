"""A named loss that is one function of logits and labels, with a few numbers as its settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from overtone.checks import check_anchor
from overtone.hold import read_hold
from overtone.token_loss.anchor_fields import NO_ANCHOR, refuse_unused_anchor_epsilon
from overtone.token_loss.edit_loss import EditLoss, TokenLoss
from overtone.token_loss.grammar import write_value
from overtone.token_loss.titles import hold_title


@dataclass(frozen=True)
class Number:
    """A setting: its default, and what it may be.

    Attributes:
        default: where it is not given.
        low, high: its range, both ends in it.
    """

    default: float
    low: float
    high: float

    def check(self, name: str, value: Any) -> float:
        """The value.

        Raises:
            ValueError: it is no number, or out of range, or not whole though the default is.
        """
        kinds = int if isinstance(self.default, int) else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not self.low <= value <= self.high:
            kind = "a whole number" if kinds is int else "a number"
            raise ValueError(f"{name} must be {kind} from {self.low:g} to {self.high:g}, got {value!r}")
        return value


@dataclass(frozen=True)
class PlainLoss:
    """A token loss under a name.

    Attributes:
        label: its title; the settings stand in it in braces.
        token_loss: logits (N, V), labels (N,) and the settings by name to the losses (N,).
        numbers: the settings.
        distance: as of `EditLoss`.
        takes_anchor: whether it has the fields anchor and anchor_epsilon, as of `EditLoss`.
    """

    label: str
    token_loss: Callable[..., Tensor]
    numbers: Mapping[str, Number] = field(default_factory=dict)
    distance: TokenLoss | None = None
    takes_anchor: bool = False

    @property
    def defaults(self) -> dict[str, Any]:
        """Every field, in canonical order, with its default."""
        own = {name: number.default for name, number in self.numbers.items()}
        return {**own, "hold": None, **(NO_ANCHOR if self.takes_anchor else {})}

    def title(self, fields: Mapping[str, Any]) -> str:
        """For tables and figures, of the loss with these fields."""
        hold = read_hold(fields.get("hold"))
        parts = [self.label.format(**self._settings(fields)), *([hold_title(hold)] if hold else [])]
        parts += [f"{key}={write_value(fields[key])}" for key in NO_ANCHOR if key in fields]
        return ", ".join(parts)

    def config(self, fields: Mapping[str, Any], method: str) -> None:
        """OverTone has no part in it."""

    def build(self, fields: Mapping[str, Any], method: str) -> EditLoss:
        """The loss of one edit; the same for every method."""
        hold = read_hold(fields.get("hold"))
        if hold.settled:
            raise ValueError(
                'hold must be "correct" or the mean cross-entropy in nats at which to hold, or both, got '
                f"{fields['hold']!r}: only OverTone has an epsilon, below which a token is settled"
            )
        anchor = {key: fields.get(key, default) for key, default in NO_ANCHOR.items()}
        check_anchor(**anchor)
        refuse_unused_anchor_epsilon(fields, anchor["anchor"])
        loss = partial(self.token_loss, **self._settings(fields))
        return EditLoss(self.title(fields), loss, hold=hold, distance=self.distance, **anchor)

    def _settings(self, fields: Mapping[str, Any]) -> dict[str, float]:
        return {name: number.check(name, fields.get(name, number.default)) for name, number in self.numbers.items()}
