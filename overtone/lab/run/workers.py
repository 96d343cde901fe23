"""Tasks in several processes, with the results that a single process has."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import torch

from overtone.lab.model.workplace import Workplace
from overtone.lab.results.record import EditRecord
from overtone.lab.run.task import SequenceTask
from overtone.lab.run.together import TogetherTask


def perform_all(
    workplace: Workplace,
    source: str | Path,
    tasks: Sequence[SequenceTask | TogetherTask],
    *,
    workers: int = 1,
    dtype: str | None = None,
) -> Iterator[list[list[EditRecord]]]:
    """Perform tasks and yield of each, when it is finished, the records of its sequences.

    Every task computes on one thread, so the results do not depend on the number of workers. Closing the iterator, or
    an exception such as Ctrl-C, ends the workers after the task that each has at hand.

    Args:
        workplace: with the model; a single worker edits there.
        source: folder or name of the same model and tokenizer, from which further workers load theirs.
        tasks: what to do; with more than one worker they finish in any order.
        workers: processes; 1 works in this one.
        dtype: in which further workers load the model (see `Workplace.load`).
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        with one_thread():
            for task in tasks:
                yield _sequences(task, workplace)
        return
    # Spawned, not forked: a fork of a process whose thread pools have run may wait for their locks for ever.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(source, workplace.fingerprint, dtype)
    )
    try:
        for future in as_completed([executor.submit(_perform, task) for task in tasks]):
            yield future.result()
    finally:
        executor.shutdown(cancel_futures=True)


_workplace: Workplace


def _start_worker(source: str | Path, expected_fingerprint: str, dtype: str | None = None) -> None:
    from transformers.utils.logging import disable_progress_bar

    # Ctrl-C reaches every process of the terminal; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    torch.set_num_threads(1)
    global _workplace
    disable_progress_bar()
    _workplace = Workplace.load(source, dtype=dtype)
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


def _perform(task: SequenceTask | TogetherTask) -> list[list[EditRecord]]:
    return _sequences(task, _workplace)


def _sequences(task: SequenceTask | TogetherTask, workplace: Workplace) -> list[list[EditRecord]]:
    return [task.perform(workplace)] if isinstance(task, SequenceTask) else task.perform(workplace)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, whose sums do not depend on how many cores there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
