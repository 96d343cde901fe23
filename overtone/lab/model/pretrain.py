"""The small model of a corpus: trained until it knows the corpus, and kept in the user's cache folder.

A model is cached under a key of its texts, architecture, recipe and seed; an entry appears whole or not at all.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import transformers
from filelock import FileLock
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from overtone.lab.data.corpus import Corpus
from overtone.lab.data.recipe import Recipe
from overtone.lab.model.cache import cache_folder, digest, read_entry, write_entry
from overtone.lab.model.knowledge import Knowledge, measure_knowledge
from overtone.lab.model.tokenizer import train_tokenizer
from overtone.lab.model.training import ARCHITECTURES, train


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
    corpus: Corpus,
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
            model = train(texts, tokenizer, arch, seed, recipe, show_progress=show_progress)
            seconds = time.perf_counter() - start
            knowledge = measure_knowledge(model, tokenizer, corpus)
            write_entry(entry, model, tokenizer, knowledge.shares)
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
