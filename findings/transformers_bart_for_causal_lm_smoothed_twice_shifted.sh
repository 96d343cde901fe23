#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: with label_smoothing_factor Trainer shifts the labels of BartForCausalLM, which the
# model itself does not.
#
# BartForCausalLM compares logits and labels place by place: its labels are the next tokens already. Trainer's label
# smoothing asks whether the class is named among the causal language models, where it is, and shifts the labels by one
# more: each place then learns the token after the next. Nothing is said. A factor of 1e-9, next to no smoothing, shows
# it: the loss of the same first step changes.
# For whom it matters: label smoothing with the decoders of BART and its kin.
#
# Seen (loss of the first step; the mean over the tokens after the next, by hand):
#   label_smoothing_factor=0:    19.65, by hand 19.65
#   label_smoothing_factor=1e-9: 23.57, by hand 23.57
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate
cd "$folder"
"$folder/venv/bin/python" - 2>"$folder/log" <<'PYTHON'
import torch
from torch.nn.functional import cross_entropy
from transformers import BartConfig, BartForCausalLM, Trainer, TrainingArguments

ids = torch.arange(3, 13)
row = {"input_ids": ids[:-1], "labels": ids[1:]}


def build():
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=61, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16,
        max_position_embeddings=32, dropout=0.0,
    )
    model = BartForCausalLM(config)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 100)
    return model


def first_loss(factor):
    arguments = TrainingArguments(
        "out", max_steps=1, logging_steps=1, label_smoothing_factor=factor, use_cpu=True, report_to=[],
        disable_tqdm=True, save_strategy="no",
    )
    trainer = Trainer(build(), arguments, train_dataset=[row])
    trainer.train()
    return trainer.state.log_history[0]["loss"]


plain, smoothed = first_loss(0), first_loss(1e-9)
logits = build()(input_ids=ids[None, :-1]).logits[0]
once, twice = cross_entropy(logits, ids[1:]).item(), cross_entropy(logits[:-1], ids[2:]).item()
print(f"label_smoothing_factor=0:    {plain:.2f}, by hand {once:.2f}")
print(f"label_smoothing_factor=1e-9: {smoothed:.2f}, by hand {twice:.2f}")
assert abs(plain - once) < 1e-3 and abs(smoothed - twice) < 1e-3 and abs(once - twice) > 1, "the behaviour has changed"
PYTHON
