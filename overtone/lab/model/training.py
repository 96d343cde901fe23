"""Trains a small language model of a chosen architecture on texts, the same weights for the same seed."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from overtone.lab.data.recipe import Recipe
from overtone.lab.log_lines import LogLines

_WIDTH, _LAYERS, _HEADS, _POSITIONS, _SPREAD = 128, 3, 4, 256, 0.04
_LLAMA_LIKE = {
    "hidden_size": _WIDTH,
    "intermediate_size": 344,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _HEADS,
    "max_position_embeddings": _POSITIONS,
    "initializer_range": _SPREAD,
    "tie_word_embeddings": True,
}

ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "llama": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "gpt2": {
        "n_embd": _WIDTH,
        "n_layer": _LAYERS,
        "n_head": _HEADS,
        "n_positions": _POSITIONS,
        "initializer_range": _SPREAD,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
}
"""The configuration of each transformers model type that the lab trains; none has dropout."""


def train(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    arch: str,
    seed: int,
    recipe: Recipe,
    *,
    show_progress: bool,
) -> PreTrainedModel:
    """A model in evaluation mode, trained on the texts from random weights.

    Args:
        texts: packed end to end.
        tokenizer: from `overtone.lab.model.tokenizer.train_tokenizer`.
        arch: a key of `ARCHITECTURES`.
        seed: of the initial weights and the order of the texts.
        recipe: how to train.
        show_progress: whether to draw a progress bar.
    """
    model = untrained(arch, seed, recipe, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.train()
    groups: list[dict[str, Any]] = [
        {"params": [weight for weight in model.parameters() if weight.ndim > 1]},
        {"params": [weight for weight in model.parameters() if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_share(step, recipe))

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    loss_column = TextColumn("loss {task.fields[loss]:.3f}")
    lines = LogLines()
    with Progress(*columns, loss_column, console=lines.console, disable=not show_progress) as progress:
        bar = progress.add_task(f"training {arch}", total=recipe.steps, loss=math.nan)
        batches = _batches([[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in texts], seed, recipe)
        for ids in islice(batches, recipe.steps):
            loss = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.update(bar, advance=1, loss=loss.item())
            if show_progress:
                lines.tell(lambda: f"training {arch}: {progress.tasks[bar].completed:.0f} of {recipe.steps} steps")
    return model.eval()


def untrained(arch: str, seed: int, recipe: Recipe, *, eos_token_id: int, pad_token_id: int) -> PreTrainedModel:
    """A model with random weights, as `train` begins with it; the global random state is left alone."""
    config = transformers.AutoConfig.for_model(
        arch,
        vocab_size=recipe.vocabulary,
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        **_with_room_for(recipe.block_length, ARCHITECTURES[arch]),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config)
    return model


def _with_room_for(block_length: int, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """An architecture's sizes, with positions for a block and, behind it, as much again of generated text."""
    limit = "n_positions" if "n_positions" in sizes else "max_position_embeddings"
    return {**sizes, limit: max(sizes[limit], 2 * block_length)}


def _learning_rate_share(step: int, recipe: Recipe) -> float:
    """The share of the full learning rate at a step: up, then linearly down to 0."""
    warmup = recipe.warmup * recipe.steps
    return min((step + 1) / warmup, (recipe.steps - step) / (recipe.steps - warmup))


def _batches(texts: Sequence[list[int]], seed: int, recipe: Recipe) -> Iterator[torch.Tensor]:
    """Token ids (blocks, block_length) without end; each epoch has the texts in a new order."""
    blocks = sum(map(len, texts)) // recipe.block_length
    per_epoch = max(1, blocks // recipe.blocks)
    for epoch in count():
        order = list(texts)
        random.Random(f"epoch {seed} {epoch}").shuffle(order)
        stream = torch.tensor([token for text in order for token in text])[: blocks * recipe.block_length]
        rows = stream.view(blocks, recipe.block_length)
        for batch in range(per_epoch):
            yield rows[batch * recipe.blocks : (batch + 1) * recipe.blocks]
