"""The models that a benchmark edits: a small one trained on each corpus, or one that the user names for all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Protocol

import torch
from transformers import PreTrainedModel

from overtone.lab.data.corpus import Corpus
from overtone.lab.data.edit import Edit, Probe
from overtone.lab.data.recipe import Recipe
from overtone.lab.model.knowledge import answered
from overtone.lab.model.pretrain import LabModel, load_or_train
from overtone.lab.model.training import ARCHITECTURES, untrained
from overtone.lab.model.workplace import Workplace

ASKED_OF_A_GROUP = 50
"""How many questions of each kind a named model is asked at most, to say what it knew."""


@dataclass(frozen=True)
class EditedModel:
    """A model on which a corpus is edited.

    Attributes:
        workplace: with the model and its tokenizer.
        source: folder or name from which other processes load the same model.
        title: what results say.
        dtype: in which they load it, where that is not a matter of course.
    """

    workplace: Workplace
    source: str | Path
    title: str
    dtype: str | None = None


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

    def untrained(self) -> PreTrainedModel:
        """A model of the architecture, which shows before a training what it can take."""
        return untrained(self.arch, 0, Recipe(), eos_token_id=0, pad_token_id=1).eval()

    def _trained(self, corpus: Corpus, seed: int) -> LabModel:
        return load_or_train(corpus, arch=self.arch, seed=seed, show_progress=self.show_progress)


class NamedModel:
    """One causal language model of the Hugging Face hub, of a folder or of a GGUF file, for every corpus and seed."""

    def __init__(
        self, name: str, device: str | None = None, *, dtype: str | None = None, show_progress: bool = True
    ) -> None:
        """Name the model.

        Args:
            name: on the hub, of a folder, or of a .gguf file.
            device: where to edit; None: on the GPU of this process where there is one.
            dtype: of its weights, such as "bfloat16"; None: see `Workplace.load`.
            show_progress: of asking what it knows.
        """
        self.name = name
        self.show_progress = show_progress
        self.dtype = dtype
        self.device = device or default_device()

    def open(self, corpus: Corpus, seed: int) -> EditedModel:
        """See `ModelSource`; nothing is demanded of what the model knows."""
        model = self._workplace.model
        dtype = str(model.dtype).removeprefix("torch.")
        title = f"{Path(self.name).name}, {model.num_parameters():,} parameters, {dtype}"
        return EditedModel(self._workplace, self.name, title, self.dtype)

    def knowledge(self, corpus: Corpus, seed: int) -> dict[str, float]:
        """See `ModelSource`; asked now, of a sample: a question takes a large model as long as a step of an edit."""
        groups = dict(_sampled(group, probes, seed) for group, probes in corpus.knowledge_probes().items())
        told = iter(self._answered([probe for probes in groups.values() for probe in probes]))
        return {group: fmean(next(told) for _ in probes) for group, probes in groups.items()}

    def knows(self, edits: Sequence[Edit]) -> list[bool]:
        """Whether greedy generation after each edit's prompt begins with its old target; no, where it names none."""
        probes = [Probe(edit.prompt, edit.target_old, "fact", edit.target_old.strip()) for edit in edits]
        told = iter(self._answered([probe for probe in probes if probe.target]))
        return [bool(probe.target) and next(told) for probe in probes]

    def _answered(self, probes: Sequence[Probe]) -> list[bool]:
        model, tokenizer = self._workplace.model, self._workplace.tokenizer
        return answered(model, tokenizer, probes, show_progress=self.show_progress)

    @cached_property
    def _workplace(self) -> Workplace:
        try:
            return Workplace.load(self.name, self.device, dtype=self.dtype)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model {self.name!r} cannot be loaded: {error}; a name on the hub, a folder with a model and its "
                "tokenizer, or a .gguf file is expected"
            ) from error


def _sampled(group: str, probes: Sequence[Probe], seed: int) -> tuple[str, Sequence[Probe]]:
    """The questions that are asked of a group, whose title then says how many."""
    if len(probes) <= ASKED_OF_A_GROUP:
        return group, probes
    asked = Random(f"knowledge {seed} {group}").sample(probes, ASKED_OF_A_GROUP)
    return f"{group} ({ASKED_OF_A_GROUP} of {len(probes)} asked)", asked


def default_device() -> str:
    """The GPU of this process (LOCAL_RANK tells several on one machine apart), else the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
