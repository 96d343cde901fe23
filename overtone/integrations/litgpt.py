"""litgpt's fine-tuning scripts, which call their loss by name and hand it the logits as a list of chunks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from overtone.integrations.settings import Settings, read_settings
from overtone.loss import overtone_loss

__all__ = ["loss_of"]


@contextmanager
def loss_of(script: ModuleType, settings: Settings = None) -> Iterator[None]:
    """Train with this loss in a script of `litgpt.finetune`, until the block ends; validation stays cross-entropy.

    Args:
        script: the module, such as `litgpt.finetune.lora`.
        settings: as `read_settings` takes them.

    Raises:
        ValueError: for a module without litgpt's chunked_cross_entropy.
    """
    config = read_settings(settings)
    original: Any = getattr(script, "chunked_cross_entropy", None)
    if original is None:
        name = getattr(script, "__name__", script)
        raise ValueError(f"script must be a module of litgpt.finetune, got {name!r}, which has another loss")

    def loss(logits: Tensor | list[Tensor], targets: Tensor, chunk_size: int = 128, ignore_index: int = -100) -> Tensor:
        if not torch.is_grad_enabled():
            cross_entropy: Tensor = original(logits, targets, chunk_size, ignore_index)
            return cross_entropy
        whole = torch.cat(logits, dim=1) if isinstance(logits, list) else logits
        return overtone_loss(whole, targets, ignore_index=ignore_index, **config.as_kwargs())

    script.chunked_cross_entropy = loss  # type: ignore[attr-defined]
    try:
        yield
    finally:
        script.chunked_cross_entropy = original  # type: ignore[attr-defined]
