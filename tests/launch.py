"""Starts processes: checks on several of this machine, as their users start theirs, and a copy of the test's own."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

CHECKS = Path(__file__).parent / "distributed" / "checks.py"

TORCHRUN = ("torch.distributed.run", "--standalone")


class World:
    """What several processes said of the checks that they went through together.

    Starting them costs more than most checks, so one world is asked for many.
    """

    def __init__(self, checks: list[str], *, processes: int = 2, launcher: tuple[str, ...] = TORCHRUN) -> None:
        self.processes = processes
        count = f"--{'num_processes' if 'accelerate' in launcher[0] else 'nproc_per_node'}={processes}"
        self.finished = subprocess.run(
            [sys.executable, "-m", *launcher, count, str(CHECKS), *checks],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    def agrees(self, check: str) -> bool:
        """Whether every rank said so of a check; where the world ended before, the error says at which."""
        said = [f"{check}: rank {rank} of {self.processes} agrees" for rank in range(self.processes)]
        is_agreed = all(line in self.finished.stdout.splitlines() for line in said)
        assert is_agreed or self.finished.returncode, f"no rank was asked for {check}"
        assert is_agreed, self.finished.stderr[-4000:]
        return True


def exit_code_of(call: Callable[[], object]) -> int:
    """The exit code of a forked process that makes a call: 0 where it returned, as subprocess gives it where it ended.

    A fork has everything imported that another process would first import for seconds. The call computes on one thread,
    since the threads of this process are not there.
    """
    import torch

    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            call()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
