"""Traps of the methods that optimise one vector."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from overtone.easyedit.traps.trap import Config, Trap

ALPHAEDIT_FAMILIES = ("llama", "qwen", "gpt-j-6b", "gpt2-xl")

NORM_AFTER_MLP = ("gemma2", "gemma3_text", "gemma4_text", "glm4", "olmo2", "olmo3", "flex_olmo", "exaone4", "afmoe")
"""Types of models that put a norm between an MLP and the residual stream that it is added to."""


def _last_layer(config: Config) -> Iterator[Trap]:
    layers, last = getattr(_text_config(config), "num_hidden_layers", None), config.get("v_loss_layer")
    if layers is not None and isinstance(last, int) and last != layers - 1:
        yield Trap(
            f"v_loss_layer {last} is not the last of the model's {layers} layers: the loss reads the target's "
            "probability there, from a model cut short",
            f"v_loss_layer: {layers - 1}",
        )


def _norm_after_mlp(config: Config) -> Iterator[Trap]:
    model_type = getattr(_text_config(config), "model_type", None)
    if model_type in NORM_AFTER_MLP:
        yield Trap(
            f"models of type {model_type} put a norm after each MLP: what {config['alg_name']} writes into down_proj "
            "reaches the layer's output turned and scaled by it, so that the edit misses its vector",
            "ROME or R-ROME, whose vector is the MLP's own output; or one layer with examples/easyedit/knowedit.py "
            "--at-mlp in overtone's repository, which optimises that with the others, too",
        )


def _text_config(config: Config) -> Any:
    """The model's, where it is on this machine; else None."""
    try:
        from transformers import AutoConfig

        # Never the model's own code, about which transformers would ask at the terminal.
        name = str(config.get("model_name"))
        model: Any = AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        return model.get_text_config()
    # Whatever is wrong with the model's file, its own trainer will say; here it is only not known.
    except Exception:
        return None


def _projection(config: Config) -> Iterator[Trap]:
    name = str(config.get("model_name", "")).lower()
    if not any(family in name for family in ALPHAEDIT_FAMILIES):
        yield Trap(
            f"AlphaEdit makes no projection for model_name {name!r}, and fails without one",
            f"a path that contains one of {', '.join(ALPHAEDIT_FAMILIES)}: for a model built like LLaMA, llama",
            fatal=True,
        )
    yield Trap(
        "AlphaEdit writes its projection to ./null_space_project.pt, whatever P_loc says, and takes one that it finds "
        "at P_loc for the model's own",
        "a working folder of its own for each model and each choice of layers",
        always=True,
    )


def _keys_of_earlier_edits(config: Config) -> Iterator[Trap]:
    yield Trap(
        f"{config['alg_name']} keeps the keys of every edit in its module, and holds later edits to them: single edits "
        "are not independent, nor are runs with several losses in one process",
        "cache_c_new = False in the module of its apply function before each edit that is to know of no other",
        always=True,
    )


def _not_taken_back(config: Config) -> Iterator[Trap]:
    yield Trap(
        "EMMET hands no weights back, so that a single edit is never taken back and the next one begins with it",
        "a new editor for each edit",
        always=True,
    )


CHECKS = (_last_layer,)
"""Of those whose vector is the output of the MLP, or that train a whole layer."""

LAYER_CHECKS = (_last_layer, _norm_after_mlp)
"""Of those that write into an MLP what is to come out of its layer."""

EMMET_CHECKS = (*LAYER_CHECKS, _not_taken_back)
ALPHAEDIT_CHECKS = (*LAYER_CHECKS, _projection, _keys_of_earlier_edits)
SPHERE_CHECKS = (*LAYER_CHECKS, _keys_of_earlier_edits)
