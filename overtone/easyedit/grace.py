"""GRACE and DEFER: the loss that the model inside their editor computes from its labels, while an edit runs.

Neither stops by itself: a held step gives no gradient, so the remaining steps change nothing.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

from overtone.easyedit.model_loss import model_loss
from overtone.easyedit.patching import Patches
from overtone.easyedit.trainers import Trainer, arguments, does_not_use, lacks, lacks_arguments, wrap


def _problem(module: ModuleType, editor: str) -> str | None:
    cls = getattr(module, editor, None)
    return (
        lacks(module, [editor])
        or lacks(cls, ["edit"])
        or lacks_arguments(cls.edit, ["config", "tokens"])  # type: ignore[union-attr]
        or does_not_use(cls.edit, "loss")  # type: ignore[union-attr]
    )


def _hook(trainer: Trainer, module: ModuleType, patches: Patches, editor: str) -> None:
    def edit(original: Any, *args: Any, **kwargs: Any) -> Any:
        itself, hparams = arguments(original, args, kwargs, "self", "config")
        loss = trainer.loss_of(hparams, itself.model)
        if loss is None:
            return original(*args, **kwargs)
        with model_loss(itself.model, loss):
            return original(*args, **kwargs)

    wrap(patches, getattr(module, editor), "edit", edit)


def _trainer(name: str, module: str, hparams_class: str, editor: str) -> Trainer:
    return Trainer(
        name,
        preset="melo",
        module=module,
        hparams_class=hparams_class,
        way_in=f"the model's own loss, while {editor}.edit runs",
        problem=partial(_problem, editor=editor),
        hook=partial(_hook, editor=editor),
        optional=True,
        takes_anchor=False,
    )


GRACE = _trainer("GRACE", "grace.GRACE", "GraceHyperParams", "GRACE")
DEFER = _trainer("DEFER", "defer.DEFER", "DeferHyperParams", "DEFER")
