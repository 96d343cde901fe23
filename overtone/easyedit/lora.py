"""LoRA, QLoRA and LoRA's twin for long free text: the loss that the model inside PEFT computes from its labels.

PEFT's own addition to it (AdaLoRA's orthogonality term) stays. None of these trainers stops by itself: a held step
gives no gradient, so the remaining steps change nothing.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

from overtone.easyedit.model_loss import model_loss
from overtone.easyedit.patching import Patches
from overtone.easyedit.running import choice_of
from overtone.easyedit.trainers import (
    Trainer,
    argument,
    does_not_use,
    lacks,
    lacks_arguments,
    refuse_encoder_decoder,
    wrap,
)


def _problem(module: ModuleType, execute: str) -> str | None:
    return (
        lacks(module, [execute])
        or lacks_arguments(getattr(module, execute), ["model", "hparams"])
        or does_not_use(getattr(module, execute), "loss")
    )


def _hook(module: ModuleType, patches: Patches, name: str, execute: str) -> None:
    def edit(original: Any, *args: Any, **kwargs: Any) -> Any:
        hparams = argument(original, args, kwargs, "hparams")
        choice = choice_of(hparams, name, "lora")
        if choice is None or choice.loss is None:
            return original(*args, **kwargs)
        model = argument(original, args, kwargs, "model")
        refuse_encoder_decoder(model, hparams)
        with model_loss(model, choice.loss):
            return original(*args, **kwargs)

    wrap(patches, module, execute, edit)


def _trainer(name: str, module: str, hparams_class: str, execute: str, optional: bool) -> Trainer:
    return Trainer(
        name,
        preset="lora",
        module=module,
        hparams_class=hparams_class,
        way_in=f"the innermost model's loss, while {execute} runs",
        problem=partial(_problem, execute=execute),
        hook=partial(_hook, name=name, execute=execute),
        optional=optional,
    )


LORA = _trainer("LoRA", "lora.lora_main", "LoRAHyperParams", "execute_lora", optional=False)
QLORA = _trainer("QLoRA", "qlora.qlora_main", "QLoRAHyperParams", "execute_qlora", optional=True)
LORA_UNS = _trainer("LoRA_uns", "lora_uns.lora_uns_main", "LoRA_uns_HyperParams", "execute_lora_uns", optional=True)
