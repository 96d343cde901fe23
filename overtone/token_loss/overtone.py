"""OverTone as a loss of single tokens: with the paper's settings and its ablations, or with the recommended ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from overtone.config import OverToneConfig
from overtone.hold import read_hold
from overtone.loss import overtone_loss
from overtone.token_loss.anchor_fields import NO_ANCHOR, refuse_unused_anchor_epsilon
from overtone.token_loss.edit_loss import EditLoss, TokenLoss
from overtone.token_loss.grammar import write_value
from overtone.token_loss.titles import hold_title

FROM_METHOD = object()
"""The default of a field whose value comes from the editing method's settings."""

_ABLATIONS: Mapping[tuple[tuple[str, Any], ...], str] = {
    (("epsilon", 0),): "OverTone w/o clip",
    (("n_sigma", None),): "OverTone w/o flt",
    (("check", False),): "OverTone w/o chk",
    (("dynamic", False),): "OverTone w/o dyn",
    (("epsilon", 0), ("check", False)): "mixing only",
    (("lam", 1),): "clipping only",
}
"""Titles of Table 3's rows, and of the two halves of the loss."""


@dataclass(frozen=True)
class OverTone:
    """The loss with the settings of the editing method, any of them changed by a field.

    Attributes:
        label: its title.
        of_method: `OverToneConfig.preset` or `OverToneConfig.recommended`.
        own_defaults: of the fields that the method does not decide.
    """

    label: str
    of_method: Callable[..., OverToneConfig]
    own_defaults: Mapping[str, Any]

    @property
    def defaults(self) -> dict[str, Any]:
        """Every field, in canonical order, with its default."""
        return {
            **dict.fromkeys(("epsilon", "n_sigma", "lam", "check", "hold", *NO_ANCHOR), FROM_METHOD),
            "dynamic": True,
            **self.own_defaults,
        }

    def title(self, fields: Mapping[str, Any]) -> str:
        """For tables and figures, of the loss with these fields, those at their defaults left out."""
        if tuple(fields.items()) in _ABLATIONS and self.of_method == OverToneConfig.preset:
            return _ABLATIONS[tuple(fields.items())]
        held = [hold_title(read_hold(fields["hold"]))] if "hold" in fields else []
        others = [f"{key}={write_value(value)}" for key, value in fields.items() if key != "hold"]
        return ", ".join([self.label, *held, *others])

    def config(self, fields: Mapping[str, Any], method: str) -> OverToneConfig:
        """The settings of the loss with these fields."""
        return self.of_method(method, **{key: value for key, value in fields.items() if key != "dynamic"})

    def build(self, fields: Mapping[str, Any], method: str) -> EditLoss:
        """The loss of one edit; with ``dynamic=False`` it keeps the first logits that it sees."""
        config = self.config(fields, method)
        refuse_unused_anchor_epsilon(fields, config.anchor)
        target: dict[str, Any] = {"n_sigma": config.n_sigma, "lam": config.lam, "check": config.check}
        unclipped: TokenLoss = partial(overtone_loss, epsilon=0, reduction="none", **target)
        dynamic = fields.get("dynamic", True)
        if not isinstance(dynamic, bool):
            raise ValueError(f"dynamic must be true or false, got {dynamic!r}")
        if not dynamic:
            unclipped = _FirstLogitsAsReference(unclipped)
        settings = {**config.as_kwargs(), "dynamic": dynamic}
        if config.anchor == 0:
            settings = {key: value for key, value in settings.items() if key not in NO_ANCHOR}
        description = f"{self.label} ({', '.join(f'{key}={value}' for key, value in settings.items())})"
        return EditLoss(
            description,
            unclipped,
            epsilon=config.epsilon,
            hold=read_hold(config.hold),
            anchor=config.anchor,
            anchor_epsilon=config.anchor_epsilon,
        )


class _FirstLogitsAsReference:
    """A token loss whose target is that of the model before the edit, which the first call of an edit sees."""

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        self._loss = loss
        self._reference: Tensor | None = None

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self._reference is None:
            self._reference = logits.detach()
        return self._loss(logits, labels, reference_logits=self._reference)
