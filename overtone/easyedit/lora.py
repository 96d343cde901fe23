"""LoRA, QLoRA and LoRA's twin for long free text: the loss that the model inside PEFT computes from its labels.

PEFT's own addition to it (AdaLoRA's orthogonality term) stays, but moves nothing in a held step. None of these trainers
stops by itself: a held step gives no gradient, so the remaining steps change nothing.

They freeze every weight of the model that they edit and switch its cache off, for good; after an edit with our loss
both come back with `unload`.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

from torch import nn

from overtone.easyedit.innermost import innermost
from overtone.easyedit.model_loss import model_loss
from overtone.easyedit.patching import Patches
from overtone.easyedit.trainers import (
    Trainer,
    arguments,
    does_not_use,
    lacks,
    lacks_arguments,
    wrap,
)


def _problem(module: ModuleType, execute: str) -> str | None:
    return (
        lacks(module, [execute])
        or lacks_arguments(getattr(module, execute), ["model", "hparams"])
        or does_not_use(getattr(module, execute), "loss")
    )


def _hook(trainer: Trainer, module: ModuleType, patches: Patches, execute: str) -> None:
    def edit(original: Any, *args: Any, **kwargs: Any) -> Any:
        hparams, model = arguments(original, args, kwargs, "hparams", "model")
        loss = trainer.loss_of(hparams, model)
        if loss is None:
            return original(*args, **kwargs)
        before = _State(model)
        with model_loss(model, loss):
            edited = original(*args, **kwargs)
        if hasattr(edited, "unload") and not hasattr(model, "unload"):
            edited.unload = partial(_unload, edited, before)
        return edited

    wrap(patches, module, execute, edit)


class _State:
    """Which weights of a model want a gradient, and whether it caches, to be put back."""

    def __init__(self, model: nn.Module) -> None:
        self._trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._use_cache = getattr(model.config, "use_cache", None)

    def restore(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self._trained)
        if self._use_cache is not None:
            model.config.use_cache = self._use_cache  # type: ignore[union-attr]


def _unload(edited: Any, before: _State) -> Any:
    """PEFT's `unload`, and what the edit had switched off with it."""
    del edited.unload
    model = edited.unload()
    before.restore(innermost(model))
    return model


def _trainer(
    name: str, module: str, hparams_class: str, execute: str, *, optional: bool = True, takes_anchor: bool = True
) -> Trainer:
    return Trainer(
        name,
        preset="lora",
        module=module,
        hparams_class=hparams_class,
        way_in=f"the innermost model's loss, while {execute} runs",
        problem=partial(_problem, execute=execute),
        hook=partial(_hook, execute=execute),
        optional=optional,
        takes_anchor=takes_anchor,
    )


LORA = _trainer("LoRA", "lora.lora_main", "LoRAHyperParams", "execute_lora", optional=False)
LORA_UNS = _trainer("LoRA_uns", "lora_uns.lora_uns_main", "LoRA_uns_HyperParams", "execute_lora_uns")
# Its labels are the target alone, from the first position on: no prompt leads to them.
QLORA = _trainer("QLoRA", "qlora.qlora_main", "QLoRAHyperParams", "execute_qlora", takes_anchor=False)
