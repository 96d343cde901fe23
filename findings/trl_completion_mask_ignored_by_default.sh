#!/usr/bin/env bash
# trl 1.16.0, transformers 5.23.0, torch 2.13.0: SFTTrainer ignores a completion_mask that the rows bring along.
#
# Rows that are already tokenised may say with the column completion_mask which tokens to train on. The mask is used
# only with SFTConfig(completion_only_loss=True). The default, None, means "completions alone, where the data has
# prompts and completions"; for rows with a mask it trains on every token, prompts too, and nothing is said.
# For whom it matters: whoever tokenises by hand and masks prompts that way.
#
# Seen (the labels of a row whose last two tokens are marked):
#   completion_only_loss=None: [5, 6, 7, 8, 9]
#   completion_only_loss=True: [-100, -100, -100, 8, 9]
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 trl==1.16.0
"$folder/venv/bin/python" - "$folder" 2>"$folder/log" <<'PYTHON' || { cat "$folder/log"; exit 1; }
import sys

from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

words = models.WordLevel({f"w{number}": number for number in range(32)}, unk_token="w0")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="w1", eos_token="w2")
sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
rows = Dataset.from_list([{"input_ids": [5, 6, 7, 8, 9], "completion_mask": [0, 0, 0, 1, 1]}])


def labels(completion_only_loss):
    trainer = SFTTrainer(
        LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)),
        args=SFTConfig(sys.argv[1], completion_only_loss=completion_only_loss, report_to=[], use_cpu=True),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    return next(iter(trainer.get_train_dataloader()))["labels"][0].tolist()


seen = {choice: labels(choice) for choice in (None, True)}
for choice, own in seen.items():
    print(f"completion_only_loss={choice}: {own}")
assert seen == {None: [5, 6, 7, 8, 9], True: [-100, -100, -100, 8, 9]}, "the behaviour has changed"
PYTHON
