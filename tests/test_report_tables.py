"""The numbers of a bench's tables, against cases small enough to count by hand."""

from __future__ import annotations

import math

import pytest
from bench_lines import outcome, scores, sequence, singles
from overtone.lab.bench_tables import (
    BEST_BASELINE,
    BEST_STOP,
    FULL_LOSS,
    ablation_blocks,
    editing_blocks,
    question_blocks,
    resampled_units,
)


def row(block, loss):
    (found,) = [row for row in block.rows if row.loss == loss]
    return found


class TestEditingBlocks:
    def test_means_of_each_measure(self):
        outcomes = [
            outcome(index=0, sequence=0, scores=scores(1.0, rel=0.5, loc=0.0), steps=10, perplexity=2.0),
            outcome(index=1, sequence=1, scores=scores(1.0, rel=1.0, loc=0.5), steps=30, perplexity=8.0),
        ]
        (block,) = editing_blocks(outcomes)
        measures = {name: estimate.mean for name, estimate in block.rows[0].measures.items()}
        assert measures["rel"] == 0.75
        assert measures["loc"] == 0.25
        assert measures["average"] == pytest.approx((2.5 / 4 + 3.5 / 4) / 2)
        assert measures["steps"] == 20.0
        assert measures["perplexity"] == pytest.approx(4.0), "the geometric mean of 2 and 8"
        assert measures["kl"] == 0.2

    def test_a_measure_without_probes_is_left_out(self):
        values = scores(1.0)
        del values.accuracy["gen"], values.accuracy["por"]
        (block,) = editing_blocks([outcome(scores=values)])
        assert block.rows[0].measures.keys() & {"rel", "gen", "por", "loc", "average"} == {"rel", "loc", "average"}

    def test_differences_to_the_best_baseline_and_to_the_best_early_stop(self):
        """The default threshold is a baseline; the best threshold is a rival of its own."""
        outcomes = [
            *singles([0.1, 0.1], loss="cross_entropy"),
            *singles([0.4, 0.6], loss="early_stopping"),
            *singles([0.7, 0.7], loss="early_stopping:stop_below=0.3"),
            *singles([0.3, 0.3], loss="label_smoothing"),
            *singles([0.9, 0.8], loss="overtone"),
        ]
        (block,) = editing_blocks(outcomes)
        assert block.rivals == {BEST_BASELINE: "early_stopping", BEST_STOP: "early_stopping:stop_below=0.3"}
        ours = row(block, "overtone").differences
        assert ours[BEST_BASELINE].mean == pytest.approx(0.35)
        assert ours[BEST_STOP].mean == pytest.approx(0.15)
        assert row(block, "cross_entropy").differences[BEST_BASELINE].mean == pytest.approx(-0.4)
        assert row(block, "early_stopping").differences.keys() == {BEST_STOP}, "the reference is not compared to itself"

    def test_edits_are_paired_whatever_their_order(self):
        baseline = singles([0.0, 0.5, 1.0])
        ours = singles([0.1, 0.6, 1.1], loss="overtone")
        (block,) = editing_blocks([*baseline, *reversed(ours)])
        difference = row(block, "overtone").differences[BEST_BASELINE]
        assert (difference.mean, difference.low, difference.high) == (pytest.approx(0.1),) * 3

    def test_the_same_index_of_another_seed_is_another_edit(self):
        outcomes = [
            *singles([0.0], seed=0),
            *singles([1.0], seed=1),
            *singles([0.5], seed=0, loss="overtone"),
            *singles([1.0], seed=1, loss="overtone"),
        ]
        (block,) = editing_blocks(outcomes)
        assert row(block, "overtone").differences[BEST_BASELINE].mean == pytest.approx(0.25)
        assert (block.seeds, block.units) == (2, 2)

    def test_failed_edits_count_nowhere_but_are_counted(self):
        (block,) = editing_blocks([*singles([0.2, 0.4]), *singles([None, 1.0], loss="overtone")])
        ours = row(block, "overtone")
        assert (ours.scored, ours.failed) == (1, 1)
        assert ours.measures["average"].mean == 1.0
        assert ours.differences[BEST_BASELINE].mean == pytest.approx(0.6), "paired with the same edit, not with both"
        assert ours.measures["steps"].count == 1

    def test_a_loss_that_only_failed(self):
        (block,) = editing_blocks([*singles([0.5, 0.5]), *singles([None, None], loss="overtone")])
        assert row(block, "overtone").measures == {}
        assert row(block, "overtone").differences == {}

    def test_a_baseline_that_only_failed_is_no_rival(self):
        (block,) = editing_blocks([*singles([None]), *singles([0.5], loss="overtone")])
        assert block.rivals == {}

    def test_blocks_by_data_then_length_then_method(self):
        outcomes = [
            *sequence([1.0, 1.0], data="zsre"),
            *singles([1.0], data="zsre", method="ft-m"),
            *singles([1.0], data="short"),
            *singles([1.0], data="zsre"),
        ]
        found = [(block.data, block.length, block.method) for block in editing_blocks(outcomes)]
        assert found == [("zsre", 1, "ft-m"), ("zsre", 1, "lora"), ("zsre", 2, "lora"), ("short", 1, "lora")]


class TestUnits:
    def test_single_edits_are_their_own_units(self):
        unit, units = resampled_units([*singles([1.0, 1.0], seed=0), *singles([1.0], seed=1)])
        assert unit == "edits"
        assert len(set(units)) == 3

    def test_three_sequences_are_resampled_whole(self):
        outcomes = [edit for number in range(3) for edit in sequence([1.0, 0.0], number=number)]
        unit, units = resampled_units(outcomes)
        assert unit == "sequences"
        assert units == [(0, 0), (0, 0), (0, 1), (0, 1), (0, 2), (0, 2)]

    def test_two_sequences_are_too_few(self):
        outcomes = [edit for seed in range(2) for edit in sequence([1.0, 0.0], seed=seed)]
        unit, units = resampled_units(outcomes)
        assert unit == "edits"
        assert len(set(units)) == 4

    def test_sequences_that_agree_inside_but_not_among_each_other(self):
        """Over edits the difference would be clear; over its three sequences, of which one is worse, it is not."""
        outcomes = []
        for seed, gain in enumerate((0.4, 0.3, -0.1)):
            outcomes += sequence([0.5] * 20, seed=seed)
            outcomes += sequence([0.5 + gain] * 20, seed=seed, loss="overtone")
        (block,) = editing_blocks(outcomes)
        difference = row(block, "overtone").differences[BEST_BASELINE]
        assert (block.unit, block.units) == ("sequences", 3)
        assert difference.mean == pytest.approx(0.2)
        assert difference.low < -0.1 < 0.4 < difference.high

    @pytest.mark.parametrize(("seeds", "is_clear"), [(2, False), (3, False), (5, False), (6, True)])
    def test_few_sequences_are_never_called_clear(self, seeds, is_clear):
        outcomes = [
            edit
            for seed in range(seeds)
            for loss, share in (("cross_entropy", 0.2), ("overtone", 0.8 + seed / 100))
            for edit in sequence([share, share], seed=seed, loss=loss)
        ]
        (block,) = editing_blocks(outcomes)
        assert block.is_clear(row(block, "overtone").differences[BEST_BASELINE]) is is_clear

    @pytest.mark.parametrize(
        ("edits", "failed", "is_clear"), [(5, 0, False), (6, 0, True), (9, 3, True), (9, 4, False)]
    )
    def test_few_single_edits_are_never_called_clear(self, edits, failed, is_clear):
        """Those that one of the two losses failed on count for neither."""
        outcomes = [
            *singles([0.2] * edits),
            *singles([None] * failed + [0.8] * (edits - failed), loss="overtone"),
        ]
        (block,) = editing_blocks(outcomes)
        assert block.is_clear(row(block, "overtone").differences[BEST_BASELINE]) is is_clear

    def test_failed_sequences_do_not_help_to_be_clear(self):
        outcomes = [edit for seed in range(7) for edit in sequence([0.2] * 9, seed=seed)]
        for seed in range(7):
            outcomes += sequence([0.8 if seed > 2 else None] * 9, seed=seed, loss="overtone")
        (block,) = editing_blocks(outcomes)
        assert not block.is_clear(row(block, "overtone").differences[BEST_BASELINE])


class TestAblationBlocks:
    def test_compares_to_overtone_and_leaves_the_others_out(self):
        outcomes = [
            *singles([0.5, 0.5], loss="overtone"),
            *singles([0.2, 0.4], loss="overtone:check=false"),
            *singles([0.1, 0.1]),
            *singles([0.9, 0.9], loss="overtone_held"),
        ]
        (block,) = ablation_blocks(outcomes)
        assert [found.loss for found in block.rows] == ["overtone", "overtone:check=false", "cross_entropy"]
        assert row(block, "overtone:check=false").differences[FULL_LOSS].mean == pytest.approx(-0.2)

    def test_none_without_an_ablation(self):
        assert ablation_blocks([*singles([0.5], loss="overtone"), *singles([0.1])]) == []


class TestQuestionBlocks:
    ANSWERS = {  # noqa: RUF012
        "single-hop, greedy": 0.0,
        "single-hop, temperature 0.1": 1.0,
        "single-hop, temperature 0.1, old answer": 0.9,
        "multi-hop, greedy": 0.0,
        "multi-hop, temperature 0.1": 0.25,
    }

    def test_average_is_the_papers(self):
        """Of reliability 1, single-hop 1 and multi-hop 0.25 at the paper's temperature."""
        (block,) = question_blocks([outcome(1.0, data="mquake", answers=self.ANSWERS)])
        assert block.rows[0].measures["average"].mean == pytest.approx(0.75)
        assert block.rows[0].measures["single-hop, temperature 0.1, old answer"].mean == 0.9

    def test_greedy_where_nothing_was_sampled(self):
        answers = {"single-hop, greedy": 0.5, "multi-hop, greedy": 0.0, "multi-hop, greedy, old answer": 1.0}
        (block,) = question_blocks([outcome(1.0, data="mquake", answers=answers)])
        assert block.rows[0].measures["average"].mean == pytest.approx(0.5)

    def test_nothing_without_questions(self):
        assert question_blocks(singles([1.0])) == []


def test_perplexities_keep_their_interval_positive():
    outcomes = [outcome(1.0, index=n, sequence=n, perplexity=p) for n, p in enumerate((1.1, 2.0, 400.0, 1.3))]
    estimate = editing_blocks(outcomes)[0].rows[0].measures["perplexity"]
    assert estimate.mean == pytest.approx(math.prod((1.1, 2.0, 400.0, 1.3)) ** 0.25)
    assert 1.1 <= estimate.low < estimate.mean < estimate.high <= 400.0
