"""What PEFT's wrappers do with a loss and with the length of a sequence, where they do something of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def peft_wrappers(inside: nn.Module, causal_lm: nn.Module) -> Iterator[nn.Module]:
    """PEFT's modules around a model, outermost first."""
    for module in inside.modules():
        if module is causal_lm:
            return
        if is_of_peft(module) and any(inner is causal_lm for inner in module.modules()):
            yield module


def keeps_forward_of(causal_lm: nn.Module, wrapper: nn.Module) -> bool:
    """Whether a wrapper has the model's forward as its own, taken when it was made (PEFT's AdaptionPrompt)."""
    return getattr(wrapper.__dict__.get("forward"), "__self__", None) is causal_lm


def is_of_peft(module: nn.Module) -> bool:
    """Whether PEFT wrote a module's class."""
    return type(module).__module__.startswith("peft.")


def refuse_replaced_loss(wrapper: Any) -> None:
    """Raise a ValueError for a wrapper that computes a loss of its own whatever the model's is."""
    if _type_of(getattr(wrapper, "active_peft_config", None)) == "CPT":
        raise ValueError(
            "model must compute its own loss, got PEFT's CPT around it, which replaces the loss by one that weighs its "
            "context; train it with another tuner (prompt tuning is the nearest)"
        )


def added_loss(wrapper: Any) -> str | None:
    """What a wrapper adds to a loss that the model computes, and to no other; or None."""
    configs = getattr(wrapper, "peft_config", None)
    for config in configs.values() if isinstance(configs, dict) else ():
        if _type_of(config) == "ADALORA" and config.orth_reg_weight > 0:
            return f"AdaLoRA's orthogonality term (orth_reg_weight={config.orth_reg_weight})"
        if _type_of(config) == "SHADOW" and config.auxiliary_loss_weight > 0:
            return f"Shadow's auxiliary loss (auxiliary_loss_weight={config.auxiliary_loss_weight})"
    return None


def virtual_tokens(model: nn.Module) -> int:
    """By how many tokens prompt tuning and its kin lengthen the logits of a model, bare or wrapped."""
    for module in model.modules():
        config: Any = getattr(module, "active_peft_config", None) if is_of_peft(module) else None
        # Prefix tuning's tokens are keys and values, and have no logits.
        if getattr(config, "is_prompt_learning", False) and _type_of(config) not in ("PREFIX_TUNING", "CARTRIDGE"):
            return int(config.num_virtual_tokens)
    return 0


def for_virtual_tokens(per_token: Tensor, length: int, fill: int) -> Tensor:
    """Values ``(batch, sequence)`` lengthened on the left to the length of the logits."""
    return torch.nn.functional.pad(per_token, (length - per_token.shape[-1], 0), value=fill)


def _type_of(config: Any) -> str:
    return str(getattr(getattr(config, "peft_type", None), "value", ""))


def has_adapters(model: nn.Module) -> bool:
    """Whether there is any layer of PEFT's in a model that can be switched off."""
    return any(True for _ in _switchable(model))


def has_merged_adapters(model: nn.Module) -> bool:
    """Whether PEFT has added an adapter to the weights below it; its layers take it out, for good, to do without."""
    return any(getattr(module, "merged", False) for module in _switchable(model))


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The model below PEFT's adapters, every layer as it was afterwards.

    PEFT's own ``disable_adapter`` makes every parameter of the active adapters trainable on its way out, frozen ones
    too.
    """
    enabled = [module for module in _switchable(model) if not module._disable_adapters]
    try:
        for module in enabled:
            module._disable_adapters = True
        yield
    finally:
        for module in enabled:
            module._disable_adapters = False


def changes_base_weights(inside: nn.Module) -> str | None:
    """An initialisation of LoRA that takes away from the weights what it puts into the adapter; or None."""
    for module in inside.modules():
        configs = getattr(module, "peft_config", None)
        for config in configs.values() if isinstance(configs, dict) else ():
            how = getattr(config, "init_lora_weights", None)
            if isinstance(how, str) and how.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
                return f"init_lora_weights={how!r}"
    return None


def _switchable(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if is_of_peft(module) and hasattr(module, "_disable_adapters"))
