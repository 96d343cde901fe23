"""Hparams of the four methods for the tiny models."""

from __future__ import annotations


def build(framework, method, path, **changes):
    """An hparams object as its own class would load it, with any field changed by name."""
    values = {**_VALUES[method]("gpt2" in str(path), str(path)), "device": framework.device, **changes}
    if method == "MELO":
        return _melo(framework, values)
    package = {"FT": "ft", "LoRA": "lora", "WISE": "wise"}[method]
    hparams_class = getattr(framework.module(f"models.{package}.{package}_hparams"), f"{method}HyperParams")
    known = set(hparams_class.__dataclass_fields__)
    return hparams_class(**{name: value for name, value in values.items() if name in known})


def _ft(gpt2, path):
    return {
        "layers": [1],
        "num_steps": 3,
        "lr": 1e-2,
        "weight_decay": 0,
        "kl_factor": 0,
        "norm_constraint": False,
        "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj.weight" if gpt2 else "model.layers.{}.mlp.down_proj.weight",
        "layer_module_tmp": "",
        "mlp_module_tmp": "",
        "attn_module_tmp": "",
        "ln_f_module": "",
        "lm_head_module": "",
        "alg_name": "FT",
        "model_name": path,
        "objective_optimization": "target_new",
        "batch_size": 1,
        "max_length": 64,
    }


def _lora(gpt2, path):
    return {
        "lora_type": "lora",
        "layers": [],
        "num_steps": 3,
        "lr": 1e-2,
        "weight_decay": 0,
        "kl_factor": 0,
        "norm_constraint": False,
        "target_modules": ["c_attn"] if gpt2 else ["q_proj", "v_proj"],
        "rank": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "alg_name": "LoRA",
        "model_name": path,
        "batch_size": 1,
        "max_length": 64,
    }


def _wise(gpt2, path):
    return {
        "edit_lr": 0.1,
        "n_iter": 3,
        "objective_optimization": "only_label",
        "mask_ratio": 0.2,
        "alpha": 5.0,
        "beta": 20.0,
        "gamma": 10.0,
        "act_ratio": 0.88,
        "merge_freq": 1000,
        "retrieve": True,
        "replay": False,
        "save_freq": 500,
        "merge_alg": "ties",
        "norm_constraint": 1.0,
        "inner_params": ["transformer.h[1].mlp.c_proj.weight" if gpt2 else "model.layers[1].mlp.down_proj.weight"],
        "weights": 1.0,
        "densities": 0.53,
        "alg_name": "WISE",
        "model_name": path,
        "max_length": 64,
    }


def _melo_values(gpt2, path):
    layer = "transformer.h.{}.mlp.c_fc" if gpt2 else "model.layers.{}.mlp.down_proj"
    return {
        "model_name": path,
        "alg_name": "MELO",
        "model_parallel": False,
        "max_length": 64,
        "task": "hall",
        "lora_task_type": "CAUSAL_LM",
        "check_dir": None,
        "grace": {
            "name": "grace",
            "num_iter": 3,
            "init_radius": 10.0,
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
            "num_block": 20,
            "num_rank_per_block": 2,
            "metric_period": 400,
            "edit_lr": 1e-2,
        },
        "model": {
            "name": path,
            "class_name": "AutoModelForCausalLM",
            "tokenizer_class": "AutoTokenizer",
            "tokenizer_name": path,
            "fan_in_fan_out": gpt2,
            "target_modules": [layer.format(1)],
            "pt": None,
            "grace_layer": layer.format(0),
        },
        "lora": {
            "cls_name": path,
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
            "lora_r": 4,
            "lora_alpha": 4,
            "lora_dropout": 0.0,
        },
    }


def _melo(framework, values):
    module = framework.module("models.melo.melo_hparams")
    num_iter = values.pop("num_iter", None)
    if num_iter is not None:
        values["grace"] = {**values["grace"], "num_iter": num_iter}
    sections = {"grace": module.GRACEHyperParams, "model": module.MODELHyperParams, "lora": module.LoRAHyperParams}
    nested = {name: section(**values[name]) for name, section in sections.items()}
    return module.MELOHyperParams(**{**values, **nested})


_VALUES = {"FT": _ft, "LoRA": _lora, "MELO": _melo_values, "WISE": _wise}
