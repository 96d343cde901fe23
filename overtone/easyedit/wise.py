"""WISE: the `CrossEntropyLoss` that its module imported, and what the paper changes with the loss.

The paper shrinks "activation thresholds by 0.6" and trains without context templates (B.1). The templates stay unless
`context_templates: false` takes them away: they are what makes a WISE edit general. Of WISE's thresholds,
`act_ratio` decides at inference whether a query goes to the edited weight: it is compared with how far the edit moved
the activations, and a milder loss moves them less. The margins (alpha, beta, gamma) shape training instead; scaling
them too was tried and changed nothing. So `act_ratio` alone is scaled.

WISE's early stop wants a total loss of at most 0.02, below OverTone's floor; a held step reports 0 for the tokens, so
the stop fires once the activation loss, too, is done. That loss is no term beside the edit but its other half: it
teaches the router, so a held step still follows it.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from contextlib import nullcontext
from types import ModuleType
from typing import Any

from torch import nn

from overtone.easyedit.cross_entropy import CrossEntropyStandIn, running
from overtone.easyedit.hparams import Choice, announce
from overtone.easyedit.patching import Patches
from overtone.easyedit.trainers import (
    MODELS,
    Trainer,
    does_not_use,
    lacks,
    lacks_arguments,
    refuse_encoder_decoder,
    wrap,
)

NO_CONTEXT = ["{}"]


def _ft_loss(cls: type) -> Any:
    """The method that computes the loss of the tokens; its name was mangled before February 2025."""
    names = [name for name in vars(cls) if name.endswith("_cal_ft_loss")]
    return vars(cls)[names[0]] if names else None


def _problem(module: ModuleType) -> str | None:
    main = importlib.import_module(f"{MODELS}.wise.wise_main")
    problem = lacks(module, ["WISE", "CrossEntropyLoss"]) or lacks(main, ["tokenize", "WISE"])
    if problem:
        return problem
    ft_loss = _ft_loss(module.WISE)
    if ft_loss is None:
        return "WISE has no _cal_ft_loss"
    return (
        does_not_use(ft_loss, "CrossEntropyLoss")
        or lacks_arguments(module.WISE.__init__, ["config", "model"])
        or lacks_arguments(module.WISE.edit, ["config", "tokens"])
        or lacks_arguments(main.tokenize, ["context_templates", "hparams"])
        or (None if issubclass(module.CrossEntropyLoss, nn.CrossEntropyLoss) else "CrossEntropyLoss is not torch's")
    )


def _with_scaled_thresholds(config: Any, choice: Choice) -> Any:
    """A copy of the hparams for one editor: the user's own stay as they are, however many edits run on them."""
    scaled = copy.copy(config)
    scaled.act_ratio = config.act_ratio * choice.activation_scale
    if choice.activation_scale != 1:
        announce(f"WISE: act_ratio {config.act_ratio} scaled to {scaled.act_ratio:.4g} (activation_scale)")
    return scaled


def _hook(trainer: Trainer, module: ModuleType, patches: Patches) -> None:
    main = importlib.import_module(f"{MODELS}.wise.wise_main")

    def construct(original: Any, editor: Any, *args: Any, **kwargs: Any) -> None:
        call = inspect.signature(original).bind(editor, *args, **kwargs)
        config = call.arguments["config"]
        choice = trainer.choice_of(config)
        if choice is not None:
            if type(editor) is not module.WISE:
                raise ValueError(
                    f"token_loss is not used by {type(editor).__name__}: leave it out for multimodal edits"
                )
            refuse_encoder_decoder(call.arguments["model"], config)
            call.arguments["config"] = _with_scaled_thresholds(config, choice)
        original(*call.args, **call.kwargs)

    def tokenize(original: Any, *args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(original).bind(*args, **kwargs)
        choice = trainer.choice_of(call.arguments.get("hparams"))
        if choice is not None and not choice.context_templates:
            announce("WISE: context templates off")
            call.arguments["context_templates"] = NO_CONTEXT
        return original(*call.args, **call.kwargs)

    def edit(original: Any, editor: Any, *args: Any, **kwargs: Any) -> Any:
        choice = trainer.choice_of(editor.config)
        if choice is None:
            return original(editor, *args, **kwargs)
        call = inspect.signature(original).bind(editor, *args, **kwargs)
        call.arguments["config"] = editor.config
        with running(choice.loss, editor.model) if choice.loss else nullcontext():
            return original(*call.args, **call.kwargs)

    patches.attribute(module, "CrossEntropyLoss", CrossEntropyStandIn)
    wrap(patches, module.WISE, "__init__", construct)
    wrap(patches, module.WISE, "edit", edit)
    wrap(patches, main, "tokenize", tokenize)


WISE = Trainer(
    "WISE",
    preset="wise",
    module="wise.WISE",
    hparams_class="WISEHyperParams",
    way_in="CrossEntropyLoss of wise.WISE, while WISE.edit runs",
    problem=_problem,
    hook=_hook,
)
