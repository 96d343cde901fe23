"""MELO: the loss that the model inside its own copy of PEFT computes from its labels, while an edit runs."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from overtone.easyedit.model_loss import model_loss
from overtone.easyedit.patching import Patches
from overtone.easyedit.trainers import Trainer, does_not_use, lacks, lacks_arguments, wrap


def _problem(module: ModuleType) -> str | None:
    return (
        lacks(module, ["LORA"])
        or lacks(module.LORA, ["edit"])
        or lacks_arguments(module.LORA.edit, ["tokens"])
        or does_not_use(module.LORA.edit, "loss")
        or does_not_use(module.LORA.__init__, "get_peft_model")
    )


def _hook(trainer: Trainer, module: ModuleType, patches: Patches) -> None:
    def edit(original: Any, editor: Any, tokens: Any) -> Any:
        loss = trainer.loss_of(editor.config, editor.model.get_base_model())
        if loss is None:
            return original(editor, tokens)
        with model_loss(editor.model, loss):
            return original(editor, tokens)

    wrap(patches, module.LORA, "edit", edit)


MELO = Trainer(
    "MELO",
    preset="melo",
    module="melo.melo",
    hparams_class="MELOHyperParams",
    way_in="the innermost model's loss, while LORA.edit runs",
    problem=_problem,
    hook=_hook,
)
