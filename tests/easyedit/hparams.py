"""Hparams of the four methods for the tiny models: the lab's, with few steps and small ranks."""

from __future__ import annotations

import functools
from typing import Any

import torch

from overtone.lab.edit.easyedit.hparams import hparams_object, hparams_values

_CHANGES: dict[str, dict[str, Any]] = {
    "FT": {"num_steps": 3, "lr": 1e-2, "batch_size": 1},
    "LoRA": {"num_steps": 3, "lr": 1e-2, "rank": 4, "lora_alpha": 8, "batch_size": 1},
    "MELO": {
        "grace": {"num_iter": 3, "edit_lr": 1e-2, "init_radius": 10.0, "num_edit_per_block": 4, "num_block": 20},
        "lora": {"lora_r": 4, "lora_alpha": 4},
    },
    "WISE": {"n_iter": 3, "edit_lr": 0.1},
}


def build(framework, method, path, **changes):
    """An hparams object as its own class would load it, with any field changed by name."""
    values = hparams_values(method, _model(path), path)
    for name, value in (_CHANGES[method] | {"max_length": 64}).items():
        values[name] = {**values[name], **value} if isinstance(value, dict) else value
    values |= {"model_name": str(path), "device": framework.device}
    if method == "MELO":
        values["model"]["name"] = str(path)
        values["grace"] |= {name: changes.pop(name) for name in ("num_iter",) if name in changes}
        return hparams_object(method, values | changes)
    module = framework.module(f"models.{method.lower()}.{method.lower()}_hparams")
    known = getattr(module, f"{method}HyperParams").__dataclass_fields__
    return hparams_object(method, {name: value for name, value in (values | changes).items() if name in known})


@functools.cache
def _model(path):
    """The folder's model, without its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
