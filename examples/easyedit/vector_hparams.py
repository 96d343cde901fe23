"""The hparams of the methods that optimise one vector, and what the lab's small model wants of them.

EasyEdit has a file for each but CORE, though not for one model: what a method shares with MEMIT or AlphaEdit comes from
their files for LLaMA-3.2-3b, and the rest is below.
"""

from __future__ import annotations

from pathlib import Path

import unke
from framework import HPARAMS, VECTOR_METHODS, Config, load_config

METHODS = (*VECTOR_METHODS, "UnKE")

OF_RELATIVE = {**dict.fromkeys(("EMMET", "CORE", "EAMET", "PMET", "UnKE"), "MEMIT"), "SPHERE": "AlphaEdit"}
"""Whose file a method without one of its own takes."""

OWN: dict[str, Config] = {
    "EMMET": {"update_norm_lambda": 0, "emmet_lambda": 0.1},
    "EAMET": {
        "ks_bs": 1,
        "clamp_ks_factor": 1,
        "cs_factor": 1,
        "mse_factor": 1,
        "tau": 0.07,
        "norm_factor": 1e-3,
        "delta_init": "target_init",
        "weight_decay_method": "norm",
    },
    "PMET": {
        "clamp_norm_factor": 1,
        "v_weight_decay": 0.5,
        "rewrite_module_tmps": ["model.layers.{}.mlp.down_proj"],
        "mlp_module_tmp": "model.layers.{}.mlp.down_proj",
        "attn_module_tmp": "model.layers.{}.self_attn.o_proj",
        "nll_loss_factor": 1,
    },
    "SPHERE": {"cumulative_ratio": 0.5, "suppression_strength": 0.5},
    "UnKE": unke.OWN,
    "CORE": {"reg_lambda": 0.1, "layer_range": 1},
}
"""EasyEdit's values beyond the relative's; CORE's, of which it has none, are ours."""

_LESS_TO_KEEP: Config = {"mom2_update_weight": 50}
# The first three are EasyEdit's for Qwen2.5.
_MORE_ROOM: Config = {"v_lr": 0.5, "clamp_norm_factor": 4, "v_weight_decay": 1e-3, "nullspace_threshold": 0.5}

SMALL: dict[str, Config] = {
    **dict.fromkeys(("MEMIT", "EMMET", "CORE", "EAMET"), _LESS_TO_KEEP),
    "PMET": _LESS_TO_KEEP | {"clamp_norm_factor": 4},
    **dict.fromkeys(("AlphaEdit", "SPHERE"), _MORE_ROOM),
}
"""What the lab's model wants otherwise, chosen on edits with another seed than the reported ones."""


def as_method(config: Config, method: str) -> Config:
    """The config of a relative as that of a method without a file of its own; a method's own config as it is.

    Raises:
        ValueError: the config is of a method that is no relative.
    """
    if config["alg_name"] == method:
        return config
    relative = OF_RELATIVE.get(method, method)
    if config["alg_name"] != relative:
        raise ValueError(f"{method} takes its values from a file of {relative}, not of {config['alg_name']}")
    return config | {"alg_name": method} | OWN.get(method, {})


def vector_config(method: str, model: str | None, texts: int, statistics: Path) -> Config:
    """A method's config for the lab's model, with the second moments of so many texts in the folder of statistics."""
    file = OF_RELATIVE.get(method, method).lower()
    config = as_method(load_config(HPARAMS / f"{file}-llama-3.2-3b-instruct.yaml", model), method)
    return config | {"stats_dir": str(statistics), "mom2_n_samples": texts} | SMALL.get(method, {})
