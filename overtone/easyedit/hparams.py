"""The one key, `token_loss`: what it may say, and how it gets past loaders that refuse unknown keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from overtone import OverToneConfig, overtone_loss
from overtone.easyedit.edit_loss import EditLoss
from overtone.hold import OLD_NAMES, old_values, read_hold

KEY = "token_loss"

DEFAULT_HOLD: dict[str, bool | float] = {"ft-m": True, "lora": True, "melo": True, "wise": True}
"""When an edit needs nothing more, by method; chosen by measurement, see examples/easyedit/results."""

_FIELDS = [*(field.name for field in fields(OverToneConfig)), *OLD_NAMES]

WISE_OPTIONS = ("activation_scale", "context_templates")
PAPER_ACTIVATION_SCALE = 0.6


@dataclass(frozen=True)
class Choice:
    """What one hparams object asks for.

    Attributes:
        loss: None: the trainer's own, untouched.
        activation_scale: factor on WISE's `act_ratio`.
        context_templates: whether WISE trains on its generated prefixes too.
    """

    loss: EditLoss | None
    activation_scale: float = 1.0
    context_templates: bool = True


def choose(value: object, method: str) -> Choice:
    """Read the value of `token_loss` for one method ("ft-m", "lora", "melo", "wise").

    Raises:
        ValueError, TypeError: for an unknown name or option, or a value out of range; the message names it.
    """
    if callable(value):
        return Choice(EditLoss(f"the callable {getattr(value, '__name__', value)!s}", value))
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{KEY} must be one of {tuple(_READERS)}, a mapping with a name, or a callable(logits, labels), "
            f"got {value!r}"
        )
    options = floats_from_strings(dict(value))
    name = options.pop("name", None)
    if name not in _READERS:
        raise ValueError(f"{KEY} must name one of {tuple(_READERS)}, got {name!r}")
    wise = {key: options.pop(key) for key in WISE_OPTIONS if key in options} if method == "wise" else {}
    loss = _READERS[name](options, method)
    if method != "wise":
        return Choice(loss)
    is_overtone = name in ("overtone", "overtone_recommended")
    scale = wise.get("activation_scale", PAPER_ACTIVATION_SCALE if is_overtone else 1.0)
    templates = wise.get("context_templates", name != "overtone")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise ValueError(f"{KEY}: activation_scale must be a number above 0, got {scale!r}")
    if not isinstance(templates, bool):
        raise ValueError(f"{KEY}: context_templates must be true or false, got {templates!r}")
    return Choice(loss, float(scale), templates)


def floats_from_strings(options: dict[str, Any]) -> dict[str, Any]:
    """YAML 1.1 reads 5e-2 as a string; EasyEdit mends that at the top level of a file only."""

    def mend(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return float(value)
        except ValueError:
            return value

    return {key: mend(value) for key, value in options.items()}


def _overtone(options: dict[str, Any], method: str) -> EditLoss:
    changes = {"hold": DEFAULT_HOLD[method], **_known(options, _FIELDS, "overtone")}
    return _held_overtone(OverToneConfig.preset(method, **changes))


def _overtone_recommended(options: dict[str, Any], method: str) -> EditLoss:
    return _held_overtone(OverToneConfig.recommended(method, **_known(options, _FIELDS, "overtone_recommended")))


def _held_overtone(config: OverToneConfig) -> EditLoss:
    settings = {**config.as_kwargs(), "epsilon": 0, "hold": None}
    hold = old_values(config.hold)
    return EditLoss(
        f"overtone (epsilon={config.epsilon}, n_sigma={config.n_sigma}, lam={config.lam}, check={config.check}, "
        f"hold={config.hold!r})",
        partial(overtone_loss, reduction="none", **settings),
        settled_below=config.epsilon,
        hold=hold["hold_settled"],
        hold_correct=bool(hold["hold_correct"]),
    )


def _cross_entropy(options: dict[str, Any], method: str) -> EditLoss | None:
    _known(options, ["hold_settled"], "cross_entropy")
    hold = _mean_hold(options, "cross_entropy")
    if hold is False:
        return None
    loss = partial(_smoothed, smoothing=0.0)
    return EditLoss(f"cross_entropy (hold_settled={hold})", loss, hold=hold)


def _label_smoothing(options: dict[str, Any], method: str) -> EditLoss:
    _known(options, ["hold_settled", "smoothing"], "label_smoothing")
    smoothing = options.get("smoothing", 0.1)
    if isinstance(smoothing, bool) or not isinstance(smoothing, (int, float)) or not 0 <= smoothing <= 1:
        raise ValueError(f"{KEY}: smoothing must be a number in [0, 1], got {smoothing!r}")
    hold = _mean_hold(options, "label_smoothing")
    loss = partial(_smoothed, smoothing=smoothing)
    return EditLoss(f"label_smoothing (smoothing={smoothing}, hold_settled={hold})", loss, hold=hold)


_READERS: dict[str, Callable[[dict[str, Any], str], EditLoss | None]] = {
    "overtone": _overtone,
    "overtone_recommended": _overtone_recommended,
    "cross_entropy": _cross_entropy,
    "label_smoothing": _label_smoothing,
}


def _smoothed(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)


def _mean_hold(options: dict[str, Any], name: str) -> bool | float:
    hold: bool | float = options.get("hold_settled", False)
    if hold is True:
        raise ValueError(
            f"{KEY}: {name} has no threshold at which a token is settled: hold_settled must be false or the mean loss "
            "at which to hold, got True"
        )
    try:
        read_hold(hold)
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"{KEY}: {name}: hold_settled must be false or the mean loss above 0 at which to hold, got {hold!r}"
        ) from error
    return hold


def _known(options: dict[str, Any], names: list[str], loss: str) -> dict[str, Any]:
    for key in options:
        if key in WISE_OPTIONS:
            raise ValueError(f"{KEY}: {key} is an option of WISE alone")
        if key not in names:
            raise ValueError(f"{KEY}: {loss} has no option {key!r}; it takes {', '.join(names)}")
    return options


def read_yaml(path: str) -> dict[str, Any]:
    """The hparams file as EasyEdit's loaders find it: ``.yaml`` is added to a path without it."""
    import yaml

    with open(path if ".yaml" in path else path + ".yaml", encoding="utf-8") as stream:
        config = yaml.safe_load(stream)
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no hparams file: expected a mapping, got {type(config).__name__}")
    return config


def loader(stock: Callable[[type, str], Any], check: Callable[[dict[str, Any]], None]) -> Callable[[type, str], Any]:
    """A `from_hparams` that takes the key out of the file, loads the rest, and sets the key as an attribute.

    Args:
        stock: the class's own loader, unbound.
        check: raises where the file's token loss could not be used.
    """

    def from_hparams(cls: type, hparams_name_or_path: str) -> Any:
        import yaml

        path = str(hparams_name_or_path)
        config = read_yaml(path)
        if KEY not in config:
            return stock(cls, hparams_name_or_path)
        check(config)
        value = config.pop(KEY)
        with TemporaryDirectory() as folder:
            stripped = Path(folder, Path(path).name if ".yaml" in path else Path(path).name + ".yaml")
            stripped.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
            hparams = stock(cls, str(stripped))
        hparams.token_loss = floats_from_strings(value) if isinstance(value, dict) else value
        return hparams

    return from_hparams
