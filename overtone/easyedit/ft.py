"""FT-M and its twin for long free text: the `CrossEntropyLoss` that their modules imported.

Both end by themselves when the mean loss of the target tokens falls below 1e-2. OverTone's floor alone would keep them
running; a held step reports 0, so the trainer's own rule ends the edit.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

from torch import nn

from overtone.easyedit.cross_entropy import CrossEntropyStandIn, running
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
        lacks(module, [execute, "CrossEntropyLoss"])
        or lacks_arguments(getattr(module, execute), ["model", "hparams"])
        or does_not_use(getattr(module, execute), "CrossEntropyLoss")
        or does_not_use(getattr(module, execute), "objective_optimization")
        or (None if issubclass(module.CrossEntropyLoss, nn.CrossEntropyLoss) else "CrossEntropyLoss is not torch's")
    )


def _hook(trainer: Trainer, module: ModuleType, patches: Patches, execute: str) -> None:
    def edit(original: Any, *args: Any, **kwargs: Any) -> Any:
        hparams, model = arguments(original, args, kwargs, "hparams", "model")
        loss = trainer.loss_of(hparams, model)
        if loss is None:
            return original(*args, **kwargs)
        if hparams.objective_optimization != "target_new":
            raise ValueError(
                f"token_loss is not used with objective_optimization {hparams.objective_optimization!r} (FT-L): set "
                "objective_optimization: target_new, which is FT-M, or leave token_loss out"
            )
        with running(loss, model):
            return original(*args, **kwargs)

    patches.attribute(module, "CrossEntropyLoss", CrossEntropyStandIn)
    wrap(patches, module, execute, edit)


def _trainer(name: str, module: str, hparams_class: str, execute: str, optional: bool) -> Trainer:
    return Trainer(
        name,
        preset="ft-m",
        module=module,
        hparams_class=hparams_class,
        way_in=f"CrossEntropyLoss of {module}, while {execute} runs",
        problem=partial(_problem, execute=execute),
        hook=partial(_hook, execute=execute),
        optional=optional,
    )


FT = _trainer("FT", "ft.ft_main", "FTHyperParams", "execute_ft", optional=False)
FT_UNS = _trainer("FT_uns", "ft_uns.ft_uns_main", "FT_uns_HyperParams", "execute_ft_uns", optional=True)
