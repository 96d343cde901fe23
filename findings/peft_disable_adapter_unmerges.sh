#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0, torch 2.13.0: a pass inside `with model.disable_adapter():` unmerges merged adapters,
# and nothing merges them again.
#
# `merge_adapter()` is there so that a served model needs no adapter arithmetic. `disable_adapter()` is the documented way
# to the base model's answer, for a reference as in DPO, and reads like a context that leaves things as they were. But
# the first pass inside it takes the adapter out of the weights in place; on leaving it the model is still unmerged, the
# base weights differ from the original by rounding, and every later pass pays for the adapter. Without a pass inside,
# the model stays merged.
# For whom it matters: whoever asks a merged model for its reference, and then saves its weights or measures its speed.
#
# Seen:
#   merged; after the context without a pass: merged True
#   after the context with a pass: merged False
#   weights as before the merge: False
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
settings = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
model = get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)), settings).eval()
layer = model.base_model.model.model.layers[0].self_attn.q_proj
before = layer.base_layer.weight.detach().clone()
model.merge_adapter()
with model.disable_adapter():
    pass
without_a_pass = layer.merged
with torch.no_grad(), model.disable_adapter():
    model(torch.arange(8)[None])
with_a_pass, same = layer.merged, torch.equal(layer.base_layer.weight, before)
print("merged; after the context without a pass: merged", without_a_pass)
print("after the context with a pass: merged", with_a_pass)
print("weights as before the merge:", same)
assert (without_a_pass, with_a_pass, same) == (True, False, False), "it has changed"
PYTHON
