"""Several processes: gradients, held steps and a spread vocabulary are those of one process.

They are started as users start theirs. What would wait for another rank for ever ends after a minute, with the rank's
name in the error.
"""

from __future__ import annotations

import pytest
from launch import World

# What accelerate's launcher adds to torchrun's is its environment. Without GPUs, --multi_gpu is its way to several
# processes by torchrun; its --cpu asks for MPI.
ACCELERATE = (
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_machines=1",
    "--mixed_precision=no",
    "--dynamo_backend=no",
    "--main_process_port=0",
)

GRADIENTS = [f"gradient.{engine}" for engine in ("ddp", "fsdp2", "accelerator", "trainer")]
ENGINES = ["ddp", "ddp_attached", "fsdp2_attached", "fsdp2_computed", "trainer"]
MORE_ENGINES = ["ddp_compiled", "ddp_unused", "ddp_views", "fsdp2_plain", "accelerator"]
HOLDS = [f"holds.{engine}_AdamW" for engine in ENGINES]
VOCABULARY = [
    f"vocabulary.{name}"
    for name in ("logits", "plain_shard", "layer", "states_and_holds", "bytes", "refusals", "compiled", "groups")
]
ANCHORS = "anchors.waited_for_together"
TENSOR_PARALLEL = "tensor_parallel.from_pretrained"


@pytest.fixture(scope="module")
def two():
    """Two processes, started once, that went through all checks of those that are not slow."""
    return World([*GRADIENTS, *HOLDS, ANCHORS, *VOCABULARY, TENSOR_PARALLEL])


class TestGradients:
    """Half the rows in each process, one row all ignored: every engine to 1e-6 of the literal loss."""

    @pytest.mark.parametrize("check", GRADIENTS)
    def test_are_those_of_one_process(self, two, check):
        assert two.agrees(check)

    @pytest.mark.slow
    def test_under_accelerates_launcher(self):
        world = World(GRADIENTS, launcher=ACCELERATE)
        assert all(world.agrees(check) for check in GRADIENTS)


class TestHeldTogether:
    @pytest.mark.parametrize("check", HOLDS)
    def test_weights_are_those_of_one_process(self, two, check):
        """With accumulation, in which some micro-batches are held, on all ranks or on none."""
        assert two.agrees(check)

    @pytest.mark.slow
    @pytest.mark.parametrize("processes", [2, 4])
    def test_every_engine_and_optimizer(self, processes):
        checks = [f"holds.{engine}_{name}" for engine in (*ENGINES, *MORE_ENGINES) for name in ("Adam", "AdamW")]
        world = World(checks, processes=processes)
        assert all(world.agrees(check) for check in checks)


class TestAnchors:
    def test_are_waited_for_together(self, two):
        assert two.agrees(ANCHORS)


class TestSpreadVocabulary:
    @pytest.mark.parametrize("check", VOCABULARY)
    def test_is_the_whole_one(self, two, check):
        assert two.agrees(check)

    def test_a_model_that_spreads_it_need_not_be_told(self, two):
        """transformers' tp_plan="auto"."""
        assert two.agrees(TENSOR_PARALLEL)

    @pytest.mark.slow
    @pytest.mark.parametrize("processes", [3, 4])
    def test_on_more_ranks(self, processes):
        """Some of which have no part of a vocabulary of two."""
        world = World(VOCABULARY, processes=processes)
        assert all(world.agrees(check) for check in VOCABULARY)
