"""Starts a script on several processes of this machine, as its users start theirs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parent / "distributed"

TORCHRUN = ("torch.distributed.run", "--standalone")


def launch(
    script: str, *arguments: str, processes: int = 2, launcher: tuple[str, ...] = TORCHRUN, timeout: float = 600
) -> str:
    """What a script of tests/distributed printed; a rank that fails fails the test."""
    count = f"--{'num_processes' if 'accelerate' in launcher[0] else 'nproc_per_node'}={processes}"
    finished = subprocess.run(
        [sys.executable, "-m", *launcher, count, str(SCRIPTS / script), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return finished.stdout


def agreed(output: str, names: list[str], processes: int = 2) -> bool:
    """Whether every rank said of each of the names that it agrees."""
    return all(f"{name}: rank {rank} of {processes} agrees" in output for name in names for rank in range(processes))
