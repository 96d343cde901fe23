"""LoRA."""

from .lora_main import LoRAHyperParams, apply_lora_to_model, execute_lora

__all__ = ["LoRAHyperParams", "apply_lora_to_model", "execute_lora"]
