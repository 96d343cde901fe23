"""The losses that the lab compares, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor
from torch.nn import functional as F

from overtone.lab.registry import look_up
from overtone.loss import OverToneConfig, OverToneLoss

TokenLoss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Logits (N, V) at the target tokens and labels (N,), without -100, to a scalar."""


@dataclass(frozen=True)
class NamedLoss:
    """A token loss under the name that command lines, results and figures use.

    Attributes:
        name: the key in `LOSSES`.
        title: what tables and figures say.
        build: from the name of an editing method to the token loss (the paper's epsilon depends on the method).
        stop_below: end the edit once the loss is below this value; None: run all steps.
    """

    name: str
    title: str
    build: Callable[[str], TokenLoss]
    stop_below: float | None = None


def _cross_entropy(method: str) -> TokenLoss:
    return F.cross_entropy


def _label_smoothing(method: str) -> TokenLoss:
    def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=0.1)

    return smoothed


def _overtone(method: str, *, hold_settled: bool) -> TokenLoss:
    return OverToneLoss(OverToneConfig.preset(method, hold_settled=hold_settled))


LOSSES: dict[str, NamedLoss] = {
    loss.name: loss
    for loss in (
        NamedLoss("cross_entropy", "cross-entropy", _cross_entropy),
        NamedLoss("early_stopping", "CE stopped at 0.1", _cross_entropy, stop_below=0.1),
        NamedLoss("label_smoothing", "label smoothing 0.1", _label_smoothing),
        NamedLoss("overtone", "OverTone", lambda method: _overtone(method, hold_settled=False)),
        NamedLoss("overtone_held", "OverTone, held", lambda method: _overtone(method, hold_settled=True)),
    )
}


def named_losses(names: Iterable[str]) -> list[NamedLoss]:
    """Look the names up in `LOSSES`.

    Raises:
        ValueError: a name that is not there, with those that are.
    """
    return look_up(LOSSES, "loss", names)
