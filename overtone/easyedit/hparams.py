"""The one key, `token_loss`: what it may say, and what an edit's hparams say with it."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass

from overtone.token_loss import EditLoss, parse
from overtone.token_loss.grammar import read

KEY = "token_loss"

DEFAULT_HOLD = "settled"
"""Of `token_loss: overtone`; chosen by measurement, see docs/easyedit.md."""

WISE_OPTIONS = ("activation_scale", "context_templates")
PAPER_ACTIVATION_SCALE = 0.6

logger = logging.getLogger("overtone.easyedit")
_announced: set[str] = set()


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


def choose(value: object, method: str, *, takes_anchor: bool = True) -> Choice:
    """Read the value of `token_loss` for one method.

    Args:
        value: what `overtone.token_loss.parse` takes; for WISE, activation_scale and context_templates beside its
            fields.
        method: "ft-m", "lora", "melo" or "wise".
        takes_anchor: whether the trainer shows the prompt's own tokens to its loss.

    Raises:
        ValueError, TypeError: for an unknown name or option, a value out of range, or an anchor where there is nothing
            to anchor; the message names it.
    """
    try:
        choice = Choice(parse(value).build(method)) if callable(value) else _choose(value, method)
        if choice.loss is not None and choice.loss.anchor > 0 and not takes_anchor:
            raise ValueError(
                f"anchor={choice.loss.anchor:g} is for trainers whose loss follows a prompt: FT-M, LoRA, MELO, WISE, "
                "FT_uns and LoRA_uns; leave it out here"
            )
    except (TypeError, ValueError) as error:
        raise type(error)(f"{KEY}: {error}") from error
    return choice


def _choose(value: object, method: str) -> Choice:
    name, options = read(value)
    wise = {key: options.pop(key) for key in WISE_OPTIONS if key in options}
    if wise and method != "wise":
        raise ValueError(f"{next(iter(wise))} is an option of WISE alone")
    spec = parse({"name": name, **options}, hold=DEFAULT_HOLD)
    if not spec.is_dynamic:
        raise ValueError("dynamic=false is not for EasyEdit's trainers: they keep no logits from before the edit")
    loss = None if spec.name == "cross_entropy" else spec.build(method)
    if method != "wise":
        return Choice(loss)
    scale = wise.get("activation_scale", 1.0 if spec.config(method) is None else PAPER_ACTIVATION_SCALE)
    templates = wise.get("context_templates", True)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale <= sys.float_info.max:
        raise ValueError(f"activation_scale must be a number above 0, got {scale!r}")
    if not isinstance(templates, bool):
        raise ValueError(f"context_templates must be true or false, got {templates!r}")
    return Choice(loss, float(scale), templates)


def announce(message: str) -> None:
    """Log a line that has not been logged before."""
    if message not in _announced:
        _announced.add(message)
        logger.info(message)
