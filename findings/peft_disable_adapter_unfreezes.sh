#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0, torch 2.13.0: `with model.disable_adapter():` makes frozen adapter weights trainable.
#
# Freezing a part of an adapter is usual: LoRA-FA trains B alone, with A fixed. `disable_adapter()` is the documented
# way to the base model's answer, for a reference as in DPO or in distillation. On leaving it every weight of the active
# adapter has requires_grad=True, whatever it had before, and nothing is said. An optimiser that was made before then
# ignores them, one that has all parameters trains them.
# For whom it matters: whoever asks an adapted model for its reference while a part of the adapter is frozen.
#
# Seen:
#   before: lora_A False, lora_B True
#   after:  lora_A True, lora_B True
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
"$folder/venv/bin/python" - <<'PYTHON'
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
model = get_peft_model(
    LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)), LoraConfig(r=2, target_modules=["q_proj"])
)


def trainable():
    return {part: any(p.requires_grad for n, p in model.named_parameters() if part in n) for part in ("lora_A", "lora_B")}


for name, parameter in model.named_parameters():
    if "lora_A" in name:
        parameter.requires_grad_(False)
before = trainable()
with model.disable_adapter():
    pass
after = trainable()
for when, state in (("before:", before), ("after: ", after)):
    print(when, ", ".join(f"{part} {is_trained}" for part, is_trained in state.items()))
assert before == {"lora_A": False, "lora_B": True} and after == {"lora_A": True, "lora_B": True}, "it has changed"
PYTHON
