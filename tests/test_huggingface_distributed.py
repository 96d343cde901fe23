"""DDP, FSDP2 and Trainer on two processes give the single-process gradient, under both launchers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "distributed" / "gradient.py"
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    # Without GPUs, --multi_gpu is accelerate's way to several processes by torchrun; its --cpu asks for MPI.
    "accelerate": [
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes=2",
        "--num_machines=1",
        "--mixed_precision=no",
        "--dynamo_backend=no",
        "--main_process_port=0",
    ],
}


class TestTwoProcesses:
    @pytest.mark.parametrize("launcher", sorted(LAUNCHERS))
    def test_gradient_is_that_of_one_process(self, launcher):
        """Half the rows in each process, one row all ignored: every engine to 1e-6 of the literal loss."""
        engines = ["ddp", "fsdp2", "accelerator", "trainer"]
        finished = subprocess.run(
            [sys.executable, "-m", *LAUNCHERS[launcher], str(SCRIPT), *engines],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert finished.returncode == 0, finished.stderr[-4000:]
        for engine in engines:
            for rank in range(2):
                assert f"{engine}: rank {rank} of 2 agrees" in finished.stdout
