"""The settings of the loss: the paper's by method, and ours."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from overtone.checks import check_anchor, check_hyperparameters
from overtone.hold import HoldValue, read_hold
from overtone.old_hold_names import accepts_old_names, old_values

__all__ = ["PRESETS", "RECOMMENDED", "OverToneConfig"]


@dataclass(frozen=True)
class OverToneConfig:
    """The settings of the loss; each is the argument of `overtone_loss` of the same name.

    Several words of a hold are kept in one order: "correct", "settled", the number. A loss whose settings have an
    anchor above 0 demands the anchors of each call, and raises a ValueError without them.

    Raises:
        ValueError, TypeError: for a value out of range or of the wrong type.
    """

    epsilon: float = 0.05
    n_sigma: float | None = 0.5
    lam: float = 0.1
    check: bool = True
    hold: HoldValue = None
    anchor: float = 0.0
    anchor_epsilon: float = 0.05

    def __post_init__(self) -> None:
        """Validate, and write hold the one way in which equal settings are equal."""
        check_hyperparameters(self.epsilon, self.n_sigma, self.lam, self.check)
        check_anchor(self.anchor, self.anchor_epsilon)
        object.__setattr__(self, "hold", read_hold(self.hold).value)

    @classmethod
    def preset(cls, method: str, **changes: Any) -> OverToneConfig:
        """The paper's values for an editing method (appendix B.1), with any of them changed by name.

        Args:
            method: "ft-m", "lora", "melo" or "wise".
            **changes: fields to set otherwise.
        """
        return cls._of_method(PRESETS, method, changes)

    @classmethod
    def recommended(cls, method: str, **changes: Any) -> OverToneConfig:
        """What edited best in our own experiments, beyond the paper, with any of it changed by name.

        Every target is half the true token and half the model's own filtered distribution, and a step is held once
        every label is the model's first choice and the mean KL is at or below 0.3; for "ft-m" the paper's check and
        clip stay, and it is 0.1.

        Args:
            method: "ft-m", "lora", "melo" or "wise".
            **changes: fields to set otherwise.
        """
        return cls._of_method(RECOMMENDED, method, changes)

    @classmethod
    def _of_method(cls, settings: Mapping[str, dict[str, Any]], method: str, changes: dict[str, Any]) -> OverToneConfig:
        if not isinstance(method, str) or method not in settings:
            raise ValueError(f"method must be one of {sorted(settings)}, got {method!r}")
        return cls(**{**settings[method], **changes})

    @property
    def hold_settled(self) -> bool | float:
        """A part of hold by its old name, with a DeprecationWarning."""
        warnings.warn("hold_settled is now a part of hold", DeprecationWarning, stacklevel=2)
        return old_values(self.hold)["hold_settled"]

    @property
    def hold_correct(self) -> bool:
        """A part of hold by its old name, with a DeprecationWarning."""
        warnings.warn("hold_correct is now a part of hold", DeprecationWarning, stacklevel=2)
        return bool(old_values(self.hold)["hold_correct"])

    def as_kwargs(self) -> dict[str, Any]:
        """The fields as keyword arguments of `overtone_loss`."""
        return asdict(self)


OverToneConfig.__init__ = accepts_old_names(OverToneConfig.__init__)  # type: ignore[method-assign]


def checked_config(config: OverToneConfig | None) -> OverToneConfig:
    """The defaults for None; a TypeError for anything but an OverToneConfig."""
    if config is not None and not isinstance(config, OverToneConfig):
        raise TypeError(f"config must be an OverToneConfig or None, got {type(config).__name__}: {config!r}")
    return config or OverToneConfig()


PRESETS: dict[str, dict[str, float]] = {
    "ft-m": {"epsilon": 0.01, "n_sigma": 0.5, "lam": 0.1},
    "lora": {"epsilon": 0.05, "n_sigma": 0.5, "lam": 0.1},
    "melo": {"epsilon": 0.05, "n_sigma": 1.0, "lam": 0.1},
    "wise": {"epsilon": 0.05, "n_sigma": 1.0, "lam": 0.1},
}
"""The paper's values, by method."""

_UNCLIPPED = {"epsilon": 0.0, "lam": 0.5, "check": False, "hold": ("correct", 0.3)}

RECOMMENDED: dict[str, dict[str, Any]] = {
    "ft-m": {**PRESETS["ft-m"], "lam": 0.5, "hold": ("correct", 0.1)},
    "lora": {**PRESETS["lora"], **_UNCLIPPED},
    "melo": {**PRESETS["melo"], **_UNCLIPPED},
    "wise": {**PRESETS["wise"], **_UNCLIPPED},
}
"""Ours, by method."""
