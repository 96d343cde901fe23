"""Methods tried on a model before its first edit, so that what it cannot take is refused and not recorded as failed."""

from __future__ import annotations

from typing import Any

import torch

from overtone.lab.edit.methods import EditingMethod, MethodSettings
from overtone.lab.model.positions import Text, logits_at


def try_method(model: Any, method: EditingMethod, settings: MethodSettings, *, at_once: int) -> None:
    """Open a method's weights once as its edits will.

    Args:
        model: a causal language model, in evaluation mode; trained or not.
        method: one of the lab's own.
        settings: of the method.
        at_once: how many edits share a pass; from 2 on two rows are passed through the model.

    Raises:
        ValueError: the model cannot take the method or one of the settings.
    """
    if at_once == 1:
        with method.open(model, settings, 0):
            return
    opened = method.open_many(model, settings)
    start, text = opened.start(0), Text(torch.tensor([0]), torch.tensor([0]))
    with torch.no_grad(), opened.applied([start, start], [1, 1], []):
        logits_at(model, [text, text])
