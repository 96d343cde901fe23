#!/usr/bin/env bash
# trl 1.16.0, transformers 5.23.0, torch 2.13.0: compute_loss_func makes SFTTrainer run the model twice a step.
#
# Without a loss function of one's own SFTTrainer runs one forward pass a training step. Given compute_loss_func it runs
# a second one, without gradients, for its own metrics (entropy, mean_token_accuracy), in every step and whether or not
# they are logged. Nothing is said, and the loss is right; the step costs half as much again.
# For whom it matters: whoever tries another loss in SFTTrainer and times it.
#
# Seen (5 steps: forward passes, those with gradients):
#   no loss function:   5 5
#   compute_loss_func: 10 5
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 trl==1.16.0
cd "$folder"
"$folder/venv/bin/python" - 2>"$folder/log" <<'PYTHON'
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(61)}, unk_token="w0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2")


def cross_entropy(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def forward_passes(compute_loss_func):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    with_gradients = []
    model.model.register_forward_hook(lambda *_: with_gradients.append(torch.is_grad_enabled()))
    arguments = SFTConfig(
        "out", max_steps=5, per_device_train_batch_size=2, logging_steps=5, report_to=[], use_cpu=True, bf16=False,
        gradient_checkpointing=False, disable_tqdm=True, save_strategy="no",
    )
    texts = Dataset.from_list([{"input_ids": list(range(3, 12)), "labels": list(range(3, 12))}] * 8)
    SFTTrainer(
        model, arguments, train_dataset=texts, processing_class=tokenizer, compute_loss_func=compute_loss_func
    ).train()
    return len(with_gradients), sum(with_gradients)


plain, custom = forward_passes(None), forward_passes(cross_entropy)
print("no loss function: ", *plain)
print("compute_loss_func:", *custom)
assert plain == (5, 5) and custom == (10, 5), "the behaviour has changed"
PYTHON
