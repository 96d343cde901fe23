#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: with compute_loss_func, Trainer ignores label_smoothing_factor without a word.
#
# TrainingArguments(label_smoothing_factor=0.5) smooths the labels of Trainer's own loss. Given compute_loss_func as
# well, Trainer still takes the labels out of the batch as it does for its label smoother, then calls the function with
# them unsmoothed: the factor changes nothing, and there is neither an error nor a warning.
# For whom it matters: whoever compares a loss with label smoothing by switching one argument.
#
# Seen (loss of the 20th step, without smoothing and with factor 0.5):
#   no loss function:  1.8709 3.1352
#   compute_loss_func: 1.8709 1.8709
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" - 2>"$folder/log" <<'PYTHON'
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments


class KeepLosses(TrainerCallback):
    def __init__(self):
        self.losses = []

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


def cross_entropy(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def last_loss(factor, compute_loss_func):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    arguments = TrainingArguments(
        "out", max_steps=20, learning_rate=1e-2, label_smoothing_factor=factor, logging_steps=1, report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="no",
    )
    kept = KeepLosses()
    texts = [{"input_ids": torch.arange(3, 12), "labels": torch.arange(3, 12)}] * 8
    trainer = Trainer(
        model, arguments, train_dataset=texts, compute_loss_func=compute_loss_func, callbacks=[kept]
    )
    trainer.remove_callback(next(c for c in trainer.callback_handler.callbacks if "Printer" in type(c).__name__))
    trainer.train()
    return kept.losses[-1]


plain = [last_loss(factor, None) for factor in (0.0, 0.5)]
custom = [last_loss(factor, cross_entropy) for factor in (0.0, 0.5)]
print("no loss function: ", *(f"{loss:.4f}" for loss in plain))
print("compute_loss_func:", *(f"{loss:.4f}" for loss in custom))
assert plain[1] > plain[0] + 0.5 and custom[0] == custom[1], "the behaviour has changed"
PYTHON
