#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0, torch 2.13.0: merging LoRA on a tied output layer changes the model.
#
# LoRA on lm_head with ensure_weight_tying=True puts one shared adapter on the output layer and on the embedding, whose
# weight is one tensor. merge_and_unload() adds the adapter's delta to that tensor once for each of the two, so the
# merged model is not the adapted one. With one of the two layers adapted and the weights untied it is.
# For whom it matters: whoever edits or fine-tunes a model with tied embeddings (Gemma, Qwen2.5 up to 3B, LLaMA 3.2)
# and ships the merged weights.
#
# Seen (largest difference to the adapted model's logits):
#   tied, merged by peft:    205.48977661132812
#   tied, merged by hand:    6.103515625e-05
#   untied, merged by peft:  1.52587890625e-05
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
"$folder/venv/bin/python" - <<'PYTHON'
import warnings

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

warnings.simplefilter("ignore")
ids = torch.arange(9)[None]


def adapted_model(tied):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    model = get_peft_model(
        LlamaForCausalLM(config),
        LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"], ensure_weight_tying=tied),
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model


@torch.no_grad()
def difference(tied, by_hand=False):
    model = adapted_model(tied)
    adapted = model(ids).logits
    if by_hand:  # the delta added to the shared tensor once
        head = model.base_model.model.lm_head
        delta = head.get_delta_weight("default")
        base = model.unload()
        base.lm_head.weight += delta
        return (base(ids).logits - adapted).abs().max().item()
    return (model.merge_and_unload()(ids).logits - adapted).abs().max().item()


twice, once, untied = difference(True), difference(True, by_hand=True), difference(False)
print("tied, merged by peft:   ", twice)
print("tied, merged by hand:   ", once)
print("untied, merged by peft: ", untied)
assert twice > 1 and once < 1e-4 and untied < 1e-4, "the behaviour has changed"
PYTHON
