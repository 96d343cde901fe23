#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0, torch 2.13.0: AdaLoRA without a task_type trains without its orthogonality term.
#
# AdaLoRA's loss is the model's plus orth_reg_weight times how far its factors are from orthogonal. With
# task_type="CAUSAL_LM" the model's .loss has the term; with the same configuration but no task_type, which peft
# accepts for every tuner, the term is left out and nothing is said. The weight then changes nothing.
# For whom it matters: whoever compares losses or regularisers under AdaLoRA.
#
# Seen (loss at orth_reg_weight 1e-9 and 5.0):
#   task_type CAUSAL_LM: 4.1015 14.0379
#   task_type None:      4.1015 4.1015
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
"$folder/venv/bin/python" - <<'PYTHON'
import warnings

import torch
from peft import AdaLoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

warnings.simplefilter("ignore")
ids = torch.arange(9)[None]


def loss(task_type, weight):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    config = AdaLoraConfig(
        task_type=task_type, total_step=10, init_r=4, target_r=2, target_modules=["q_proj"], orth_reg_weight=weight
    )
    return get_peft_model(model, config)(input_ids=ids, labels=ids).loss.item()


losses = {task_type: [loss(task_type, weight) for weight in (1e-9, 5.0)] for task_type in ("CAUSAL_LM", None)}
for task_type, (without, with_term) in losses.items():
    print(f"task_type {task_type}: {without:.4f} {with_term:.4f}")
assert losses["CAUSAL_LM"][1] > losses["CAUSAL_LM"][0] + 1, "the behaviour has changed"
assert losses[None][1] == losses[None][0], "the behaviour has changed"
PYTHON
