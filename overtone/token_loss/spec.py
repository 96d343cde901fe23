"""A loss as it is asked for: parsed, checked, and ready to be built for an edit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from overtone.config import PRESETS, OverToneConfig
from overtone.hold import HoldValue, read_hold
from overtone.token_loss.aliases import modernise
from overtone.token_loss.catalogue import NAMED_LOSSES
from overtone.token_loss.edit_loss import EditLoss, TokenLoss
from overtone.token_loss.grammar import read, write


@dataclass(frozen=True)
class LossSpec:
    """One loss; equal specs are the same loss. It can be pickled, unless it is a callable that cannot be.

    Attributes:
        name: the canonical spelling, which `parse` takes back: fields in one order, those at their defaults left out.
        title: what tables and figures say.
        kind: the key in `NAMED_LOSSES`; "callable" for a function.
        fields: as in name.
        function: the function, for a callable.
    """

    name: str
    title: str
    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)
    function: TokenLoss | None = None

    @property
    def is_dynamic(self) -> bool:
        """Whether the target follows the model; else the built loss takes it from the logits of its first call."""
        return bool(self.fields.get("dynamic", True))

    def config(self, method: str) -> OverToneConfig | None:
        """The settings of OverTone for a method (a key of `PRESETS`); None for other losses."""
        return None if self.function else NAMED_LOSSES[self.kind].config(self.fields, method)

    def build(self, method: str) -> EditLoss:
        """The loss of one edit with a method (a key of `overtone.config.PRESETS`); build a new one for every edit."""
        if self.function is not None:
            return EditLoss(self.title, self.function)
        return NAMED_LOSSES[self.kind].build(self.fields, method)


def parse(value: object, *, hold: HoldValue = None) -> LossSpec:
    """The loss that a command line, hparams or a results file names.

    Args:
        value: a name of `NAMED_LOSSES`; `name:field=value+field=value`, where a value is a number, `true`, `false`,
            `none`, a word, or several of these by commas; a mapping with the key `name` and the fields; or a callable
            ``(logits (N, V), labels (N,)) -> loss (N,)``.
        hold: of `overtone` where the value does not say.

    Raises:
        TypeError: value is none of these.
        ValueError: an unknown name or field, a field twice, or a value that the loss does not take; the message names
            it and what is expected.
    """
    if callable(value):
        name = getattr(value, "__name__", type(value).__name__)
        return LossSpec(name, f"the callable {name}", "callable", function=value)
    kind, given = read(value)
    try:
        kind, given = modernise(kind, given, hold)
        fields = _changed_fields(kind, given)
        for method in PRESETS:
            NAMED_LOSSES[kind].build(fields, method)
    except (TypeError, ValueError) as error:
        raise ValueError(f"loss {value!r}: {error}") from error
    return LossSpec(write(kind, fields), NAMED_LOSSES[kind].title(fields), kind, fields)


def _changed_fields(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those that differ from the defaults, in canonical order; the fields' values are judged by the loss itself."""
    if kind not in NAMED_LOSSES:
        raise ValueError(f"unknown loss {kind!r}: choose from {', '.join(NAMED_LOSSES)}")
    defaults = NAMED_LOSSES[kind].defaults
    for key in given:
        if key not in defaults:
            raise ValueError(f"unknown field {key!r}: {kind} takes {', '.join(defaults)}")
    values = {key: read_hold(value).value if key == "hold" else value for key, value in given.items()}
    return {key: values[key] for key, default in defaults.items() if key in values and not _same(values[key], default)}


def _same(value: object, default: object) -> bool:
    """Equal and of one kind: the number 1 is not True."""
    return value == default and isinstance(value, bool) == isinstance(default, bool)
