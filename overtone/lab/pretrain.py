"""Trains a small language model until it knows its world, and keeps it in the user's cache folder.

A model is cached under a key of its texts, architecture, recipe and seed. An interrupted training goes on from its last
checkpoint and ends at the weights of an uninterrupted one; a cache entry appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import pickle
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from filelock import FileLock

from overtone.lab.world import Probe, World

try:
    import transformers
    from platformdirs import user_cache_dir
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from overtone.lab.tokenizer import train_tokenizer
except ImportError as error:
    raise ImportError(f'the lab needs {error.name}: pip install "overtone[lab]"') from error

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "OVERTONE_CACHE"
"""The environment variable that names the cache folder."""

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


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: texts packed end to end into blocks, AdamW, learning rate warmed up and decayed to 0."""

    vocabulary: int = 600
    steps: int = 1400
    blocks: int = 16
    block_length: int = 64
    learning_rate: float = 4e-3
    warmup: float = 0.05
    weight_decay: float = 0.5
    checkpoint_every: int = 100


RECIPES: Mapping[str, Recipe] = {
    "llama": Recipe(),
    "qwen2": Recipe(),
    "mistral": Recipe(),
    "gpt2": Recipe(steps=1900),
}
"""What each architecture needs; with learned positions, names are copied later than with rotary ones."""


@dataclass(frozen=True)
class Knowledge:
    """The shares of a world's facts and two-hop questions that greedy generation answers word for word, in [0, 1]."""

    fact_accuracy: float
    two_hop_accuracy: float

    FACTS_NEEDED = 0.99
    TWO_HOPS_NEEDED = 0.95

    def require(self) -> None:
        """Refuse a model that does not know its world.

        Raises:
            RuntimeError: too few facts or two-hop questions are answered for a loss of knowledge to mean anything.
        """
        if self.fact_accuracy < self.FACTS_NEEDED or self.two_hop_accuracy < self.TWO_HOPS_NEEDED:
            raise RuntimeError(
                f"the model does not know its world well enough to be edited: it answers {self.fact_accuracy:.1%} of "
                f"the facts (needs {self.FACTS_NEEDED:.0%}) and {self.two_hop_accuracy:.1%} of the two-hop questions "
                f"(needs {self.TWO_HOPS_NEEDED:.0%}); train it for more steps, or with another seed"
            )


@dataclass
class LabModel:
    """A model that was trained on a world: in evaluation mode, float32, on the CPU.

    ``path`` is the folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load; ``seconds`` is how long this call
    trained, 0.0 where the model came from the cache.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    knowledge: Knowledge
    path: Path
    seconds: float


def load_or_train(
    world: World,
    *,
    arch: str = "llama",
    seed: int = 0,
    cache_dir: Path | None = None,
    recipe: Recipe | None = None,
    show_progress: bool = True,
) -> LabModel:
    """The model of a world, from the cache or trained now.

    Args:
        world: what the model is to know.
        arch: one of ``ARCHITECTURES``.
        seed: of the initial weights and the order of the texts.
        cache_dir: where models are kept; by default ``$OVERTONE_CACHE``, else the user's cache folder.
        recipe: how to train; by default the one of ``RECIPES``.
        show_progress: whether to draw a progress bar.

    Raises:
        ValueError: ``arch`` is unknown.
        OSError: the cache folder cannot be written.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch must be one of {', '.join(ARCHITECTURES)}, got {arch!r}")
    recipe = recipe or RECIPES[arch]
    texts = world.training_texts()
    cache = Path(cache_dir or os.environ.get(CACHE_VARIABLE) or user_cache_dir("overtone"))
    cache.mkdir(parents=True, exist_ok=True)
    key = _digest(json.dumps([texts, arch, dict(ARCHITECTURES[arch]), asdict(recipe), seed]).encode())
    entry = cache / f"{arch}-seed{seed}-{key[:16]}"

    seconds = 0.0
    # Of several processes that want the same model, one trains it and the others wait.
    with FileLock(entry.with_suffix(".lock")), _without_progress_bars():
        knowledge = _read_entry(entry)
        if knowledge is None:
            start = time.perf_counter()
            tokenizer = train_tokenizer(texts, recipe.vocabulary)
            checkpoint = entry.with_suffix(".checkpoint")
            model = _train(texts, tokenizer, arch, seed, recipe, checkpoint, show_progress)
            seconds = time.perf_counter() - start
            knowledge = measure_knowledge(model, tokenizer, world)
            _write_entry(entry, model, tokenizer, knowledge)
            checkpoint.unlink(missing_ok=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(entry).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(entry)
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


def measure_knowledge(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, world: World) -> Knowledge:
    """How much of its world a model tells word for word, up to the full stop, under greedy generation."""
    return Knowledge(
        fact_accuracy=_share_recalled(model, tokenizer, world.fact_probes()),
        two_hop_accuracy=_share_recalled(model, tokenizer, world.two_hop_probes()),
    )


@torch.no_grad()
def _share_recalled(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, probes: Sequence[Probe], batch: int = 128
) -> float:
    """Greedy generation tells the target if and only if each of its tokens is the most likely one after those before.

    So one forward pass over prompt and target decides, and nothing has to be generated.
    """
    rows = []
    for probe in probes:
        prompt = tokenizer(probe.prompt).input_ids
        rows.append((len(prompt), tokenizer(probe.prompt + probe.target.rstrip(".") + ".").input_ids))
    rows.sort(key=lambda row: len(row[1]))
    recalled = 0
    for start in range(0, len(rows), batch):
        chunk = rows[start : start + batch]
        width = len(chunk[-1][1])
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for _, row in chunk])
        logits = model(ids, attention_mask=(ids != tokenizer.pad_token_id).long()).logits
        hits = logits[:, :-1].argmax(-1) == ids[:, 1:]
        recalled += sum(
            bool(hit[begin - 1 : len(row) - 1].all()) for hit, (begin, row) in zip(hits, chunk, strict=True)
        )
    return recalled / len(rows)


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
        **ARCHITECTURES[arch],
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


# ---- the cache

_WEIGHTS, _RECORD = "model.safetensors", "knowledge.json"


def _read_entry(entry: Path) -> Knowledge | None:
    """What the model of a cache entry knows, or None where there is no entry or its weights are not those written."""
    if not entry.exists():
        return None
    try:
        record = json.loads((entry / _RECORD).read_text(encoding="utf-8"))
        if record.pop("sha256") != _digest((entry / _WEIGHTS).read_bytes()):
            raise ValueError(f"{_WEIGHTS} has changed")
        return Knowledge(**record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is broken and will be trained anew: %s", entry, error)
        return None


def _write_entry(entry: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, knowledge: Knowledge) -> None:
    with tempfile.TemporaryDirectory(dir=entry.parent, prefix=f".{entry.name}-") as folder:
        written = Path(folder) / entry.name
        model.save_pretrained(written)
        tokenizer.save_pretrained(written)
        record = asdict(knowledge) | {"sha256": _digest((written / _WEIGHTS).read_bytes())}
        (written / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(entry, ignore_errors=True)
        os.replace(written, entry)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
