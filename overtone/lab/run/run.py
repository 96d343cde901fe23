"""One run in its output folder, which the same command goes on with where it was interrupted."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from overtone import __version__
from overtone.config import RECOMMENDED, OverToneConfig
from overtone.lab.edit.methods import METHODS
from overtone.lab.edit.sessions import easyedit_version, open_session
from overtone.lab.edit.trial import try_method
from overtone.lab.model.sources import LabModels, ModelSource, NamedModel, default_device
from overtone.lab.results.files import require_writable
from overtone.lab.results.folder import ResultsFolder
from overtone.lab.results.header import FORMAT
from overtone.lab.run.plan import Plan, held_out_texts, make_plan, path_of, size_of
from overtone.lab.run.settings import RunSettings
from overtone.lab.run.sharding import Rank
from overtone.lab.run.task import SequenceTask
from overtone.lab.run.together import TogetherTask, together
from overtone.lab.run.workers import one_thread, perform_all
from overtone.lab.score.perplexity import perplexity


class Run:
    """A grid of edits in an output folder."""

    def __init__(self, settings: RunSettings, out: Path, *, workers: int = 1, shard: Rank | None = None) -> None:
        """Check everything that can be checked before anything takes time.

        Args:
            settings: the grid.
            out: the output folder; made if need be, once there are models.
            workers: processes.
            shard: this process' place among those that share the run; None: from the environment.

        Raises:
            ValueError: as `overtone.lab.run.plan.make_plan`, an unknown architecture, a setting of a method that its
                models cannot take, or a number of workers that cannot be.
            OSError: a file cannot be read, or the folder cannot be made or written to.
        """
        self.settings = settings
        self.shard = shard or Rank.from_environment()
        self.results = ResultsFolder(out)
        self._workers = workers
        is_first = self.shard.rank == 0
        self._source: ModelSource = (
            LabModels(settings.arch, show_progress=is_first)
            if settings.model is None
            else NamedModel(settings.model, dtype=settings.dtype, show_progress=is_first)
        )
        self._check_workers()
        knows = self._source.knows if isinstance(self._source, NamedModel) else None
        self.plan: Plan = make_plan(settings, knows)
        if isinstance(self._source, LabModels):
            self._try_own_methods(self._source.untrained())
        require_writable(out)

    def open_models(self) -> list[dict[str, Any]]:
        """Train or load every model once, and say what each is and knows.

        Raises:
            RuntimeError: a small model does not know its corpus well enough for edits of it to mean anything.
            OSError, ValueError: a model cannot be had, or a method does not know it.
        """
        data, seed = next(iter(self.plan.corpora))
        self._try_methods(data, seed)
        return [self._describe(data, seed) for data, seed in self.plan.corpora]

    def begin(self, models: list[dict[str, Any]], *, command: Sequence[str]) -> None:
        """Make the output folder, or go on in it.

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
            "data": self.settings.data,
            "methods": self.settings.methods,
            "losses": list(dict.fromkeys(task.loss for task in self.plan.tasks)),
            "recommended": {name: repr(OverToneConfig.recommended(name)) for name in RECOMMENDED},
            "held_out_texts": self.settings.held_out_texts,
            "generate": self.settings.generate,
            "models": models,
        }
        self.results.begin(header, is_writer=self.shard.rank == 0)
        for task in self.plan.tasks:
            if self.results.has(task.key):
                self._require_same_edits(task)

    def left(self) -> list[SequenceTask]:
        """This process' tasks that are not on disk yet."""
        if self.settings.sharing == 1:
            mine = self.shard.share(self.plan.tasks, cost=lambda task: task.length)
        else:
            # What shares a pass stays together.
            groups = self._together(self.plan.tasks)
            shares = self.shard.share(groups, cost=lambda group: sum(task.length for task in group.tasks))
            mine = [task for group in shares for task in group.tasks]
        return [task for task in mine if not self.results.has(task.key)]

    def perform(self) -> Iterator[int]:
        """Make the edits that are left, and yield how many are on disk more whenever some are."""
        for (data, seed), group in groupby(self.left(), key=lambda task: (task.data, task.seed)):
            # The longest first, so that no worker is left alone with one at the end.
            tasks = sorted(group, key=lambda task: -task.length)
            model = self._source.open(self.plan.corpora[data, seed], seed)
            for sequences in perform_all(
                model.workplace, model.source, self._performable(tasks), workers=self._workers, dtype=model.dtype
            ):
                for records in sequences:
                    self.results.write(records)
                yield sum(map(len, sequences))

    def _performable(self, tasks: list[SequenceTask]) -> list[SequenceTask | TogetherTask]:
        if self.settings.sharing == 1:
            return [*tasks]
        own = [task for task in tasks if task.method in METHODS]
        return [*self._together(own), *(task for task in tasks if task.method not in METHODS)]

    def _together(self, tasks: list[SequenceTask]) -> list[TogetherTask]:
        return together(tasks, self.settings.sharing, generates=self.settings.generate)

    def finished(self) -> int:
        """How many edits of the grid are on disk, of whichever process."""
        return sum(task.length for task in self.plan.tasks if self.results.has(task.key))

    def wait_for_others(self, *, every: float = 5.0) -> Iterator[int]:
        """Until all ranks are done, `finished` once in so many seconds."""
        while True:
            finished = self.finished()
            yield finished
            if finished == self.plan.edits:
                return
            time.sleep(every)

    def _check_workers(self) -> None:
        if self._workers < 1:
            raise ValueError(f"workers must be at least 1, got {self._workers}")
        if self._workers > 1 and not self.shard.is_alone:
            raise ValueError(f"workers must be 1 under torchrun, where every rank is one, got {self._workers}")
        if self._workers > 1 and isinstance(self._source, NamedModel) and self._source.device != "cpu":
            raise ValueError(
                f"workers must be 1 on {self._source.device}, got {self._workers}; use torchrun for several GPUs"
            )

    def _require_same_edits(self, task: SequenceTask) -> None:
        for edit, record in zip(task.edits, self.results.read(task.key), strict=True):
            if (edit.prompt, edit.target_new) != (record.prompt, record.target_new):
                raise ValueError(
                    f"{self.results.folder} holds other edits of {task.data} ({record.prompt!r} where this run has "
                    f"{edit.prompt!r}): choose another folder, or remove this one"
                )

    def _describe(self, data: str, seed: int) -> dict[str, Any]:
        corpus, path = self.plan.corpora[data, seed], path_of(self.settings, data)
        model = self._source.open(corpus, seed)
        workplace = model.workplace
        with one_thread():
            knowledge = self._source.knowledge(corpus, seed)
            # Where edits share passes the edited models' perplexity is not measured, so nothing compares with this.
            texts = held_out_texts(self.settings, corpus, seed) if self.settings.sharing == 1 else ()
            before = perplexity(workplace.model, workplace.tokenizer, texts) if texts else None
        return {
            "data": data,
            "seed": seed,
            "title": model.title,
            "knowledge": knowledge,
            "perplexity": before if before is not None and math.isfinite(before) else None,
            "fingerprint": workplace.fingerprint,
            "file": None if path is None else hashlib.sha256(path.read_bytes()).hexdigest(),
            "size": size_of(self.settings, data),
        }

    def _try_methods(self, data: str, seed: int) -> None:
        """Open each method once, so that a model that it does not know is refused before the first edit."""
        corpus = self.plan.corpora[data, seed]
        workplace = self._source.open(corpus, seed).workplace
        if isinstance(self._source, NamedModel):  # the lab's own were tried before they were trained
            self._try_own_methods(workplace.model)
        for method in self.settings.methods:
            if method not in METHODS:
                with open_session(workplace, method, None, 0, corpus.training_texts()):
                    pass

    def _try_own_methods(self, model: Any) -> None:
        for method in filter(METHODS.__contains__, self.settings.methods):
            chosen = METHODS[method].changed(self.settings.changes, is_large=self.settings.model is not None)
            try_method(model, METHODS[method], chosen, at_once=self.settings.sharing)

    def _versions(self) -> dict[str, str]:
        # Its own version is not asked of the installation: it also runs from a checkout that nobody installed.
        libraries = {"overtone": __version__} | {name: version(name) for name in ("torch", "transformers", "peft")}
        easyedit = {} if set(self.settings.methods) <= METHODS.keys() else {"easyedit": easyedit_version()}
        return {"python": platform.python_version(), **libraries, **easyedit}


def _machine() -> str:
    cores = f"{os.cpu_count()} cores, {platform.machine()}"
    return f"{cores}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else cores


def default_workers(settings: RunSettings) -> int:
    """Processes: two on the CPU, one where a GPU does the work or the ranks of a launcher share it."""
    on_gpu = settings.model is not None and default_device() != "cpu"
    return 1 if on_gpu or not Rank.from_environment().is_alone else min(2, os.cpu_count() or 1)
