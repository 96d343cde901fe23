"""The loss as a module, in the place of `torch.nn.CrossEntropyLoss`, and its settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from overtone.contract import Reduction, check_hyperparameters, check_reduction
from overtone.fused import overtone_loss
from overtone.hold import Hold

__all__ = ["PRESETS", "RECOMMENDED", "OverToneConfig", "OverToneLoss"]


@dataclass(frozen=True)
class OverToneConfig:
    """The settings of the loss; each is the argument of `overtone_loss` of the same name.

    Raises:
        ValueError, TypeError: for a value out of range or of the wrong type.
    """

    epsilon: float = 0.05
    n_sigma: float | None = 0.5
    lam: float = 0.1
    check: bool = True
    hold_settled: Hold = False
    hold_correct: bool = False

    def __post_init__(self) -> None:
        """Validate."""
        check_hyperparameters(**asdict(self))

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

        Every target is half the true token and half the model's own filtered distribution, and a step is held as soon
        as every label is the model's first choice; for "ft-m" the paper's check and clip stay, and a step is held once,
        besides, the mean KL is at or below 0.2.

        Args:
            method: "ft-m", "lora", "melo" or "wise".
            **changes: fields to set otherwise.
        """
        return cls._of_method(RECOMMENDED, method, changes)

    @classmethod
    def _of_method(cls, settings: Mapping[str, dict[str, Any]], method: str, changes: dict[str, Any]) -> OverToneConfig:
        if method not in settings:
            raise ValueError(f"method must be one of {sorted(settings)}, got {method!r}")
        return cls(**{**settings[method], **changes})

    def as_kwargs(self) -> dict[str, Any]:
        """The fields as keyword arguments of `overtone_loss`."""
        return asdict(self)


PRESETS: dict[str, dict[str, float]] = {
    "ft-m": {"epsilon": 0.01, "n_sigma": 0.5, "lam": 0.1},
    "lora": {"epsilon": 0.05, "n_sigma": 0.5, "lam": 0.1},
    "melo": {"epsilon": 0.05, "n_sigma": 1.0, "lam": 0.1},
    "wise": {"epsilon": 0.05, "n_sigma": 1.0, "lam": 0.1},
}
"""The paper's values, by method."""

_UNTIL_CORRECT = {"epsilon": 0.0, "lam": 0.5, "check": False, "hold_settled": math.inf, "hold_correct": True}

RECOMMENDED: dict[str, dict[str, Any]] = {
    "ft-m": {**PRESETS["ft-m"], "lam": 0.5, "hold_settled": 0.2, "hold_correct": True},
    "lora": {**PRESETS["lora"], **_UNTIL_CORRECT},
    "melo": {**PRESETS["melo"], **_UNTIL_CORRECT},
    "wise": {**PRESETS["wise"], **_UNTIL_CORRECT},
}
"""Ours, by method."""


class OverToneLoss(nn.Module):
    """`overtone_loss` in the place of `torch.nn.CrossEntropyLoss`: ``module(logits, labels)``.

    Args:
        config: the settings; None for the defaults.
        ignore_index: label of positions that do not count.
        reduction: "mean", "sum" or "none".
        weight, label_smoothing, size_average, reduce: there so that a call written for CrossEntropyLoss is understood;
            any value but CrossEntropyLoss's default raises a ValueError, since the loss could not honour it.
    """

    def __init__(
        self,
        config: OverToneConfig | None = None,
        *,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        size_average: bool | None = None,
        reduce: bool | None = None,
    ) -> None:
        super().__init__()
        if config is not None and not isinstance(config, OverToneConfig):
            raise TypeError(
                f"config must be an OverToneConfig or None, got {type(config).__name__}; there are no class weights"
            )
        check_reduction(reduction, ignore_index)
        if weight is not None:
            raise ValueError(
                "weight must be None: OverTone has no class weights; use torch.nn.CrossEntropyLoss for them"
            )
        if label_smoothing != 0.0:
            raise ValueError(
                f"label_smoothing must be 0, got {label_smoothing!r}: OverTone smooths each target adaptively (see lam)"
            )
        if size_average is not None or reduce is not None:
            raise ValueError("size_average and reduce must be None: pass reduction='mean', 'sum' or 'none'")
        self.config = config or OverToneConfig()
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def forward(self, logits: Tensor, labels: Tensor, reference_logits: Tensor | None = None) -> Tensor:
        """The loss of logits ``(..., V)`` and labels ``(...)``; see `overtone_loss`."""
        return overtone_loss(
            logits,
            labels,
            reference_logits=reference_logits,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            **self.config.as_kwargs(),
        )

    def extra_repr(self) -> str:
        """The settings, as repr shows them."""
        settings = {**self.config.as_kwargs(), "ignore_index": self.ignore_index, "reduction": self.reduction}
        return ", ".join(f"{name}={value!r}" for name, value in settings.items())
