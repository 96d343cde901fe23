"""Table 4: one setting over several data and lengths."""

from __future__ import annotations

import math

import pytest
from result_records import results_of, sequence, singles

from overtone.lab.report.overall import EVERY_THRESHOLD, ONE_THRESHOLD, overall_table

TO_ONE, TO_EVERY = f"difference to {ONE_THRESHOLD}", f"difference to {EVERY_THRESHOLD}"
LOW, HIGH = "cross_entropy:hold=0.01", "cross_entropy:hold=0.3"


def grid(shares, *, edits=6):
    """Single edits on two data: shares by loss, one for each data."""
    return [
        edit
        for loss, by_data in shares.items()
        for data, share in zip(("short", "long"), by_data, strict=True)
        for edit in singles([share] * edits, loss=loss, data=data)
    ]


def overall(records):
    return overall_table(results_of(records).edits)


def row(table, loss):
    (found,) = table[table["loss"] == loss].to_dict("records")
    return found


class TestOverall:
    def test_one_threshold_and_the_best_of_each_column(self):
        table = overall(grid({LOW: (0.9, 0.4), HIGH: (0.5, 0.6), "overtone": (0.8, 0.7)}))
        overtone = row(table, "overtone")
        assert (overtone["method"], overtone["scope"], overtone["units"]) == ("lora", "single edits", 6)
        assert overtone[ONE_THRESHOLD] == LOW
        assert (overtone["columns"], overtone[EVERY_THRESHOLD]) == ("short T=1; long T=1", f"{LOW}; {HIGH}")
        assert overtone["average"] == pytest.approx(0.75)
        assert overtone[TO_ONE] == pytest.approx(0.75 - 0.65)
        assert overtone[TO_EVERY] == pytest.approx(0.0)
        assert (overtone[f"{TO_ONE} clear"], overtone[f"{TO_EVERY} clear"]) == (True, False)
        assert math.isnan(row(table, LOW)[TO_ONE])
        assert row(table, LOW)[TO_EVERY] == pytest.approx(-0.1)

    @pytest.mark.parametrize(("singly", "units", "is_clear"), [(18, 6, True), (6, 2, False)])
    def test_groups_are_as_long_as_the_longest_sequence(self, singly, units, is_clear):
        """Six rows of three, and single edits of all of the same facts or of those of two rows alone."""
        records = []
        for loss, share in ((LOW, 0.1), ("overtone", 0.9)):
            records += singles([share] * singly, loss=loss)
            for number in range(6):
                records += sequence([share] * 3, number=number, loss=loss)
        table = overall(records)
        found = row(table, "overtone")
        assert (found["units"], found[f"{TO_ONE} clear"]) == (units, is_clear)

    def test_columns_of_few_sequences_and_losses_of_some_columns_are_left_out(self):
        records = grid({LOW: (0.5, 0.5), "overtone": (0.6, 0.6)})
        records += singles([0.7] * 6, loss="overtone:hold=settled")
        records += [edit for loss in (LOW, "overtone") for edit in sequence([0.9] * 10, loss=loss)]
        table = overall(records)
        assert set(table["columns"]) == {"short T=1; long T=1"}
        assert table["loss"].tolist() == [LOW, "overtone"]

    def test_none_without_a_threshold_or_with_one_column(self):
        assert overall(grid({"cross_entropy": (0.5, 0.5), "overtone": (0.6, 0.6)})).empty
        assert overall(singles([0.5] * 6, loss=LOW)).empty

    def test_averages_and_differences_are_of_the_same_edits(self):
        """Those that every loss has in every column."""
        records = grid({LOW: (0.5, 0.5), "overtone": (0.6, 0.6)})
        records += [edit for edit in singles([0.0] * 9, loss="overtone") if edit.index > 5]
        records += [edit for edit in singles([0.9] * 9, loss=LOW) if edit.index > 5]
        table = overall(records)
        found = row(table, "overtone")
        assert (found["units"], found["average"], found[TO_ONE]) == pytest.approx((6, 0.6, 0.1))

    def test_units_that_a_loss_failed_in_do_not_count(self):
        records = grid({LOW: (0.5, 0.5)})
        for data in ("short", "long"):
            records += singles([0.9, 0.9, None, None, None, None], loss="overtone", data=data)
        table = overall(records)
        found = row(table, "overtone")
        assert (found["units"], found[f"{TO_ONE} clear"]) == (2, False)
