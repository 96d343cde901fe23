"""Every edit with every method and every loss: edit, score, restore; several processes, one result."""

from __future__ import annotations

import hashlib
import multiprocessing
import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from overtone.lab.batching import encode_targets
from overtone.lab.editors import METHODS, fit
from overtone.lab.losses import LOSSES
from overtone.lab.metrics import Examination, examine, score
from overtone.lab.records import EditRecord
from overtone.lab.traces import Tracer
from overtone.lab.world import Edit


@dataclass(frozen=True)
class Task:
    """One edit to make and score.

    Attributes:
        index: of the edit in the run's list; it also seeds the method's random initial weights, so that every loss
            starts from the same ones.
        edit: the edit.
        method: name in `overtone.lab.editors.METHODS`.
        loss: name in `overtone.lab.losses.LOSSES`.
        is_traced: watch the probes at every step.
    """

    index: int
    edit: Edit
    method: str
    loss: str
    is_traced: bool = False

    @property
    def key(self) -> tuple[int, str, str]:
        """The key of the record that the task makes."""
        return self.index, self.method, self.loss


def plan(
    edits: Sequence[Edit], methods: Iterable[str], losses: Iterable[str], *, traced_method: str | None = None
) -> list[Task]:
    """All tasks of a grid, edit after edit."""
    methods, losses = list(methods), list(losses)
    return [
        Task(index, edit, method, loss, is_traced=method == traced_method)
        for index, edit in enumerate(edits)
        for method in methods
        for loss in losses
    ]


class Workplace:
    """A model that is edited and restored again and again."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """Take a model in evaluation mode, and its tokenizer."""
        self.model = model
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint(model)
        # The losses of one edit come one after the other.
        self._examine = lru_cache(maxsize=1)(self._examine_unedited)

    @classmethod
    def load(cls, path: Path) -> Workplace:
        """Load a model and its tokenizer from a folder that `save_pretrained` wrote, in float32."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        return cls(AutoModelForCausalLM.from_pretrained(path).float().eval(), AutoTokenizer.from_pretrained(path))

    def perform(self, task: Task) -> EditRecord:
        """Make one edit on the clean model, score it, and restore the model.

        Raises:
            RuntimeError: the model did not come back bit for bit.
        """
        method, loss = METHODS[task.method], LOSSES[task.loss]
        examination = self._examine(task.edit)
        tracer = Tracer(self.model, self.tokenizer, task.edit) if task.is_traced else None
        batch = encode_targets(self.tokenizer, [(task.edit.prompt, task.edit.target_new)], self.model.device)
        with method.open(self.model, task.index) as parameters:
            fitted = fit(
                self.model,
                parameters,
                batch,
                loss.build(method.name),
                steps=method.steps,
                lr=method.lr,
                stop_below=loss.stop_below,
                observe=None if tracer is None else tracer.observe,
            )
            if tracer is not None:
                tracer.record(fitted.steps)
            scores = score(self.model, self.tokenizer, examination)
        if fingerprint(self.model) != self.fingerprint:
            raise RuntimeError(f"{method.title} did not restore the model: no edit after this one could be trusted")
        return EditRecord(
            index=task.index,
            method=task.method,
            loss=task.loss,
            prompt=task.edit.prompt,
            target_new=task.edit.target_new,
            target_old=task.edit.target_old,
            scores=scores,
            steps=fitted.steps,
            ended=fitted.ended,
            seconds=fitted.seconds,
            trace=None if tracer is None else tracer.trace,
        )

    def _examine_unedited(self, edit: Edit) -> Examination:
        return examine(self.model, self.tokenizer, edit)


def perform_all(workplace: Workplace, path: Path, tasks: Sequence[Task], *, workers: int = 1) -> Iterator[EditRecord]:
    """Perform tasks and yield their records as they finish.

    Every task computes on one thread, so the records do not depend on the number of workers. Closing the iterator, or
    an exception such as Ctrl-C, ends the workers after the task that each has at hand.

    Args:
        workplace: with the model; a single worker edits there.
        path: folder of the same model and tokenizer, from which further workers load theirs.
        tasks: what to do; with more than one worker they finish in any order.
        workers: processes; 1 works in this one.

    Raises:
        ValueError: workers is less than 1.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    workers = min(workers, len(tasks))
    if workers <= 1:
        with _one_thread():
            yield from map(workplace.perform, tasks)
        return
    # Spawned, not forked: a fork of a process whose thread pools have run may wait for their locks for ever.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(path, workplace.fingerprint)
    )
    try:
        for future in as_completed([executor.submit(_perform, task) for task in tasks]):
            yield future.result()
    finally:
        executor.shutdown(cancel_futures=True)


def fingerprint(model: Any) -> str:
    """A checksum of a model's state: two models with the same one are the same, bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


_workplace: Workplace


def _start_worker(path: Path, expected_fingerprint: str) -> None:
    from transformers.utils.logging import disable_progress_bar

    # Ctrl-C reaches every process of the terminal; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    global _workplace
    disable_progress_bar()
    _workplace = Workplace.load(path)
    if _workplace.fingerprint != expected_fingerprint:
        raise RuntimeError(f"the model in {path} is not the one that the run began with")


def _perform(task: Task) -> EditRecord:
    return _workplace.perform(task)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
