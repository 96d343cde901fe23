"""The choice that the edit at hand has made, read from its hparams and logged."""

from __future__ import annotations

import logging
from typing import Any

from overtone.easyedit.hparams import KEY, Choice, choose

logger = logging.getLogger("overtone.easyedit")
_announced: set[str] = set()


def choice_of(hparams: Any, trainer: str, preset: str) -> Choice | None:
    """What the hparams ask for; None without the key. Each different choice is logged once."""
    value = getattr(hparams, KEY, None)
    if value is None:
        return None
    choice = choose(value, preset)
    announce(f"{trainer}: minimises {choice.loss.description if choice.loss else 'its own cross-entropy'}")
    return choice


def announce(message: str) -> None:
    """Log a line that has not been logged before."""
    if message not in _announced:
        _announced.add(message)
        logger.info(message)
