"""The statistics that ROME and MEMIT weigh a change against: second moments of a layer's inputs over a corpus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from overtone.easyedit.patching import Patches
from overtone.lab.edit.easyedit import process
from overtone.lab.model.workplace import Workplace


@torch.no_grad()
def second_moment(
    model: Any, tokenizer: Any, module_name: str, texts: Sequence[str], *, batch_size: int = 64
) -> Tensor:
    """``E[x x^T]`` of a module's inputs x over every token of the texts.

    Args:
        model: a Hugging Face causal language model, in evaluation mode.
        tokenizer: its tokenizer, with a pad token.
        module_name: of a module whose first input has shape (B, T, D).
        texts: the corpus; a text that stands there twice counts twice.
        batch_size: texts per forward pass.

    Returns:
        ``(D, D)`` in float64, on the model's device.

    Raises:
        ValueError: no texts.
    """
    if not texts:
        raise ValueError("texts is empty: the statistics of a layer need a corpus")
    kept: list[Tensor] = []
    hook = model.get_submodule(module_name).register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    total: Tensor | int = 0
    tokens = 0
    longest = getattr(model.config, "max_position_embeddings", None)
    try:
        # Sorted, so that a batch holds little padding; the sum does not depend on the order beyond rounding.
        ordered = sorted(texts, key=len)
        for start in range(0, len(ordered), batch_size):
            batch = tokenizer(
                ordered[start : start + batch_size],
                return_tensors="pt",
                padding=True,
                truncation=longest is not None,
                max_length=longest,
            ).to(model.device)
            kept.clear()
            model(**batch, logits_to_keep=1, use_cache=False)
            inputs = kept[0][batch["attention_mask"].bool()].double()
            total = total + inputs.T @ inputs
            tokens += len(inputs)
    finally:
        hook.remove()
    assert isinstance(total, Tensor)
    return total / tokens


@dataclass
class _Statistics:
    """Of one model, kept as long as its workplace: every single edit opens a session."""

    moments: dict[str, Tensor]
    rome: dict[Any, Tensor]
    memit: dict[Any, Tensor]


_statistics: WeakKeyDictionary[Workplace, _Statistics] = WeakKeyDictionary()


def answer_for_statistics(patches: Patches, workplace: Workplace, texts: Sequence[str]) -> None:
    """Let ROME and MEMIT ask for the second moments on these texts, where they would compute them on Wikipedia."""
    known = _statistics.setdefault(workplace, _Statistics({}, {}, {}))

    def layer_stats(model: Any, tok: Any, layer_name: str, *_: Any, **__: Any) -> Any:
        if layer_name not in known.moments:
            known.moments[layer_name] = second_moment(workplace.model, workplace.tokenizer, layer_name, texts)
        return SimpleNamespace(mom2=SimpleNamespace(moment=lambda: known.moments[layer_name]))

    rome, memit = process.module("models.rome.compute_u"), process.module("models.memit.memit_main")
    patches.attribute(rome, "layer_stats", layer_stats)
    patches.attribute(memit, "layer_stats", layer_stats)
    patches.attribute(rome, "inv_mom2_cache", known.rome)
    patches.attribute(memit, "COV_CACHE", known.memit)
