"""The settings of the loss, as a framework's configuration can carry them: in a string, a YAML file or Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from overtone.config import OverToneConfig
from overtone.token_loss import parse

Settings: TypeAlias = OverToneConfig | str | Mapping[str, Any] | None
"""What an adapter takes; see `read_settings`."""


def read_settings(value: Settings, *, takes_anchor: bool = False) -> OverToneConfig:
    """The settings that a framework's configuration names.

    Args:
        value: None for the defaults; an `OverToneConfig`; ``"overtone:lam=0.5+hold=settled"`` or
            ``"overtone_recommended"``, in the grammar of `overtone.token_loss`, whose fields left out are those of the
            method "lora"; or a mapping with the fields, and the name if it is not overtone.
        takes_anchor: whether the adapter has an unedited model.

    Raises:
        ValueError: for another loss, a field that there is not, a value out of range, or an anchor where there is
            nothing to measure it against.
        TypeError: for another type.
    """
    config = value or OverToneConfig() if value is None or isinstance(value, OverToneConfig) else _parsed(value)
    if config.anchor and not takes_anchor:
        raise ValueError(
            f"settings must have anchor 0, got {config.anchor:g}: this framework gives the loss no unedited model; use "
            "overtone.huggingface.attach(model, config, reference=...), or OverToneCallback, which calls it"
        )
    return config


def _parsed(value: str | Mapping[str, Any]) -> OverToneConfig:
    if isinstance(value, Mapping):
        value = {"name": "overtone", **value}
    elif not isinstance(value, str):
        raise TypeError(
            "settings must be an OverToneConfig, overtone:field=value+field=value, a mapping or None, got "
            f"{value!r} of type {type(value).__name__}"
        )
    spec = parse(value)
    config = spec.config("lora")
    if config is None:
        raise ValueError(f"settings must be of overtone or overtone_recommended, got {value!r}")
    if not spec.is_dynamic:
        raise ValueError(f"settings must not have dynamic=false, got {value!r}: a framework keeps no unedited model")
    return config


def require(given: Mapping[str, Any], **needed: Any) -> None:
    """Raise a ValueError for a framework's setting with which the loss would not be this one."""
    for name, value in needed.items():
        if given.get(name, value) != value:
            raise ValueError(f"{name} must be {value!r} for the loss to be OverTone's, got {given[name]!r}")
