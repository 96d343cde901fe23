"""Real transformers architectures of a few thousand parameters, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
)

VOCABULARY = 61
PAD = 0
_TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**_TOKENS, **_SIZES),
    "gpt2": lambda: GPT2Config(**_TOKENS, n_embd=16, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0.1),
    "qwen2": lambda: Qwen2Config(**_TOKENS, **_SIZES),
    "mistral": lambda: MistralConfig(**_TOKENS, **_SIZES),
    "gemma": lambda: GemmaConfig(**_TOKENS, **_SIZES),
    "mixtral": lambda: MixtralConfig(
        **_TOKENS, **_SIZES, num_local_experts=2, output_router_logits=True, router_aux_loss_coef=0.5
    ),
}
ARCHITECTURES = sorted(CONFIGS)


def build(arch: str = "llama", *, layers: int = 2, sharpness: float = 30.0, dtype: torch.dtype = torch.float32) -> Any:
    """A seeded random model in evaluation mode whose predictions are sharp, so that the filter and the check differ.

    torch.compile takes a second or two for each layer, and finds nothing else in a second one.
    """
    torch.manual_seed(0)
    config = CONFIGS[arch]()
    config.num_hidden_layers = layers
    model = AutoModelForCausalLM.from_config(config).eval()
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach() * sharpness)
    return model.to(dtype)


def ragged_batch(model: Any, lengths: tuple[int, ...] = (9, 5, 7), seed: int = 1) -> dict[str, Tensor]:
    """Right-padded sequences, half of whose labels are the model's own top token: settled, mixed and plain tokens."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    input_ids = torch.randint(3, VOCABULARY, (len(lengths), width), generator=generator)
    attention_mask = torch.stack([(torch.arange(width) < length).long() for length in lengths])
    input_ids[attention_mask == 0] = PAD
    with torch.no_grad():
        best = model(input_ids=input_ids, attention_mask=attention_mask).logits.argmax(dim=-1)
    labels = input_ids.clone()
    labels[:, 1::2] = best[:, 0 : width - 1 : 2]
    labels[attention_mask == 0] = -100
    labels[0, :3] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
