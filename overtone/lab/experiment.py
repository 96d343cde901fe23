"""Every edit with every method and every loss: edit, score, restore; several processes, one result."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from overtone.lab.editors import METHODS
from overtone.lab.losses import LOSSES
from overtone.lab.metrics import Examination, examine, score
from overtone.lab.records import EditRecord
from overtone.lab.sessions import open_session
from overtone.lab.traces import Tracer
from overtone.lab.world import Edit

Result = TypeVar("Result", covariant=True)


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

    def perform(self, workplace: Workplace) -> EditRecord:
        """Make the edit and score it."""
        return workplace.perform(self)


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


class NotRestoredError(RuntimeError):
    """A model did not come back bit for bit after an edit: no edit after it could be trusted."""


class Workplace:
    """A model that is edited and restored again and again."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """Take a model in evaluation mode, and its tokenizer."""
        self.model = model
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint(model)
        # The losses of the same edits come one after the other.
        self.examine = lru_cache(maxsize=1)(self._examine_unedited)

    @classmethod
    def load(cls, name: str | Path, device: str = "cpu") -> Workplace:
        """Load a model and its tokenizer.

        Args:
            name: a causal language model of the Hugging Face hub, or a folder that `save_pretrained` wrote.
            device: where to; on the CPU in float32, elsewhere in the precision in which the model is stored.

        Raises:
            ValueError: the tokenizer has neither a pad token nor an end-of-sequence token to pad with.
            OSError: there is no such model.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(name)
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise ValueError(f"the tokenizer of {str(name)!r} has neither a pad token nor an end-of-sequence token")
            tokenizer.pad_token = tokenizer.eos_token
        model = AutoModelForCausalLM.from_pretrained(name, torch_dtype="auto")
        model = model.float() if device == "cpu" else model.to(device)
        return cls(model.eval(), tokenizer)

    def perform(self, task: Task) -> EditRecord:
        """Make one edit on the clean model, score it, and restore the model.

        Raises:
            NotRestoredError: the model did not come back bit for bit.
        """
        (examination,) = self.examine((task.edit,))
        tracer = Tracer(self.model, self.tokenizer, task.edit) if task.is_traced else None
        with open_session(self, task.method, task.index) as session:
            fitted = session.apply(task.edit, LOSSES[task.loss], None if tracer is None else tracer.observe)
            if tracer is not None:
                tracer.record(fitted.steps)
            scores = score(session.model, self.tokenizer, examination)
        self.require_restored(METHODS[task.method].title)
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

    def require_restored(self, whose: str) -> None:
        """Refuse to go on with another model than at the beginning.

        Raises:
            NotRestoredError: the model is not what it was, bit for bit.
        """
        if fingerprint(self.model) != self.fingerprint:
            raise NotRestoredError(f"{whose} did not restore the model: no edit after this one could be trusted")

    def _examine_unedited(self, edits: tuple[Edit, ...]) -> list[Examination]:
        return [examine(self.model, self.tokenizer, edit) for edit in edits]


class Performable(Protocol[Result]):
    """A task of any experiment."""

    def perform(self, workplace: Workplace) -> Result:
        """Work on the clean model and leave it clean."""


def perform_all(
    workplace: Workplace, source: str | Path, tasks: Sequence[Performable[Result]], *, workers: int = 1
) -> Iterator[Result]:
    """Perform tasks and yield their results as they finish.

    Every task computes on one thread, so the results do not depend on the number of workers. Closing the iterator, or
    an exception such as Ctrl-C, ends the workers after the task that each has at hand.

    Args:
        workplace: with the model; a single worker edits there.
        source: folder or name of the same model and tokenizer, from which further workers load theirs.
        tasks: what to do; with more than one worker they finish in any order.
        workers: processes; 1 works in this one.

    Raises:
        ValueError: workers is less than 1.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    workers = min(workers, len(tasks))
    if workers <= 1:
        with one_thread():
            for task in tasks:
                yield task.perform(workplace)
        return
    # Spawned, not forked: a fork of a process whose thread pools have run may wait for their locks for ever.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(source, workplace.fingerprint)
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
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {_checksum(tensor)}".encode())
    return digest.hexdigest()


_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 2**24
_SPREAD = 0x9E3779B97F4A7C15 - 2**64  # of multiplicative hashing, as int64: neighbours get very different weights


def _checksum(tensor: torch.Tensor) -> int:
    """The weighted sum of a tensor's words modulo 2**64, on its own device: quick where copying billions would not be.

    The weights are odd, and so have an inverse: a change of one word always shows.
    """
    words = tensor.detach().contiguous().flatten().view(_WORDS[tensor.element_size()])
    total = 0
    for number, chunk in enumerate(words.split(_CHUNK)):
        weights = torch.arange(len(chunk), device=chunk.device).add_(number * _CHUNK).mul_(_SPREAD).bitwise_or_(1)
        total += int((chunk.long() * weights).sum())
    return total % 2**64


_workplace: Workplace


def _start_worker(source: str | Path, expected_fingerprint: str) -> None:
    from transformers.utils.logging import disable_progress_bar

    # Ctrl-C reaches every process of the terminal; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    torch.set_num_threads(1)
    global _workplace
    disable_progress_bar()
    _workplace = Workplace.load(source)
    if _workplace.fingerprint != expected_fingerprint:
        raise RuntimeError(f"the model in {source} is not the one that the run began with")


def end_with_parent() -> None:
    """End this process when the one that started it has gone: killed, it can tell its workers nothing."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _perform(task: Performable[Result]) -> Result:
    return task.perform(_workplace)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, whose sums do not depend on how many cores there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
