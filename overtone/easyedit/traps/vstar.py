"""Traps of the methods that optimise one vector."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from overtone.easyedit.traps.trap import Config, Trap

ALPHAEDIT_FAMILIES = ("llama", "qwen", "gpt-j-6b", "gpt2-xl")


def _last_layer(config: Config) -> Iterator[Trap]:
    layers, last = _number_of_layers(config), config.get("v_loss_layer")
    if layers is not None and isinstance(last, int) and last != layers - 1:
        yield Trap(
            f"v_loss_layer {last} is not the last of the model's {layers} layers: the loss reads the target's "
            "probability there, from a model cut short",
            f"v_loss_layer: {layers - 1}",
        )


def _number_of_layers(config: Config) -> int | None:
    """Of the model, where it is on this machine."""
    try:
        from transformers import AutoConfig

        model: Any = AutoConfig.from_pretrained(str(config.get("model_name")), local_files_only=True)
    except (ImportError, OSError, ValueError):
        return None
    layers: int | None = getattr(model.get_text_config(), "num_hidden_layers", None)
    return layers


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


CHECKS = (_last_layer,)
ALPHAEDIT_CHECKS = (_last_layer, _projection)
