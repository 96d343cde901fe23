"""Every causal language model of transformers that can be built tiny: attached cross-entropy changes nothing.

Slow, so not among the tests that run by default: ``pytest -m slow tests/test_huggingface_sweep.py``; with
``OVERTONE_SWEEP=table.csv`` it writes what it found.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from overtone import OverToneConfig
from overtone.huggingface import attach

CROSS_ENTROPY = OverToneConfig(lam=1.0, epsilon=0.0)
TINY: tuple[tuple[str, int], ...] = (
    (r"(decoder_)?vocab_size(_per_layer_input)?", 61),
    (
        r"hidden_size|n_embd|d_model|dim|emb_dim|embedding_(size|dim)|word_embed_proj_dim|model_dim|hidden_dim|"
        r"attention_hidden_size|mamba_intermediate_size",
        16,
    ),
    (r"intermediate_size|n_inner|ffn_dim|d_ff|d_inner|(expert_)?ffn_hidden_size|(en|de)coder_ffn_dim", 32),
    (r"num_hidden_layers|n_layers?|num_layers|(num_)?(en|de)coder_layers|num_blocks", 2),
    (r"num_attention_heads|n_heads?|num_heads|(en|de)coder_attention_heads", 2),
    (r"num_key_value_heads|num_kv_heads|n_head_kv", 2),
    (r"head_dim|d_kv|rotary_dim|kv_channels|qk_(no|ro)pe_head_dim|v_head_dim", 8),
    (r"[qk]v?_lora_rank", 16),
    (r"n_group|num_expert_group|topk_group|mamba_n_?groups|n_groups|first_k_dense_replace|num_dense_layers", 1),
    (r"num_local_experts|num_experts|n_routed_experts|moe_num_experts|zero_expert_num", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k", 2),
    (r"moe_intermediate_size|shared_(expert_)?intermediate_size", 16),
    (r"(mamba_)?(d_)?state(_size)?|mamba_d_state|(mamba_)?chunk_size", 8),
    (r"mamba_n_heads|n_mamba_heads|linear_num_(key|value)_heads", 4),
    (r"mamba_d_head|mamba_headdim|linear_(key|value)_head_dim", 8),
    (r"max_position_embeddings|n_positions|max_seq_len|n_ctx", 64),
    (r"(pad|bos|eos)_token_id", 0),
)
MORE: dict[str, dict[str, Any]] = {
    "CodeGenConfig": {"n_head": 4, "n_embd": 32},
    "Mamba2Config": {"num_heads": 4},
    "HunYuanDenseV1Config": {"head_dim": 8},
    "HunYuanMoEV1Config": {"head_dim": 8},
    "MinistralConfig": {"head_dim": 8},
    "NemotronConfig": {"num_key_value_heads": 2},
    "LongcatFlashConfig": {"qk_head_dim": 16},
    "DeepseekV2Config": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "Dots1Config": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "FalconH1Config": {"mamba_d_ssm": 32},
    "Gemma3nTextConfig": {"num_kv_shared_layers": 0},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "MiMoV2FlashConfig": {"head_dim": 24, "v_head_dim": 24},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 1,
    },
    "XmodConfig": {"default_language": "en_XX"},
}
"""What a name alone does not say."""
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
    for name, value in MORE.get(type(config).__name__, {}).items():
        setattr(config, name, value)
    return config


def build(kind: Any) -> Any:
    """A tiny model of that configuration; an error of transformers where there is none."""
    torch.manual_seed(0)
    config = shrink(kind())
    config.use_cache = False
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > PARAMETERS_AT_MOST:
        raise ValueError(f"{size / 1e6:.0f} M parameters")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def step(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(0)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def compare(model: Any, ids: torch.Tensor, fused: bool) -> tuple[str, float, str]:
    """What became of an attached cross-entropy, by how much its loss or a gradient is off, and why it was refused."""
    loss, gradients = step(model, ids)
    try:
        handle = attach(model, CROSS_ENTROPY, fused=fused)
    except ValueError as error:
        return "refused", 0.0, str(error).split("; ")[0]
    with handle:
        attached_loss, attached_gradients = step(model, ids)
    assert attached_gradients.keys() == gradients.keys()
    scale = max((gradient.abs().max().item() for gradient in gradients.values()), default=1.0)
    differences = [(attached_gradients[name] - gradient).abs().max().item() for name, gradient in gradients.items()]
    differences = [(attached_loss - loss).abs().item() / (1 + abs(loss.item())), *(d / scale for d in differences)]
    assert max(differences) < 1e-3
    return "same", max(differences), ""


@pytest.fixture(scope="module")
def table() -> Iterator[list[tuple[Any, ...]]]:
    rows: list[tuple[Any, ...]] = []
    yield rows
    if path := os.environ.get("OVERTONE_SWEEP"):
        with Path(path).open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([("model", "attached", "fused", "largest difference", "reason"), *rows])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), CLASSES, ids=[name for name, _ in CLASSES])
def test_attached_cross_entropy_is_the_models_own_loss(name, kind, table):
    """In value and in every gradient, from logits and from hidden states, or refused by name."""
    ids = torch.randint(3, 61, (3, 9), generator=torch.Generator().manual_seed(0))
    try:
        model = build(kind)
        step(model, ids)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
        table.append((name, "not built", "not built", "", reason))
        pytest.skip(f"no tiny model: {reason}")
    (attached, off, reason), (fused, fused_off, fused_reason) = (compare(model, ids, fused) for fused in (False, True))
    largest = f"{max(off, fused_off):.0e}" if attached == "same" else ""
    table.append((type(model).__name__, attached, fused, largest, reason or fused_reason))


def test_the_page_says_what_the_sweep_found():
    """Its four counts are those of the committed table."""
    root = Path(__file__).parents[1]
    rows = list(csv.DictReader((root / "examples/results/causal-lms.csv").open()))
    counts = Counter((row["attached"], row["fused"]) for row in rows)
    said = re.search(
        r"of (\d+) classes (\d+) are the same both ways, (\d+) only with `attach\(model\)`.*? "
        r"(\d+) are refused.*? (\d+) could",
        " ".join((root / "docs/huggingface.md").read_text().split()),
    )
    assert said is not None
    kinds = [("same", "same"), ("same", "refused"), ("refused", "refused"), ("not built", "not built")]
    assert [int(number) for number in said.groups()] == [len(rows), *(counts[kind] for kind in kinds)]
