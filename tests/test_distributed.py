"""Several processes: gradients, held steps and a spread vocabulary are those of one process.

Each script is started as its users start theirs. What would wait for another rank for ever ends after a minute, with
the rank's name in the error.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "distributed"
HELD = ["ddp", "ddp_attached", "fsdp2_attached", "fsdp2_computed", "trainer"]
HELD_TOO = ["ddp_compiled", "ddp_unused", "ddp_views", "fsdp2_plain", "accelerator"]
VOCABULARY = [
    "check_logits",
    "check_plain_shard",
    "check_layer",
    "check_states_and_holds",
    "check_bytes",
    "check_refusals",
    "check_compiled",
    "check_groups",
]


def run(script: str, *arguments: str, processes: int = 2) -> str:
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"),
            *(str(SCRIPTS / script), *arguments),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return finished.stdout


def agreed(output: str, names: list[str], processes: int) -> bool:
    return all(f"{name}: rank {rank} of {processes} agrees" in output for name in names for rank in range(processes))


class TestHeldTogether:
    def test_weights_are_those_of_one_process(self):
        """With accumulation, in which some micro-batches are held, on all ranks or on none."""
        assert agreed(run("holds.py", *HELD, "--optimizers", "AdamW"), HELD, 2)

    @pytest.mark.slow
    @pytest.mark.parametrize("processes", [2, 4])
    def test_every_engine_and_optimizer(self, processes):
        assert agreed(run("holds.py", *HELD, *HELD_TOO, processes=processes), [*HELD, *HELD_TOO], processes)


class TestAnchors:
    def test_are_waited_for_together(self):
        assert agreed(run("anchors.py"), ["anchors"], 2)


class TestSpreadVocabulary:
    def test_is_the_whole_one(self):
        assert agreed(run("vocabulary.py"), VOCABULARY, 2)

    def test_a_model_that_spreads_it_need_not_be_told(self):
        """transformers' tp_plan="auto"."""
        assert agreed(run("tensor_parallel.py"), ["tensor_parallel"], 2)

    @pytest.mark.slow
    @pytest.mark.parametrize("processes", [3, 4])
    def test_on_more_ranks(self, processes):
        """Some of which have no part of a vocabulary of two."""
        assert agreed(run("vocabulary.py", processes=processes), VOCABULARY, processes)
