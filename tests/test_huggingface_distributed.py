"""DDP, FSDP2 and Trainer on two processes give the single-process gradient, under both launchers."""

from __future__ import annotations

import pytest
from launch import TORCHRUN, agreed, launch

LAUNCHERS = {
    "torchrun": TORCHRUN,
    # Without GPUs, --multi_gpu is accelerate's way to several processes by torchrun; its --cpu asks for MPI.
    "accelerate": (
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_machines=1",
        "--mixed_precision=no",
        "--dynamo_backend=no",
        "--main_process_port=0",
    ),
}


class TestTwoProcesses:
    # What accelerate's launcher adds to torchrun's is its environment; half a minute goes into starting two processes.
    @pytest.mark.parametrize("launcher", ["torchrun", pytest.param("accelerate", marks=pytest.mark.slow)])
    def test_gradient_is_that_of_one_process(self, launcher):
        """Half the rows in each process, one row all ignored: every engine to 1e-6 of the literal loss."""
        engines = ["ddp", "fsdp2", "accelerator", "trainer"]
        assert agreed(launch("gradient.py", *engines, launcher=LAUNCHERS[launcher], timeout=240), engines)
