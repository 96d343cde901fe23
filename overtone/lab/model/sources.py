"""The models that a benchmark edits: a small one trained on each corpus, or one that the user names for all."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch

from overtone.lab.data.corpus import Corpus
from overtone.lab.model.knowledge import measure_knowledge
from overtone.lab.model.pretrain import LabModel, load_or_train
from overtone.lab.model.training import ARCHITECTURES
from overtone.lab.model.workplace import Workplace


@dataclass(frozen=True)
class EditedModel:
    """A model on which a corpus is edited.

    Attributes:
        workplace: with the model and its tokenizer.
        source: folder or name from which other processes load the same model.
        title: what results say.
    """

    workplace: Workplace
    source: str | Path
    title: str


class ModelSource(Protocol):
    """Where the model of a corpus comes from."""

    def open(self, corpus: Corpus, seed: int) -> EditedModel:
        """The corpus' model.

        Raises:
            RuntimeError: it does not know the corpus well enough for edits to mean anything.
            OSError, ValueError: it cannot be had.
        """

    def knowledge(self, corpus: Corpus, seed: int) -> dict[str, float]:
        """Group of questions to the share of them that the model answers, in [0, 1]."""


class LabModels:
    """A small model for each corpus and seed, from the cache or trained now."""

    def __init__(self, arch: str = "llama", *, show_progress: bool = True) -> None:
        """Choose an architecture.

        Args:
            arch: a key of `overtone.lab.model.training.ARCHITECTURES`.
            show_progress: of a training.

        Raises:
            ValueError: the architecture is unknown.
        """
        if arch not in ARCHITECTURES:
            raise ValueError(f"arch must be one of {', '.join(ARCHITECTURES)}, got {arch!r}")
        self.arch = arch
        self.show_progress = show_progress

    def open(self, corpus: Corpus, seed: int) -> EditedModel:
        """See `ModelSource`."""
        trained = self._trained(corpus, seed)
        trained.knowledge.require()
        title = f"{self.arch}, {trained.model.num_parameters():,} parameters, trained on the corpus"
        return EditedModel(Workplace(trained.model, trained.tokenizer), trained.path, title)

    def knowledge(self, corpus: Corpus, seed: int) -> dict[str, float]:
        """See `ModelSource`."""
        return dict(self._trained(corpus, seed).knowledge.shares)

    def _trained(self, corpus: Corpus, seed: int) -> LabModel:
        return load_or_train(corpus, arch=self.arch, seed=seed, show_progress=self.show_progress)


class NamedModel:
    """One causal language model of the Hugging Face hub, or of a folder, for every corpus and seed."""

    def __init__(self, name: str, device: str | None = None) -> None:
        """Name the model.

        Args:
            name: on the hub, or of a folder.
            device: where to edit; None: on the GPU of this process where there is one.
        """
        self.name = name
        self.device = device or default_device()

    def open(self, corpus: Corpus, seed: int) -> EditedModel:
        """See `ModelSource`; nothing is demanded of what the model knows."""
        model = self._workplace.model
        dtype = str(model.dtype).removeprefix("torch.")
        return EditedModel(self._workplace, self.name, f"{self.name}, {model.num_parameters():,} parameters, {dtype}")

    def knowledge(self, corpus: Corpus, seed: int) -> dict[str, float]:
        """See `ModelSource`; measured now."""
        return dict(measure_knowledge(self._workplace.model, self._workplace.tokenizer, corpus).shares)

    @cached_property
    def _workplace(self) -> Workplace:
        return Workplace.load(self.name, self.device)


def default_device() -> str:
    """The GPU of this process (LOCAL_RANK tells several on one machine apart), else the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
