"""Trainer on a tiny model: a step, its gradients, rows for it and a tokenizer of words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_models
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments


class Gradients(TrainerCallback):
    """Keeps the gradients of the first optimiser step, before clipping would change them."""

    def __init__(self) -> None:
        self.values: dict[str, torch.Tensor | None] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.values[name] = None if parameter.grad is None else parameter.grad.clone()


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 1,
        "max_steps": 1,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }
    known = TrainingArguments.__dataclass_fields__
    return TrainingArguments(**{name: value for name, value in {**settings, **changes}.items() if name in known})


def rows(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    return [{name: values[row] for name, values in batch.items()} for row in range(len(batch["labels"]))]


def gradients_of(loss: torch.Tensor, model: Any) -> dict[str, torch.Tensor]:
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def trained_gradients(model: Any, args: TrainingArguments, batch: dict[str, torch.Tensor], **given: Any) -> Any:
    recorder = Gradients()
    trainer = Trainer(model=model, args=args, train_dataset=rows(batch), callbacks=[recorder], **given)
    trainer.train()
    return recorder.values


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": 2, "<unk>": 1, **{f"w{index}": index for index in range(3, tiny_models.VOCABULARY)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
