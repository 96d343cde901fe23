"""The losses that the lab compares, by name or by a spec that changes a name's settings.

A spec is `name` or `name:field=value+field=value`, for example `early_stopping:stop_below=0.3` or
`overtone:hold_settled=0.1+lam=0.5`. Its canonical form, which results carry, has the fields in the order of the
settings and leaves out those that change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

from torch import Tensor
from torch.nn import functional as F

from overtone.config import PRESETS, OverToneConfig
from overtone.lab.registry import look_up
from overtone.loss import OverToneLoss

TokenLoss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Logits (N, V) at the target tokens and labels (N,), without -100, to a scalar."""


@dataclass(frozen=True)
class NamedLoss:
    """A token loss under the name that command lines, results and figures use.

    Attributes:
        name: the canonical spec.
        title: what tables and figures say.
        overtone: the fields of `OverToneConfig` that differ from the editing method's settings; None: cross-entropy.
        is_recommended: these settings are the recommended ones, rather than the paper's preset.
        is_dynamic: OverTone's target follows the model; otherwise it stays what the model before the edit gives.
        label_smoothing: of cross-entropy.
        stop_below: end the edit once the loss is below this value; None: run all steps.
    """

    name: str
    title: str
    overtone: Mapping[str, Any] | None = field(default=None, hash=False)
    is_recommended: bool = False
    is_dynamic: bool = True
    label_smoothing: float = 0.0
    stop_below: float | None = None

    def config(self, preset: str) -> OverToneConfig | None:
        """The settings of OverTone for an editing method, or None where the loss is cross-entropy.

        Args:
            preset: the method's name in `overtone.config.PRESETS` (the paper's epsilon depends on the method).
        """
        if self.overtone is None:
            return None
        settings = OverToneConfig.recommended if self.is_recommended else OverToneConfig.preset
        return settings(preset, **self.overtone)

    def build(self, preset: str) -> TokenLoss:
        """The token loss of one edit with a method; build a new one for every edit."""
        config = self.config(preset)
        if config is None:
            return self._cross_entropy
        loss = OverToneLoss(config)
        return loss if self.is_dynamic else _FirstLogitsAsReference(loss)

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)


class _FirstLogitsAsReference:
    """OverTone with the target of the model before the edit, which the first call of an edit sees."""

    def __init__(self, loss: OverToneLoss) -> None:
        self._loss = loss
        self._reference: Tensor | None = None

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self._reference is None:
            self._reference = logits.detach().clone()
        loss: Tensor = self._loss(logits, labels, reference_logits=self._reference)
        return loss


_OVERTONE_FIELDS = (*(setting.name for setting in fields(OverToneConfig)), "dynamic")
_FIELDS: Mapping[str, tuple[str, ...]] = {
    "cross_entropy": (),
    "early_stopping": ("stop_below",),
    "label_smoothing": ("label_smoothing",),
    "overtone": _OVERTONE_FIELDS,
    "overtone_held": _OVERTONE_FIELDS,
    "overtone_recommended": (),
}
"""The names that a spec begins with, and the fields that each takes."""

_DEFAULTS: Mapping[str, Any] = {
    "stop_below": 0.1,
    "label_smoothing": 0.1,
    "dynamic": True,
    **{setting.name: setting.default for setting in fields(OverToneConfig) if setting.name not in PRESETS["lora"]},
}
"""Of the fields that no method's preset decides: given with these values they change nothing."""

_TITLES: Mapping[str, str] = {
    "cross_entropy": "cross-entropy",
    "overtone": "OverTone",
    "overtone_held": "OverTone, held",
    "overtone_recommended": "OverTone, recommended",
    "overtone:epsilon=0": "OverTone w/o clip",
    "overtone:n_sigma=none": "OverTone w/o flt",
    "overtone:check=false": "OverTone w/o chk",
    "overtone:dynamic=false": "OverTone w/o dyn",
    "overtone:epsilon=0+check=false": "mixing only",
    "overtone:lam=1": "clipping only",
}

ABLATIONS: tuple[str, ...] = (
    "overtone:epsilon=0",
    "overtone:n_sigma=none",
    "overtone:check=false",
    "overtone:dynamic=false",
    "overtone:epsilon=0+check=false",
    "overtone:lam=1",
)
"""The paper's Table 3; then the filtered mixture as the target of every token, never clipped; then clipping alone."""

EARLY_STOPPING_THRESHOLDS = (0.01, 0.05, 0.1, 0.3, 0.5)
"""Cross-entropy in nats at which an edit is stopped; the best one is the rival of every other loss."""


def parse_loss(spec: str) -> NamedLoss:
    """The loss of a spec.

    Args:
        spec: a name of `LOSSES`, or a name with settings; values are numbers, `true`, `false` or `none`.

    Raises:
        ValueError: an unknown name or field, a field twice, or a value that the loss does not take.
    """
    name, colon, settings = spec.strip().partition(":")
    (allowed,) = look_up(_FIELDS, "loss", [name])
    given: dict[str, Any] = {}
    for part in settings.split("+") if colon else ():
        key, equals, text = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise ValueError(f"loss {spec!r}: {part!r} is not field=value; write {name}:field=value+field=value")
        if key not in allowed:
            known = f"takes {', '.join(allowed)}" if allowed else "takes no settings"
            raise ValueError(f"loss {spec!r}: unknown field {key!r}: {name} {known}")
        if key in given:
            raise ValueError(f"loss {spec!r}: {key} is given twice")
        given[key] = _value(text)
    if name == "overtone_held":
        name, given = "overtone", {"hold_settled": True} | given
    given = {key: given[key] for key in allowed if key in given and not _is(given[key], _DEFAULTS.get(key, ...))}
    _check(spec, given)
    canonical = _canonical(name, given)
    title = _TITLES.get(canonical) or _title(name, given)
    if name == "overtone_recommended":
        return NamedLoss(canonical, title, overtone={}, is_recommended=True)
    if name == "overtone":
        is_dynamic = given.pop("dynamic", True)
        return NamedLoss(canonical, title, overtone=given, is_dynamic=is_dynamic)
    if name == "label_smoothing":
        return NamedLoss(canonical, title, label_smoothing=given.get(name, _DEFAULTS[name]))
    if name == "early_stopping":
        return NamedLoss(canonical, title, stop_below=given.get("stop_below", _DEFAULTS["stop_below"]))
    return NamedLoss(canonical, title)


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        number = float(text)
    except ValueError:
        return text  # for the field's own check to judge
    return int(number) if number.is_integer() else number


def _is(value: Any, other: Any) -> bool:
    """Equal and of one kind: the number 1 is not True."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _check(spec: str, given: Mapping[str, Any]) -> None:
    try:
        OverToneConfig(**{key: value for key, value in given.items() if key in _OVERTONE_FIELDS[:-1]})
    except (TypeError, ValueError) as error:
        raise ValueError(f"loss {spec!r}: {error}") from error
    if not isinstance(given.get("dynamic", True), bool):
        raise ValueError(f"loss {spec!r}: dynamic must be true or false, got {given['dynamic']!r}")
    for key, low, high in (("stop_below", 0.0, float("inf")), ("label_smoothing", 0.0, 1.0)):
        value = given.get(key, _DEFAULTS[key])
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value < high:
            bounds = f"between 0 and {high:g}" if high < float("inf") else "above 0"
            raise ValueError(f"loss {spec!r}: {key} must be a finite number {bounds}, got {value!r}")


def _canonical(name: str, given: Mapping[str, Any]) -> str:
    if given.get("hold_settled") is True:
        name = "overtone_held"
        given = {key: value for key, value in given.items() if key != "hold_settled"}
    settings = "+".join(f"{key}={_written(value)}" for key, value in given.items())
    return f"{name}:{settings}" if settings else name


def _written(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value).lower()


def _title(name: str, given: Mapping[str, Any]) -> str:
    if name == "early_stopping":
        return f"CE stopped at {given.get('stop_below', _DEFAULTS['stop_below']):g}"
    if name == "label_smoothing":
        return f"label smoothing {given.get(name, _DEFAULTS[name]):g}"
    said = {"hold_settled": "held"} if given.get("hold_settled") is True else {}
    parts = [said.get(key) or f"{key}={_written(value)}" for key, value in given.items()]
    # What is held comes first, as in the title of overtone_held.
    return ", ".join(["OverTone", *sorted(parts, key=lambda part: part != "held")])


LOSSES: dict[str, NamedLoss] = {name: parse_loss(name) for name in _FIELDS}
"""The losses with the settings that they have by default."""


def named_losses(names: Iterable[str]) -> list[NamedLoss]:
    """Look the names up in `LOSSES`.

    Raises:
        ValueError: a name that is not there, with those that are.
    """
    return look_up(LOSSES, "loss", names)
