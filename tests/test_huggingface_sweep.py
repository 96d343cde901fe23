"""Every causal language model of transformers that can be built tiny: attached cross-entropy changes nothing.

Slow, so not among the tests that run by default: ``pytest -m slow tests/test_huggingface_sweep.py``; with
``OVERTONE_SWEEP=table.md`` it writes what it found.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from overtone import OverToneConfig
from overtone.huggingface import attach

CROSS_ENTROPY = OverToneConfig(lam=1.0, epsilon=0.0)
TINY: tuple[tuple[str, int], ...] = (
    (r"vocab_size(_per_layer_input)?$", 61),
    (
        r"(hidden_size|n_embd|d_model|dim|embedding_size|word_embed_proj_dim|model_dim|hidden_dim|attention_hidden_size)$",
        16,
    ),
    (r"(intermediate_size|n_inner|ffn_dim|d_ff|d_inner|ffn_hidden_size|encoder_ffn_dim|decoder_ffn_dim)$", 32),
    (r"(num_hidden_layers|n_layer|n_layers|num_layers|encoder_layers|decoder_layers|num_decoder_layers)$", 2),
    (r"(num_attention_heads|n_head|n_heads|num_heads|encoder_attention_heads|decoder_attention_heads)$", 2),
    (r"(num_key_value_heads|num_kv_heads|n_head_kv)$", 2),
    (r"(head_dim|d_kv|rotary_dim|kv_channels)$", 8),
    (r"(num_local_experts|num_experts|n_routed_experts|moe_num_experts)$", 4),
    (r"(num_experts_per_tok|moe_topk|moe_k|num_experts_per_token)$", 2),
    (r"(moe_intermediate_size|shared_expert_intermediate_size)$", 16),
    (r"(max_position_embeddings|n_positions|max_seq_len)$", 64),
    (r"(pad_token_id|bos_token_id|eos_token_id)$", 0),
)
PARAMETERS_AT_MOST = 60_000_000
CLASSES = sorted({(config.__name__, config) for config in MODEL_FOR_CAUSAL_LM_MAPPING}, key=lambda pair: pair[0])


def shrink(config: Any) -> Any:
    """The configuration with every size that is known by name made small, in its parts too."""
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            shrink(value)
        elif isinstance(value, list) and name.endswith(("layer_types", "layers_block_type")):
            setattr(config, name, value[-2:])
        elif isinstance(value, int) and not isinstance(value, bool):
            for pattern, size in TINY:
                if re.fullmatch(pattern, name) and (value > size or "token_id" in name):
                    setattr(config, name, size)
    return config


def build(kind: Any) -> Any:
    """A tiny model of that configuration, or a skip that says why there is none."""
    torch.manual_seed(0)
    try:
        config = shrink(kind())
        config.use_cache = False
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
        if size > PARAMETERS_AT_MOST:
            pytest.skip(f"{size / 1e6:.0f} M parameters")
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()
    except Exception as error:
        pytest.skip(f"no tiny model: {type(error).__name__}: {str(error)[:60]}")


def step(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(0)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def compare(model: Any, ids: torch.Tensor, fused: bool) -> str:
    loss, gradients = step(model, ids)
    try:
        handle = attach(model, CROSS_ENTROPY, fused=fused)
    except ValueError as error:
        return "refused: " + re.sub(r"[;,(].*", "", str(error))[:90]
    with handle:
        attached_loss, attached_gradients = step(model, ids)
    scale = max((gradient.abs().max().item() for gradient in gradients.values()), default=1.0)
    torch.testing.assert_close(attached_loss.float(), loss.float(), rtol=1e-4, atol=1e-5)
    assert attached_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(attached_gradients[name], gradient, rtol=1e-3, atol=1e-4 * scale, msg=name)
    return "same"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), CLASSES, ids=[name for name, _ in CLASSES])
def test_attached_cross_entropy_is_the_models_own_loss(name, kind):
    """In value and in every gradient, from logits and from hidden states, or refused by name."""
    model = build(kind)
    ids = torch.randint(3, 61, (3, 9), generator=torch.Generator().manual_seed(0))
    try:
        step(model, ids)
    except Exception as error:
        pytest.skip(f"no training step: {type(error).__name__}: {str(error)[:60]}")
    found = [compare(model, ids, fused) for fused in (False, True)]
    if path := os.environ.get("OVERTONE_SWEEP"):
        with Path(path).open("a") as table:
            table.write(f"| {type(model).__name__} | {found[0]} | {found[1]} |\n")
