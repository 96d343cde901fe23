"""Several processes: gradients, held steps and a spread vocabulary are those of one process.

Each script is started as its users start theirs. What would wait for another rank for ever ends after a minute, with
the rank's name in the error.
"""

from __future__ import annotations

import pytest
from launch import agreed, launch

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


class TestHeldTogether:
    def test_weights_are_those_of_one_process(self):
        """With accumulation, in which some micro-batches are held, on all ranks or on none."""
        assert agreed(launch("holds.py", *HELD, "--optimizers", "AdamW"), HELD, 2)

    @pytest.mark.slow
    @pytest.mark.parametrize("processes", [2, 4])
    def test_every_engine_and_optimizer(self, processes):
        assert agreed(launch("holds.py", *HELD, *HELD_TOO, processes=processes), [*HELD, *HELD_TOO], processes)


class TestAnchors:
    def test_are_waited_for_together(self):
        assert agreed(launch("anchors.py"), ["anchors"], 2)


class TestSpreadVocabulary:
    def test_is_the_whole_one(self):
        assert agreed(launch("vocabulary.py"), VOCABULARY, 2)

    def test_a_model_that_spreads_it_need_not_be_told(self):
        """transformers' tp_plan="auto"."""
        assert agreed(launch("tensor_parallel.py"), ["tensor_parallel"], 2)

    @pytest.mark.slow
    @pytest.mark.parametrize("processes", [3, 4])
    def test_on_more_ranks(self, processes):
        """Some of which have no part of a vocabulary of two."""
        assert agreed(launch("vocabulary.py", processes=processes), VOCABULARY, processes)
