"""`overtone bench`: editing methods, losses and sequence lengths over models and edits, into one results file."""

from __future__ import annotations

import hashlib
import os
import platform
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from overtone.config import RECOMMENDED, OverToneConfig
from overtone.lab.corpora import CORPORA, WORLDS, Corpus, open_corpus
from overtone.lab.edited_models import EditedModel, LabModels, ModelSource, NamedModel, default_device
from overtone.lab.editors import METHODS
from overtone.lab.experiment import one_thread, perform_all
from overtone.lab.folders import require_writable
from overtone.lab.losses import parse_loss
from overtone.lab.outcomes import FORMAT, EditOutcome
from overtone.lab.perplexity import perplexity
from overtone.lab.registry import look_up
from overtone.lab.results_folder import CHECKPOINTS, ResultsFolder
from overtone.lab.sequences import SequenceTask, checkpoint_path, library_versions
from overtone.lab.sessions import easyedit_version, open_session, require_method, unsupported
from overtone.lab.sharding import Shard
from overtone.lab.world import Edit

HELD_OUT_TEXTS = 64
"""How many of a corpus' held-out texts the perplexity is measured on, at most."""


@dataclass(frozen=True)
class BenchSettings:
    """The grid.

    Attributes:
        data: names in `overtone.lab.corpora.CORPORA`.
        seeds: of the corpora, their models and the choice of edits. They do not reach the methods: the random initial
            weights of LoRA are those of the first edit's place in the list, the same for sequence i of every seed.
        methods: names that `overtone.lab.sessions.require_method` accepts; single edits of the first one, with the
            first seed, are traced for the figures.
        losses: loss specs (see `overtone.lab.losses`).
        lengths: of the sequences of edits; 1 for single edits.
        edits: how many edits of each corpus and seed, cut into sequences of each length. A remainder that fills no
            sequence is left out; a length above this number has one sequence.
        fit_lengths: leave out the lengths for which a corpus has too few edits, instead of refusing them.
        paths: data to published file, for corpora that are read from one.
        size: how many records of such a file a small model is to know; None: the corpus' own default.
        model: name or folder of the model to edit; None: a small one trained on each corpus.
    """

    data: tuple[str, ...] = ("short",)
    seeds: tuple[int, ...] = (0,)
    methods: tuple[str, ...] = tuple(METHODS)
    losses: tuple[str, ...] = ("cross_entropy", "early_stopping", "overtone_held")
    lengths: tuple[int, ...] = (1, 10)
    edits: int = 20
    fit_lengths: bool = False
    paths: Mapping[str, str] = field(default_factory=dict)
    size: int | None = None
    model: str | None = None


class Bench:
    """One run in its output folder, which a second run goes on from where the first was interrupted."""

    def __init__(self, settings: BenchSettings, out: Path, *, workers: int = 1, shard: Shard | None = None) -> None:
        """Check everything that can be checked before anything takes time.

        Args:
            settings: the grid.
            out: the output folder; made if need be, once there are models.
            workers: processes.
            shard: this process' place among those that share the run; None: from the environment.

        Raises:
            ValueError: an unknown name, no name, too few edits in a corpus, a loss that a method cannot minimise and
                no other, or a number out of range.
            OSError: a file cannot be read, or the folder cannot be made or written to.
        """
        self.settings = settings
        self.out = out
        self.workers = workers
        self.shard = shard or Shard.from_environment()
        self.source: ModelSource = (
            LabModels(show_progress=self.shard.rank == 0) if settings.model is None else NamedModel(settings.model)
        )
        self.left_out: list[str] = []
        self._check()
        self._losses = list({loss.name: loss for loss in map(parse_loss, settings.losses)}.values())
        self._grid = self._supported()
        self._corpora: dict[tuple[str, int], Corpus] = {
            (data, seed): open_corpus(data, seed=seed, path=self._path(data), size=self._size(data))
            for seed in settings.seeds
            for data in settings.data
        }
        self.tasks: list[SequenceTask] = [task for data, seed in self._corpora for task in self._plan(data, seed)]
        if not self.tasks:
            raise ValueError(f"there is nothing to do: {'; '.join(self.left_out)}")
        require_writable(out)
        self._sources: dict[tuple[str, int], str | Path] = {}

    @property
    def edits_planned(self) -> int:
        """How many edits the whole grid has."""
        return sum(task.length for task in self.tasks)

    def open_models(self) -> list[dict[str, Any]]:
        """Train or load every model once, and say what each is and knows.

        Raises:
            RuntimeError: a small model does not know its corpus well enough for edits of it to mean anything.
            OSError, ValueError: a model cannot be had.
        """
        return [self._describe(data, seed) for data, seed in self._corpora]

    def open_results(self, models: list[dict[str, Any]], *, command: Sequence[str]) -> ResultsFolder:
        """The finished edits of an interrupted run, or none.

        Args:
            models: from `open_models`.
            command: the words of the command line.

        Raises:
            ValueError: the folder holds a run on which other settings had a bearing.
            OSError: the folder cannot be made or written to.
        """
        header = {
            "format": FORMAT,
            "commands": [list(command)],
            "versions": self._versions(),
            "machine": _machine(),
            "settings": asdict(self.settings),
            "optimisers": {
                name: {"optimizer": "Adam", "steps": method.steps, "lr": method.lr} for name, method in METHODS.items()
            },
            "recommended": {name: repr(OverToneConfig.recommended(name)) for name in RECOMMENDED},
            "held_out_texts": HELD_OUT_TEXTS,
            "models": models,
        }
        results = ResultsFolder(self.out, header, self.shard)
        for task in self.tasks:
            for edit, outcome in zip(task.edits, results.done.get(task.key, ()), strict=False):
                if (edit.prompt, edit.target_new) != (outcome.prompt, outcome.target_new):
                    results.close()
                    raise ValueError(
                        f"{results.results} holds other edits of {task.data} ({outcome.prompt!r} where this run has "
                        f"{edit.prompt!r}): choose another folder, or remove this file"
                    )
        return results

    def left(self, results: ResultsFolder) -> list[SequenceTask]:
        """This process' tasks without outcomes."""
        mine = self.shard.share(self.tasks, cost=lambda task: task.length)
        return [task for task in mine if task.key not in results.done]

    def perform(self, results: ResultsFolder) -> Iterator[list[EditOutcome]]:
        """Make the edits that are not on disk yet, and yield those of each sequence once they are."""
        for _, group in groupby(self.left(results), key=lambda task: self._sources[task.data, task.seed]):
            # The longest first, so that no worker is left alone with one at the end.
            tasks = sorted(group, key=lambda task: -task.length)
            model = self.source.open(self._corpora[tasks[0].data, tasks[0].seed], tasks[0].seed)
            for outcomes in perform_all(model.workplace, model.source, tasks, workers=self.workers):
                results.append(outcomes)
                checkpoint_path(results.checkpoints, outcomes[0].sequence_key).unlink(missing_ok=True)
                yield outcomes

    def wait_for_others(self, results: ResultsFolder, *, every: float = 5.0) -> Iterator[int]:
        """Until all ranks are done, how many edits of the grid are, once in a while.

        Args:
            results: of this rank.
            every: seconds between two looks at the folder.
        """
        while True:
            results.refresh()
            missing = sum(task.length for task in self.tasks if task.key not in results.done)
            yield self.edits_planned - missing
            if not missing:
                return
            time.sleep(every)

    def finish(self, results: ResultsFolder) -> list[EditOutcome]:
        """Put the results file in the order of the grid, and return the grid's outcomes."""
        results.finish(task.key for task in self.tasks)
        return [outcome for task in self.tasks for outcome in results.done[task.key]]

    # ---- what there is to do

    def _check(self) -> None:
        settings = self.settings
        for argument in ("data", "seeds", "methods", "losses", "lengths"):
            values = getattr(settings, argument)
            if not values:
                raise ValueError(f"{argument} is empty: name at least one")
        for length in settings.lengths:
            if length < 1:
                raise ValueError(f"lengths must be at least 1, got {length}")
        for argument, count in (("edits", settings.edits), ("workers", self.workers)):
            if count < 1:
                raise ValueError(f"{argument} must be at least 1, got {count}")
        look_up(dict.fromkeys(CORPORA), "corpus", settings.data)
        for data in settings.data:
            if data not in WORLDS and data not in settings.paths:
                raise ValueError(f"data {data} needs its published file: pass --{data} PATH")
        for method in settings.methods:
            require_method(method)
        if self.workers > 1 and not self.shard.is_alone:
            raise ValueError(f"workers must be 1 under torchrun, where every rank is one, got {self.workers}")
        if self.workers > 1 and isinstance(self.source, NamedModel) and self.source.device != "cpu":
            raise ValueError(
                f"workers must be 1 on {self.source.device}, got {self.workers}; use torchrun for several GPUs"
            )

    def _supported(self) -> list[tuple[str, str]]:
        """The pairs of method and loss that are possible, method after method."""
        grid = []
        for method in self.settings.methods:
            reasons = {loss.name: unsupported(method, loss) for loss in self._losses}
            possible = [name for name, reason in reasons.items() if reason is None]
            if not possible:
                raise ValueError(f"losses: {next(iter(reasons.values()))}")
            grid += [(method, name) for name in possible]
            self.left_out += [reason for reason in reasons.values() if reason is not None]
        return grid

    def _plan(self, data: str, seed: int) -> Iterator[SequenceTask]:
        corpus = self._corpora[data, seed]
        held_out_texts = _held_out_texts(corpus, seed)
        known_texts = tuple(corpus.training_texts())
        traced = self.settings.methods[0], self.settings.seeds[0], 1
        for length in self.settings.lengths:
            for number, edits in enumerate(self._sequences(corpus, data, seed, length)):
                for method, loss in self._grid:
                    yield SequenceTask(
                        data=data,
                        seed=seed,
                        method=method,
                        loss=loss,
                        sequence=number,
                        edits=edits,
                        held_out_texts=held_out_texts,
                        known_texts=() if method in METHODS else known_texts,
                        checkpoints=self.out / CHECKPOINTS,
                        is_traced=(method, seed, length) == traced and method in METHODS,
                    )

    def _sequences(self, corpus: Corpus, data: str, seed: int, length: int) -> list[tuple[Edit, ...]]:
        count = max(1, self.settings.edits // length)
        try:
            edits = corpus.edits(count * length, seed=seed)
        except ValueError as error:
            if length <= self.settings.edits or not self.settings.fit_lengths:
                raise ValueError(f"{data}, sequences of {length}: {error}") from error
            self.left_out.append(f"{data} has no sequence of {length} with seed {seed}: {error}")
            return []
        return [tuple(edits[start : start + length]) for start in range(0, len(edits), length)]

    def _path(self, data: str) -> Path | None:
        return Path(self.settings.paths[data]) if data in self.settings.paths else None

    def _size(self, data: str) -> int | None:
        return None if data in WORLDS else self.settings.size

    def _versions(self) -> dict[str, str]:
        versions = {"python": platform.python_version(), **library_versions()}
        if not set(self.settings.methods) <= METHODS.keys():
            versions["easyedit"] = easyedit_version()
        return versions

    # ---- what is edited

    def _describe(self, data: str, seed: int) -> dict[str, Any]:
        corpus = self._corpora[data, seed]
        model: EditedModel = self.source.open(corpus, seed)
        if not self._sources:
            self._try_methods(model, corpus)
        self._sources[data, seed] = model.source
        path = self._path(data)
        with one_thread():
            knowledge = self.source.knowledge(corpus, seed)
            before = perplexity(model.workplace.model, model.workplace.tokenizer, _held_out_texts(corpus, seed))
        return {
            "data": data,
            "seed": seed,
            "title": model.title,
            "knowledge": knowledge,
            "perplexity": before,
            "fingerprint": model.workplace.fingerprint,
            "file": None if path is None else hashlib.sha256(path.read_bytes()).hexdigest(),
            "size": self._size(data),
        }

    def _try_methods(self, model: EditedModel, corpus: Corpus) -> None:
        """Open each method once, so that a model that it does not know is refused before the first edit."""
        for method in self.settings.methods:
            with open_session(model.workplace, method, 0, corpus.training_texts()):
                pass


def default_workers(settings: BenchSettings) -> int:
    """Processes: two on the CPU, one where a GPU does the work or the ranks of a launcher share it."""
    on_gpu = settings.model is not None and default_device() != "cpu"
    return 1 if on_gpu or not Shard.from_environment().is_alone else min(2, os.cpu_count() or 1)


def _held_out_texts(corpus: Corpus, seed: int) -> tuple[str, ...]:
    """As many as tell a broken model from a sound one; all of them would take longer than most edits."""
    texts = corpus.held_out_texts()
    return tuple(random.Random(f"perplexity {seed}").sample(texts, min(len(texts), HELD_OUT_TEXTS)))


def _machine() -> str:
    cores = f"{os.cpu_count()} cores, {platform.machine()}"
    return f"{cores}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else cores
