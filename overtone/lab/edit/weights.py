"""The weights that FT-M and LoRA move.

Each context opens a few weights of a model for training and at its end leaves the model as it found it, bit for bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def open_down_projection(model: Any, *, layer: int | None = None) -> Iterator[list[nn.Parameter]]:
    """FT-M: open one MLP's down-projection weight for training; restore it at the end.

    Args:
        model: a causal language model with `mlp.down_proj` (LLaMA, Qwen2, Mistral) or `mlp.c_proj` (GPT-2).
        layer: which block; None: two thirds up the model, where EasyEdit edits LLaMA 2 (21 of 32).

    Raises:
        ValueError: the model has no such weight, or not so many layers.
    """
    weight = _down_projection(model, layer)
    saved = weight.detach().clone()
    with frozen(model):
        weight.requires_grad_(True)
        try:
            yield [weight]
        finally:
            weight.grad = None
            with torch.no_grad():
                weight.copy_(saved)


@contextmanager
def open_lora(
    model: Any, *, rank: int = 8, alpha: int = 32, target_modules: Sequence[str] | None = None, seed: int = 0
) -> Iterator[list[nn.Parameter]]:
    """LoRA: put PEFT adapters on some projections; take them off at the end.

    Args:
        model: a causal language model.
        rank: of the adapters.
        alpha: the adapters' output is scaled by alpha / rank.
        target_modules: which modules get an adapter; None: `q_proj` and `v_proj`, or GPT-2's joint `c_attn`.
        seed: of the adapters' random half; the global random state is left alone.

    Raises:
        ImportError: PEFT is not there.
        ValueError: the model has no such modules, or rank is more than they can use.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError('the lab needs PEFT: pip install "overtone[lab]"') from error

    is_gpt2 = any(name.endswith(".c_attn") for name, _ in model.named_modules())
    if target_modules is None:
        target_modules = ["c_attn"] if is_gpt2 else ["q_proj", "v_proj"]
    _require_adaptable(model, target_modules, rank)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=list(target_modules),
        fan_in_fan_out=is_gpt2,
    )
    with frozen(model):
        with torch.random.fork_rng(), warnings.catch_warnings():
            # PEFT asks transformers for an attribute that transformers has renamed.
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            torch.manual_seed(seed)
            adapted = get_peft_model(model, config)
        adapted.eval()
        try:
            yield [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        finally:
            adapted.unload()
            # Older versions of PEFT leave their configuration on the model.
            vars(model).pop("peft_config", None)


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Evaluation mode (no dropout) and no weight that wants a gradient, as long as the context lasts."""
    modes = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, requires_grad in wanted.items():
            parameter.requires_grad_(requires_grad)


def _require_adaptable(model: Any, target_modules: Sequence[str], rank: int) -> None:
    from transformers.pytorch_utils import Conv1D

    weights = {
        f".{name}": module.weight
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding, Conv1D))
    }
    found = {wanted: [place for place in weights if place.endswith(f".{wanted}")] for wanted in target_modules}
    if not found or not all(found.values()):
        raise ValueError(
            f"target_modules must name layers of {type(model).__name__}, got "
            f"{', '.join(map(repr, target_modules)) or 'none'}: choose --target-modules from "
            f"{', '.join(dict.fromkeys(place.rpartition('.')[2] for place in weights))}"
        )
    widest = max(min(weights[place].shape) for places in found.values() for place in places)
    if rank > widest:
        raise ValueError(f"rank must be at most {widest}, the width of the layers that LoRA adapts, got {rank}")


def _down_projection(model: Any, layer: int | None) -> nn.Parameter:
    projections: list[nn.Parameter] = [
        parameter
        for name, parameter in model.named_parameters()
        if name.endswith((".mlp.down_proj.weight", ".mlp.c_proj.weight"))
    ]
    if not projections:
        raise ValueError(f"model {type(model).__name__} has no mlp.down_proj or mlp.c_proj weight for FT-M to edit")
    if layer is None:
        layer = 2 * len(projections) // 3
    if not 0 <= layer < len(projections):
        raise ValueError(f"layer is {layer}, but {type(model).__name__} has layers 0 to {len(projections) - 1}")
    return projections[layer]
