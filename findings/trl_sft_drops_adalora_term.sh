#!/usr/bin/env bash
# trl 1.16.0, peft 0.21.2, transformers 5.23.0, torch 2.13.0: SFTTrainer trains AdaLoRA without its orthogonality term.
#
# AdaLoRA's PEFT model adds orth_reg_weight times how far its factors are from orthogonal to the .loss of its output, and
# transformers' Trainer minimises that. SFTTrainer computes its own loss from the model's log-probabilities and asks the
# model for no .loss, so the term is left out and nothing is said, though the task_type is set. The weight then changes
# nothing.
# For whom it matters: whoever moves an AdaLoRA run from Trainer to SFTTrainer, or tunes orth_reg_weight there.
#
# Seen (the first loss at orth_reg_weight 1e-9 and 5.0):
#   Trainer:    3.5367 13.4831
#   SFTTrainer: 3.5366 3.5366
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2 trl==1.16.0
"$folder/venv/bin/python" - "$folder" 2>"$folder/log" <<'PYTHON' || { cat "$folder/log"; exit 1; }
import sys

import torch
from datasets import Dataset
from peft import AdaLoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

words = models.WordLevel({f"w{number}": number for number in range(32)}, unk_token="w0")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="w1", eos_token="w2")
sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
ids = [5, 6, 7, 8, 9]
rows = Dataset.from_list([{"input_ids": ids, "labels": ids}])
plain = {"max_steps": 1, "logging_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no"}


def first_loss(trainer_of, weight):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    config = AdaLoraConfig(
        task_type="CAUSAL_LM", total_step=10, init_r=4, target_r=2, target_modules=["q_proj"], orth_reg_weight=weight
    )
    trainer = trainer_of(get_peft_model(model, config))
    trainer.train()
    return trainer.state.log_history[0]["loss"]


def by_trainer(model):
    return Trainer(model, TrainingArguments(sys.argv[1], **plain), train_dataset=rows)


def by_trl(model):
    return SFTTrainer(model, args=SFTConfig(sys.argv[1], **plain), train_dataset=rows, processing_class=tokenizer)


seen = {title: [first_loss(by, weight) for weight in (1e-9, 5.0)] for title, by in (("Trainer", by_trainer), ("SFTTrainer", by_trl))}
for title, (without, with_term) in seen.items():
    print(f"{title}: {without:.4f} {with_term:.4f}")
assert seen["Trainer"][1] > seen["Trainer"][0] + 1, "the behaviour has changed"
assert seen["SFTTrainer"][1] == seen["SFTTrainer"][0], "the behaviour has changed"
PYTHON
