"""The hparams of EasyEdit's methods, fitted to the model at hand: its depth, its names, its size.

The values are those of EasyEdit's LLaMA-2-7b-chat files with the paper's changes (appendix B.1), as explained in
examples/easyedit/hparams. Models of a few million parameters, such as the lab's, want other steps: what differs for
them stands in `SMALL`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SMALL_MODEL = 20_000_000
"""Below this many parameters the values in `SMALL` apply."""

SMALL: dict[str, dict[str, Any]] = {
    "FT": {"lr": 5e-3},
    "LoRA": {"num_steps": 50},
    "MELO": {"edit_lr": 5e-3, "init_radius": 3.0, "num_block": 120, "num_edit_per_block": 1},
    "WISE": {"n_iter": 50},
    "ROME": {"v_lr": 1.0},
    "MEMIT": {"v_lr": 1.0, "mom2_update_weight": 50.0},
}

_DEPTH = 32  # of LLaMA-2-7b, for which the layers were chosen


@dataclass(frozen=True)
class Architecture:
    """Where a family of models keeps what EasyEdit wants to know by name."""

    block: str
    down_projection: str
    attention: str
    final_norm: str
    embedding: str
    lora_targets: tuple[str, ...]
    transposed: bool = False


LLAMA_LIKE = Architecture(
    block="model.layers.{}",
    down_projection="mlp.down_proj",
    attention="self_attn",
    final_norm="model.norm",
    embedding="model.embed_tokens",
    lora_targets=("q_proj", "v_proj"),
)
GPT2 = Architecture(
    block="transformer.h.{}",
    down_projection="mlp.c_proj",
    attention="attn",
    final_norm="transformer.ln_f",
    embedding="transformer.wte",
    lora_targets=("c_attn",),
    transposed=True,
)


@dataclass(frozen=True)
class _Target:
    """What the values of every method are made for."""

    model: Any
    architecture: Architecture
    tokenizer_folder: Path

    def layer(self, layer: int) -> int:
        """LLaMA-2-7b's layer, moved to the same relative depth of a shallower model."""
        depth: int = self.model.config.num_hidden_layers
        return layer * depth // _DEPTH if depth < _DEPTH else layer

    def layers(self, layers: Iterable[int]) -> list[int]:
        return sorted({self.layer(layer) for layer in layers})

    def down_projection(self, layer: int | str) -> str:
        return f"{self.architecture.block.format(layer)}.{self.architecture.down_projection}"

    @property
    def modules(self) -> dict[str, str]:
        block = self.architecture.block
        names = {name for name, _ in self.model.named_parameters()}
        return {
            "layer_module_tmp": block,
            "mlp_module_tmp": f"{block}.mlp",
            "attn_module_tmp": f"{block}.{self.architecture.attention}",
            "ln_f_module": self.architecture.final_norm,
            # A tied output layer has no parameter of its own name.
            "lm_head_module": "lm_head" if "lm_head.weight" in names else self.architecture.embedding,
        }


def hparams_values(alg_name: str, model: Any, tokenizer_folder: Path) -> dict[str, Any]:
    """What EasyEdit's hparams of a method say for a model; arguments and errors as of `make_hparams`."""
    target = _Target(model, architecture_of(model), tokenizer_folder)
    values = {
        "alg_name": alg_name,
        "model_name": model.config.model_type,
        "device": str(model.device),
        "model_parallel": False,
        **_VALUES[alg_name](target),
    }
    small = SMALL[alg_name] if model.num_parameters() < SMALL_MODEL else {}
    (values["grace"] if alg_name == "MELO" else values).update(small)
    return values


def make_hparams(alg_name: str, model: Any, tokenizer_folder: Path) -> Any:
    """EasyEdit's hparams object of a method for a model.

    Args:
        alg_name: FT, LoRA, MELO, WISE, ROME or MEMIT.
        model: a Hugging Face causal language model, as LLaMA or GPT-2 are built.
        tokenizer_folder: with the model's tokenizer; MELO loads it.

    Raises:
        ValueError: the model is built otherwise.
    """
    return hparams_object(alg_name, hparams_values(alg_name, model, tokenizer_folder))


def hparams_object(alg_name: str, values: dict[str, Any]) -> Any:
    """EasyEdit's hparams object of a method with these values, each by the name of its field."""
    package = alg_name.lower()
    module = importlib.import_module(f"easyeditor.models.{package}.{package}_hparams")
    if alg_name == "MELO":
        sections = {"grace": module.GRACEHyperParams, "model": module.MODELHyperParams, "lora": module.LoRAHyperParams}
        values = values | {name: section(**values[name]) for name, section in sections.items()}
    return getattr(module, f"{alg_name}HyperParams")(**values)


def architecture_of(model: Any) -> Architecture:
    """Which family the model belongs to.

    Raises:
        ValueError: neither.
    """
    modules = dict(model.named_modules())
    for architecture in (LLAMA_LIKE, GPT2):
        if f"{architecture.block.format(0)}.{architecture.down_projection}" in modules:
            return architecture
    raise ValueError(
        f"model {type(model).__name__} is not built like LLaMA (model.layers.N.mlp.down_proj) or GPT-2 "
        "(transformer.h.N.mlp.c_proj): edit it with the lab's own methods"
    )


def edited_weights(hparams: Any) -> list[str]:
    """The names of the weights that FT, ROME and MEMIT change."""
    template = hparams.rewrite_module_tmp.removesuffix(".weight")
    return [f"{template.format(layer)}.weight" for layer in hparams.layers]


def most_steps(hparams: Any) -> int:
    """How many optimiser steps one edit takes where nothing ends it earlier."""
    if hparams.alg_name in ("ROME", "MEMIT"):
        return int(hparams.v_num_grad_steps) - 1  # the last evaluation is not followed by a step
    source = hparams.grace if hparams.alg_name == "MELO" else hparams
    name = {"MELO": "num_iter", "WISE": "n_iter"}.get(hparams.alg_name, "num_steps")
    return int(getattr(source, name))


def _ft(target: _Target) -> dict[str, Any]:
    return {
        **target.modules,
        "layers": [target.layer(21)],
        "num_steps": 25,
        "lr": 5e-4,
        "weight_decay": 0,
        "kl_factor": 0,
        "norm_constraint": False,
        "objective_optimization": "target_new",
        "rewrite_module_tmp": f"{target.down_projection('{}')}.weight",
    }


def _lora(target: _Target) -> dict[str, Any]:
    return {
        "lora_type": "lora",
        "layers": [],
        "num_steps": 70,
        "lr": 5e-3,
        "weight_decay": 0,
        "kl_factor": 0,
        "norm_constraint": False,
        "rank": 8,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "target_modules": list(target.architecture.lora_targets),
    }


def _melo(target: _Target) -> dict[str, Any]:
    folder = str(target.tokenizer_folder)
    layers = target.layers((29, 30))
    return {
        "max_length": 512,
        "task": "hall",
        "lora_task_type": "CAUSAL_LM",
        "check_dir": None,
        "grace": {
            "name": "grace",
            "num_iter": 50,
            "init_radius": 60.0,
            "dist_fn": "euc",
            "val_init": "cold",
            "val_train": "sgd",
            "val_reg": None,
            "reg": "early_stop",
            "replacement": "replace_prompt",
            "expand_mode": "moving_avg",
            "num_pert": 8,
            "key_id": -1,
            "num_edit_per_block": 4,
            "num_block": 350,
            "num_rank_per_block": 2,
            "metric_period": 400,
            "edit_lr": 1e-3,
        },
        "model": {
            "name": target.model.config.model_type,
            "class_name": "AutoModelForCausalLM",
            "tokenizer_class": "AutoTokenizer",
            "tokenizer_name": folder,
            "fan_in_fan_out": target.architecture.transposed,
            "target_modules": [target.down_projection(layer) for layer in layers],
            "pt": None,
            "grace_layer": target.down_projection(max(layers[0] - 1, 0)),
        },
        "lora": {
            "cls_name": folder,
            "cls_class": "AutoModel",
            "supervised": True,
            "cos": False,
            "freeze": None,
            "square": True,
            "bound_embeds": False,
            "use_all_negatives": False,
            "freeze_lora": False,
            "dist_heads": 1,
            "cross_attend": False,
            "soft_weighting": False,
            "checkpoint_grad": False,
            "lora_r": 64,
            "lora_alpha": 64,
            "lora_dropout": 0.0,
        },
    }


def _wise(target: _Target) -> dict[str, Any]:
    # EasyEdit evaluates the path as Python, so the layer's number stands in brackets.
    path = target.down_projection("{}").replace(".{}", "[{}]").format(target.layer(27))
    return {
        "mask_ratio": 0.2,
        "edit_lr": 1.0,
        "n_iter": 70,
        "norm_constraint": 1.0,
        "alpha": 5.0,
        "beta": 20.0,
        "gamma": 10.0,
        "act_ratio": 0.88,
        "save_freq": 500,
        "merge_freq": 1000,
        "merge_alg": "ties",
        "objective_optimization": "only_label",
        "inner_params": [f"{path}.weight"],
        "densities": 0.53,
        "weights": 1.0,
        "retrieve": True,
        "replay": False,
    }


def _locate_and_edit(target: _Target) -> dict[str, Any]:
    return {
        **target.modules,
        "fact_token": "subject_last",
        "v_num_grad_steps": 25,
        "v_lr": 5e-1,
        "v_loss_layer": target.model.config.num_hidden_layers - 1,
        "v_weight_decay": 1e-3,
        "clamp_norm_factor": 4,
        "kl_factor": 0.0625,
        "mom2_adjustment": True,
        "rewrite_module_tmp": target.down_projection("{}"),
        # The session answers EasyEdit's question for the statistics itself: no data set is loaded.
        "mom2_dataset": "wikipedia",
        "mom2_n_samples": 100_000,
        "mom2_dtype": "float64",
        "stats_dir": "",
    }


def _rome(target: _Target) -> dict[str, Any]:
    return {
        **_locate_and_edit(target),
        "layers": [target.layer(5)],
        "context_template_length_params": [[5, 10], [10, 10]],
    }


def _memit(target: _Target) -> dict[str, Any]:
    layers = target.layers((4, 5, 6, 7, 8))
    return {
        **_locate_and_edit(target),
        "layers": layers,
        "layer_selection": "all",
        "mom2_update_weight": 15_000,
    }


_VALUES: dict[str, Callable[[_Target], dict[str, Any]]] = {
    "FT": _ft,
    "LoRA": _lora,
    "MELO": _melo,
    "WISE": _wise,
    "ROME": _rome,
    "MEMIT": _memit,
}
