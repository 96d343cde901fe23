"""Worker processes: forked from one that has imported what they need, so that only one does."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import BaseContext

NEEDED = ["overtone.lab.run.workers", "transformers.models.llama.modeling_llama", "transformers.generation", "peft"]
"""What a worker imports before its first edit; a worker imports what is missing here itself."""


def worker_context() -> BaseContext:
    """The context in which workers are started.

    They are not forked from this process: a fork of a process whose thread pools have run may wait for their locks for
    ever. Where there is no fork server, as on Windows, each starts from nothing.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(NEEDED)
    return context


def import_ahead() -> None:
    """Let the fork server import while this process does so too: both take seconds, on one core each."""
    if worker_context().get_start_method() == "forkserver":
        from multiprocessing import forkserver

        forkserver.ensure_running()
