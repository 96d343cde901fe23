"""The numbers of Tables 1 to 3, against cases small enough to count by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from result_records import record, results_of, scores, sequence, singles

from overtone.lab.report import tables
from overtone.lab.report.blocks import editing_blocks
from overtone.lab.report.tables import ANCHORED, BEST_BASELINE, BEST_STOP, FULL_LOSS, resampled_units

TO_BASELINE, TO_STOP = f"difference to {BEST_BASELINE}", f"difference to {BEST_STOP}"
STOP, LATE_STOP = "cross_entropy:hold=0.1", "cross_entropy:hold=0.3"


def editing_table(records):
    return tables.editing_table(results_of(records).edits)


def row(table, loss):
    (found,) = table[(table["loss"] == loss) & (table["source"] == "this run")].to_dict("records")
    return found


class TestEditingTable:
    def test_means_of_each_measure(self):
        table = editing_table(
            [
                record(index=0, sequence=0, scores=scores(1.0, rel=0.5, loc=0.0), steps=10, seconds=1, perplexity=2),
                record(index=1, sequence=1, scores=scores(1.0, rel=1.0, loc=0.5), steps=30, seconds=2, perplexity=8),
            ]
        )
        found = row(table, "cross_entropy")
        assert (found["rel"], found["loc"], found["steps"], found["seconds"]) == (0.75, 0.25, 20.0, 1.5)
        assert found["average"] == pytest.approx((2.5 / 4 + 3.5 / 4) / 2)
        assert found["perplexity"] == pytest.approx(4.0), "the geometric mean of 2 and 8"
        assert found["kl"] == pytest.approx(0.2)
        assert found["lr"] == 0.005

    def test_what_edited_models_said_is_a_column_where_they_were_let_speak(self):
        said = [replace(scores(1.0), said={"rel": 1.0, "gen": share}) for share in (0.0, 1.0)]
        table = editing_table([record(index=n, sequence=n, scores=own) for n, own in enumerate(said)])
        found = row(table, "cross_entropy")
        assert (found["rel said"], found["gen said"]) == (1.0, 0.5)
        assert "por said" not in table
        (block,) = editing_blocks(table)
        assert "Gen said" in block.head
        (silent,) = editing_blocks(editing_table([record()]))
        assert "Gen said" not in silent.head

    def test_a_measure_without_probes_is_left_out(self):
        values = scores(1.0)
        del values.accuracy["gen"], values.accuracy["por"]
        table = editing_table([record(scores=values)])
        assert {"rel", "loc", "average"} <= set(table.columns)
        assert not {"gen", "por"} & set(table.columns)

    def test_perplexities_keep_their_interval_positive(self):
        values = (1.1, 2.0, 400.0, 1.3)
        table = editing_table([record(1.0, index=n, sequence=n, perplexity=p) for n, p in enumerate(values)])
        found = row(table, "cross_entropy")
        assert found["perplexity"] == pytest.approx(math.prod(values) ** 0.25)
        assert 1.1 <= found["perplexity low"] < found["perplexity"] < found["perplexity high"] <= 400.0001

    def test_differences_to_the_best_baseline_and_to_the_best_early_stop(self):
        """The default threshold is a baseline; the best threshold is a rival of its own."""
        table = editing_table(
            [
                *singles([0.1, 0.1], loss="cross_entropy"),
                *singles([0.4, 0.6], loss=STOP),
                *singles([0.7, 0.7], loss=LATE_STOP),
                *singles([0.3, 0.3], loss="label_smoothing"),
                *singles([0.9, 0.8], loss="overtone"),
            ]
        )
        ours = row(table, "overtone")
        assert (ours[BEST_BASELINE], ours[BEST_STOP]) == (STOP, LATE_STOP)
        assert (ours[TO_BASELINE], ours[TO_STOP]) == pytest.approx((0.35, 0.15))
        assert row(table, "cross_entropy")[TO_BASELINE] == pytest.approx(-0.4)
        assert math.isnan(row(table, STOP)[TO_BASELINE]), "the reference is not compared to itself"
        assert row(table, STOP)[TO_STOP] == pytest.approx(-0.2)

    def test_an_anchored_cross_entropy_is_a_rival_of_its_own(self):
        """What the loss adds is the difference to it; it is no threshold of early stopping."""
        table = editing_table(
            [
                *singles([0.7, 0.7], loss=STOP),
                *singles([0.5, 0.5], loss="cross_entropy:anchor=1"),
                *singles([0.6, 0.6], loss="cross_entropy:hold=0.1+anchor=1"),
                *singles([0.9, 0.8], loss="overtone:anchor=1"),
            ]
        )
        ours = row(table, "overtone:anchor=1")
        assert (ours[BEST_STOP], ours[ANCHORED]) == (STOP, "cross_entropy:hold=0.1+anchor=1")
        assert ours[f"difference to {ANCHORED}"] == pytest.approx(0.25)

    def test_edits_are_paired_whatever_their_order(self):
        table = editing_table([*singles([0.0, 0.5, 1.0]), *reversed(singles([0.1, 0.6, 1.1], loss="overtone"))])
        found = row(table, "overtone")
        assert [found[f"{TO_BASELINE}{end}"] for end in ("", " low", " high")] == pytest.approx([0.1] * 3)

    def test_the_same_index_of_another_seed_is_another_edit(self):
        table = editing_table(
            [
                *singles([0.0], seed=0),
                *singles([1.0], seed=1),
                *singles([0.5], seed=0, loss="overtone"),
                *singles([1.0], seed=1, loss="overtone"),
            ]
        )
        found = row(table, "overtone")
        assert found[TO_BASELINE] == pytest.approx(0.25)
        assert (found["seeds"], found["units"]) == (2, 2)

    def test_failed_edits_count_nowhere_but_are_counted(self):
        found = row(editing_table([*singles([0.2, 0.4]), *singles([None, 1.0], loss="overtone")]), "overtone")
        assert (found["edits"], found["failed"], found["average"]) == (1, 1, 1.0)
        assert found[TO_BASELINE] == pytest.approx(0.6), "paired with the same edit, not with both"

    def test_a_loss_that_only_failed(self):
        """It has no mean and no difference; as a baseline it is no rival."""
        table = editing_table([*singles([None, None]), *singles([0.5, 0.5], loss="overtone")])
        found = row(table, "cross_entropy")
        assert (found["edits"], found["failed"]) == (0, 2)
        assert math.isnan(found["average"])
        assert BEST_BASELINE not in table

    def test_blocks_are_told_apart_by_data_length_method_and_settings(self):
        """And stand in the order of the run's data, of T, and of the run's methods."""
        slow = {"settings": {"lr": 0.001, "steps": 50}}
        table = editing_table(
            [
                *sequence([1.0, 1.0], data="zsre"),
                *singles([1.0], data="zsre", method="ft-m"),
                *singles([1.0], data="short"),
                *singles([0.5], data="short", **slow),
                *singles([1.0], data="zsre"),
            ]
        )
        assert table.loc[
            table["source"] == "this run", ["data", "length", "method", "lr", "average"]
        ].values.tolist() == [
            ["zsre", 1, "lora", 0.005, 1.0],
            ["zsre", 1, "ft-m", 0.005, 1.0],
            ["zsre", 2, "lora", 0.005, 1.0],
            ["short", 1, "lora", 0.001, 0.5],
            ["short", 1, "lora", 0.005, 1.0],
        ]


class TestUnits:
    def units(self, records):
        unit, units = resampled_units(results_of(records).edits)
        return unit, units.nunique()

    def test_single_edits_are_their_own_units(self):
        assert self.units([*singles([1.0, 1.0], seed=0), *singles([1.0], seed=1)]) == ("edits", 3)

    def test_three_sequences_are_resampled_whole(self):
        assert self.units([edit for n in range(3) for edit in sequence([1.0, 0.0], number=n)]) == ("sequences", 3)

    def test_two_sequences_are_too_few(self):
        assert self.units([edit for seed in range(2) for edit in sequence([1.0, 0.0], seed=seed)]) == ("edits", 4)

    def test_sequences_that_agree_inside_but_not_among_each_other(self):
        """Over edits the difference would be clear; over its three sequences, of which one is worse, it is not."""
        records = []
        for seed, gain in enumerate((0.4, 0.3, -0.1)):
            records += sequence([0.5] * 20, seed=seed)
            records += sequence([0.5 + gain] * 20, seed=seed, loss="overtone")
        found = row(editing_table(records), "overtone")
        assert (found["resampled"], found["units"]) == ("sequences", 3)
        assert found[TO_BASELINE] == pytest.approx(0.2)
        assert found[f"{TO_BASELINE} low"] < -0.1 < 0.4 < found[f"{TO_BASELINE} high"]

    @pytest.mark.parametrize(("seeds", "is_clear"), [(2, False), (5, False), (6, True)])
    def test_few_sequences_are_never_called_clear(self, seeds, is_clear):
        table = editing_table(
            [
                edit
                for seed in range(seeds)
                for loss, share in (("cross_entropy", 0.2), ("overtone", 0.8 + seed / 100))
                for edit in sequence([share, share], seed=seed, loss=loss)
            ]
        )
        assert row(table, "overtone")[f"{TO_BASELINE} clear"] is is_clear

    @pytest.mark.parametrize(
        ("edits", "failed", "is_clear"), [(5, 0, False), (6, 0, True), (9, 3, True), (9, 4, False)]
    )
    def test_few_single_edits_are_never_called_clear(self, edits, failed, is_clear):
        """Those that one of the two losses failed on count for neither."""
        ours = singles([None] * failed + [0.8] * (edits - failed), loss="overtone")
        table = editing_table([*singles([0.2] * edits), *ours])
        assert row(table, "overtone")[f"{TO_BASELINE} clear"] is is_clear

    def test_failed_sequences_do_not_help_to_be_clear(self):
        records = [edit for seed in range(7) for edit in sequence([0.2] * 9, seed=seed)]
        for seed in range(7):
            records += sequence([0.8 if seed > 2 else None] * 9, seed=seed, loss="overtone")
        assert row(editing_table(records), "overtone")[f"{TO_BASELINE} clear"] is False


class TestAblationTable:
    def test_compares_to_overtone_and_leaves_the_others_out(self):
        table = tables.ablation_table(
            results_of(
                [
                    *singles([0.5, 0.5], loss="overtone"),
                    *singles([0.2, 0.4], loss="overtone:check=false"),
                    *singles([0.1, 0.1]),
                    *singles([0.9, 0.9], loss="overtone:hold=settled"),
                ]
            ).edits
        )
        assert table["loss"].tolist() == ["overtone", "overtone:check=false", "cross_entropy"]
        assert row(table, "overtone:check=false")[f"difference to {FULL_LOSS}"] == pytest.approx(-0.2)

    def test_none_without_an_ablation(self):
        for records in ([*singles([0.5], loss="overtone"), *singles([0.1])], singles([0.5], loss="label_smoothing")):
            assert tables.ablation_table(results_of(records).edits).empty


class TestQuestionTable:
    ANSWERS = {  # noqa: RUF012
        "single-hop, greedy": 0.0,
        "single-hop, temperature 0.1": 1.0,
        "single-hop, temperature 0.1, old answer": 0.9,
        "multi-hop, greedy": 0.0,
        "multi-hop, temperature 0.1": 0.25,
    }

    def table(self, records):
        results = results_of(records)
        return tables.question_table(results.edits, results.questions)

    def test_average_is_the_papers(self):
        """Of reliability 1, single-hop 1 and multi-hop 0.25 at the paper's temperature."""
        found = row(self.table([record(1.0, data="mquake", answers=self.ANSWERS)]), "cross_entropy")
        assert found["average"] == pytest.approx(0.75)
        assert found["single-hop, temperature 0.1, old answer"] == 0.9

    def test_greedy_where_nothing_was_sampled(self):
        answers = {"single-hop, greedy": 0.5, "multi-hop, greedy": 0.0, "multi-hop, greedy, old answer": 1.0}
        found = row(self.table([record(1.0, data="mquake", answers=answers)]), "cross_entropy")
        assert found["average"] == pytest.approx(0.5)

    def test_nothing_without_questions(self):
        assert self.table(singles([1.0])).empty
