"""Trains a small language model until it knows its corpus, and keeps it in the user's cache folder.

A model is cached under a key of its texts, architecture, recipe and seed. An interrupted training goes on from its last
checkpoint and ends at the weights of an uninterrupted one; a cache entry appears whole or not at all.
"""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from overtone.lab.corpora import Corpus, WorldCorpus
from overtone.lab.recipes import Recipe
from overtone.lab.world import World

try:
    import transformers
    from filelock import FileLock
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from overtone.lab.cache import cache_folder, digest, read_entry, write_entry
    from overtone.lab.knowledge import Knowledge, measure_knowledge
    from overtone.lab.tokenizer import train_tokenizer
except ImportError as error:
    raise ImportError(f'the lab needs {error.name}: pip install "overtone[lab]"') from error

logger = logging.getLogger(__name__)

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


@dataclass
class LabModel:
    """A model that was trained on a corpus: in evaluation mode, float32, on the CPU.

    ``path`` is the folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load; ``seconds`` is how long this call
    trained, 0.0 where the model came from the cache.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    knowledge: Knowledge
    path: Path
    seconds: float


def load_or_train(
    corpus: Corpus | World,
    *,
    arch: str = "llama",
    seed: int = 0,
    cache_dir: Path | None = None,
    recipe: Recipe | None = None,
    show_progress: bool = True,
) -> LabModel:
    """The model of a corpus, from the cache or trained now.

    Args:
        corpus: what the model is to know; corpora that tell the same texts share a model.
        arch: one of ``ARCHITECTURES``.
        seed: of the initial weights and the order of the texts.
        cache_dir: where models are kept; by default ``$OVERTONE_CACHE``, else the user's cache folder.
        recipe: how to train; by default the corpus' own for the architecture.
        show_progress: whether to draw a progress bar.

    Raises:
        ValueError: ``arch`` is unknown.
        OSError: the cache folder cannot be written.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch must be one of {', '.join(ARCHITECTURES)}, got {arch!r}")
    if isinstance(corpus, World):
        corpus = WorldCorpus(corpus)
    recipe = recipe or corpus.recipe(arch)
    texts = corpus.training_texts()
    key = digest(json.dumps([texts, arch, dict(ARCHITECTURES[arch]), asdict(recipe), seed]).encode())
    entry = cache_folder(cache_dir) / f"{arch}-seed{seed}-{key[:16]}"

    seconds = 0.0
    # Of several processes that want the same model, one trains it and the others wait.
    with FileLock(entry.with_suffix(".lock")), _without_progress_bars():
        shares = read_entry(entry)
        if shares is None:
            start = time.perf_counter()
            tokenizer = train_tokenizer(texts, recipe.vocabulary)
            checkpoint = entry.with_suffix(".checkpoint")
            model = _train(texts, tokenizer, arch, seed, recipe, checkpoint, show_progress)
            seconds = time.perf_counter() - start
            knowledge = measure_knowledge(model, tokenizer, corpus)
            write_entry(entry, model, tokenizer, knowledge.shares)
            checkpoint.unlink(missing_ok=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(entry).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(entry)
        if shares is not None:
            knowledge = Knowledge(shares, dict(corpus.knowledge_needed))
            if shares.keys() != corpus.knowledge_probes().keys():
                # Other questions than when it was trained.
                knowledge = measure_knowledge(model, tokenizer, corpus)
                write_entry(entry, model, tokenizer, knowledge.shares)
    return LabModel(model, tokenizer, knowledge, entry, seconds)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Without those of transformers, which announce the loading of 2 MB."""
    enabled = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers.utils.logging.enable_progress_bar()


# ---- training


def _train(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    arch: str,
    seed: int,
    recipe: Recipe,
    checkpoint: Path,
    show_progress: bool,
) -> PreTrainedModel:
    config = transformers.AutoConfig.for_model(
        arch,
        vocab_size=recipe.vocabulary,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **_with_room_for(recipe.block_length, ARCHITECTURES[arch]),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config).train()
    groups: list[dict[str, Any]] = [
        {"params": [weight for weight in model.parameters() if weight.ndim > 1]},
        {"params": [weight for weight in model.parameters() if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_share(step, recipe))
    state = {"model": model, "optimizer": optimizer, "schedule": schedule}
    first = _resume(checkpoint, state)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), disable=not show_progress) as progress:
        bar = progress.add_task(f"training {arch}", total=recipe.steps, completed=first, loss=math.nan)
        batches = _batches(
            [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in texts], seed, recipe, first
        )
        for step, ids in zip(range(first + 1, recipe.steps + 1), batches, strict=False):
            loss = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.update(bar, advance=1, loss=loss.item())
            if step % recipe.checkpoint_every == 0:
                _save_checkpoint(checkpoint, step, state)
    return model.eval()


def _with_room_for(block_length: int, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """An architecture's sizes, with positions for a block and, behind it, as much again of generated text."""
    limit = "n_positions" if "n_positions" in sizes else "max_position_embeddings"
    return {**sizes, limit: max(sizes[limit], 2 * block_length)}


def _learning_rate_share(step: int, recipe: Recipe) -> float:
    """The share of the full learning rate at a step: up, then linearly down to 0."""
    warmup = recipe.warmup * recipe.steps
    return min((step + 1) / warmup, (recipe.steps - step) / (recipe.steps - warmup))


def _batches(texts: Sequence[list[int]], seed: int, recipe: Recipe, first: int) -> Iterator[torch.Tensor]:
    """Token ids (blocks, block_length), from the ``first`` batch on; each epoch has the texts in a new order."""
    blocks = sum(map(len, texts)) // recipe.block_length
    per_epoch = max(1, blocks // recipe.blocks)
    epoch, skip = divmod(first, per_epoch)
    while True:
        order = list(texts)
        random.Random(f"epoch {seed} {epoch}").shuffle(order)
        stream = torch.tensor([token for text in order for token in text])[: blocks * recipe.block_length]
        rows = stream.view(blocks, recipe.block_length)
        for batch in range(skip, per_epoch):
            yield rows[batch * recipe.blocks : (batch + 1) * recipe.blocks]
        epoch, skip = epoch + 1, 0


def _save_checkpoint(path: Path, step: int, state: Mapping[str, Any]) -> None:
    # Written beside its place and moved there, so that a kill in the middle leaves the checkpoint before.
    unfinished = path.with_suffix(".unfinished")
    torch.save({"step": step} | {name: part.state_dict() for name, part in state.items()}, unfinished)
    os.replace(unfinished, path)


def _resume(path: Path, state: Mapping[str, Any]) -> int:
    """Load the checkpoint, if there is a good one; the number of steps done."""
    try:
        saved = torch.load(path, weights_only=True)
    except FileNotFoundError:
        return 0
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        logger.warning("%s is broken and training starts anew: %s", path, error)
        return 0
    for name, part in state.items():
        part.load_state_dict(saved[name])
    logger.info("training goes on from step %d", saved["step"])
    return int(saved["step"])
