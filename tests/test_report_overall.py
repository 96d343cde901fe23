"""Table 4: one setting over several data and lengths."""

import pytest
from bench_lines import sequence, singles
from overtone.lab.bench_overall import EVERY_THRESHOLD, ONE_THRESHOLD, overall
from overtone.lab.comparison import mean_paired_difference, paired_difference

VALUES, ZEROS = {number: 0.1 * number % 0.7 for number in range(12)}, dict.fromkeys(range(12), 0.0)
LOW, HIGH = "early_stopping:stop_below=0.01", "early_stopping:stop_below=0.3"


def grid(shares, *, edits=6):
    """Single edits on two data: shares by loss, one for each data."""
    return [
        edit
        for loss, by_data in shares.items()
        for data, share in zip(("short", "long"), by_data, strict=True)
        for edit in singles([share] * edits, loss=loss, data=data)
    ]


def row(table, loss):
    return next(row for row in table.rows if row.loss == loss)


class TestOverall:
    def test_one_threshold_and_the_best_of_each_column(self):
        (table,) = overall(grid({LOW: (0.9, 0.4), HIGH: (0.5, 0.6), "overtone": (0.8, 0.7)}))
        assert (table.method, table.scope, table.units) == ("lora", "single edits", 6)
        assert table.one_threshold == LOW
        assert dict(zip(table.cells, table.thresholds, strict=True)) == {("short", 1): LOW, ("long", 1): HIGH}
        overtone = row(table, "overtone")
        assert overtone.average == pytest.approx(0.75)
        assert overtone.differences[ONE_THRESHOLD].mean == pytest.approx(0.75 - 0.65)
        assert overtone.differences[EVERY_THRESHOLD].mean == pytest.approx(0.0)
        assert table.is_clear(overtone.differences[ONE_THRESHOLD])
        assert not table.is_clear(overtone.differences[EVERY_THRESHOLD])
        assert ONE_THRESHOLD not in row(table, LOW).differences
        assert row(table, LOW).differences[EVERY_THRESHOLD].mean == pytest.approx(-0.1)

    @pytest.mark.parametrize(("singly", "units", "is_clear"), [(18, 6, True), (6, 2, False)])
    def test_groups_are_as_long_as_the_longest_sequence(self, singly, units, is_clear):
        """Six rows of three, and single edits of all of the same facts or of those of two rows alone."""
        outcomes = []
        for loss, share in ((LOW, 0.1), ("overtone", 0.9)):
            outcomes += singles([share] * singly, loss=loss)
            for number in range(6):
                outcomes += sequence([share] * 3, number=number, loss=loss)
        (table,) = overall(outcomes)
        assert table.units == units
        assert table.is_clear(row(table, "overtone").differences[ONE_THRESHOLD]) == is_clear

    def test_columns_of_few_sequences_and_losses_of_some_columns_are_left_out(self):
        outcomes = grid({LOW: (0.5, 0.5), "overtone": (0.6, 0.6)})
        outcomes += singles([0.7] * 6, loss="overtone_held")
        outcomes += [edit for loss in (LOW, "overtone") for edit in sequence([0.9] * 10, loss=loss)]
        (table,) = overall(outcomes)
        assert set(table.cells) == {("short", 1), ("long", 1)}
        assert {row.loss for row in table.rows} == {LOW, "overtone"}

    def test_none_without_a_threshold_or_with_one_column(self):
        assert overall(grid({"cross_entropy": (0.5, 0.5), "overtone": (0.6, 0.6)})) == []
        assert overall(singles([0.5] * 6, loss=LOW)) == []

    def test_averages_and_differences_are_of_the_same_edits(self):
        """Those that every loss has in every column."""
        outcomes = grid({LOW: (0.5, 0.5), "overtone": (0.6, 0.6)})
        outcomes += [edit for edit in singles([0.0] * 9, loss="overtone") if edit.index > 5]
        outcomes += [edit for edit in singles([0.9] * 9, loss=LOW) if edit.index > 5]
        (table,) = overall(outcomes)
        assert table.units == 6
        assert row(table, "overtone").average == pytest.approx(0.6)
        assert row(table, "overtone").differences[ONE_THRESHOLD].mean == pytest.approx(0.1)

    def test_units_that_a_loss_failed_in_do_not_count(self):
        outcomes = grid({LOW: (0.5, 0.5)})
        for data in ("short", "long"):
            outcomes += singles([0.9, 0.9, None, None, None, None], loss="overtone", data=data)
        (table,) = overall(outcomes)
        assert table.units == 2
        assert not table.is_clear(row(table, "overtone").differences[ONE_THRESHOLD])


class TestDifference:
    def test_of_one_cell_is_the_paired_difference(self):
        units = {number: number // 2 for number in range(12)}
        expected = paired_difference(VALUES, ZEROS, units)
        assert mean_paired_difference([(VALUES, ZEROS)], units.__getitem__) == expected

    def test_the_same_edits_again_say_nothing_more(self):
        """As wide for two cells on the same edits as for one."""
        cell = (VALUES, ZEROS)
        once = mean_paired_difference([cell], lambda number: number)
        twice = mean_paired_difference([cell, cell], lambda number: number)
        assert (twice.low, twice.high) == pytest.approx((once.low, once.high))

    def test_no_unit_in_every_cell(self):
        assert mean_paired_difference([({1: 0.5}, {1: 0.0}), ({2: 0.5}, {2: 0.0})], lambda number: number) is None
