"""The paper's numbers: spot checks against the printed tables, and each average against its row."""

from __future__ import annotations

from statistics import fmean

import pytest

from overtone.lab.edit.compared import ABLATIONS
from overtone.lab.report.paper import ABLATION_ROWS, ablation_rows, editing_rows, question_rows
from overtone.token_loss import parse

LLAMA_2, LLAMA_3 = "LLaMA 2 7B chat", "LLaMA 3 8B instruct"
METHODS = ("ft-m", "lora", "easyedit-ft", "easyedit-lora", "easyedit-melo", "easyedit-wise", "rome", "memit")


def numbers(row):
    return {name: value for name, value in row.items() if name != "source"}


def mean(row):
    """Of the columns other than the average."""
    return fmean(value for name, value in numbers(row).items() if name != "average")


def all_editing_rows():
    return [
        (data, row)
        for data in ("zsre", "wikibio")
        for length in (1, 10, 100)
        for method in METHODS
        for loss in ("cross_entropy", "overtone")
        for row in editing_rows(data, length, method, loss)
    ]


class TestEditingRows:
    def test_single_edits_of_zsre_with_lora(self):
        rows = editing_rows("zsre", 1, "lora", "overtone")
        assert [row["source"] for row in rows] == [
            f"Table 1, {LLAMA_2}, LoRA + Ours, T = 1",
            f"Table 1, {LLAMA_3}, LoRA + Ours, T = 1",
        ]
        assert numbers(rows[0]) == {"rel": 100.0, "gen": 94.31, "por": 61.16, "loc": 87.2, "average": 85.67}
        assert numbers(rows[1]) == {"rel": 100.0, "gen": 98.5, "por": 51.57, "loc": 93.13, "average": 85.8}

    def test_hundred_edits_of_wikibio_with_ft_m(self):
        rows = editing_rows("wikibio", 100, "easyedit-ft", "cross_entropy")
        assert [row["source"][:7] for row in rows] == ["Table 4", "Table 5"]
        assert numbers(rows[0]) == {"rel": 93.56, "loc": 67.51, "average": 80.53}

    def test_ten_edits_with_wise_are_of_zsre_alone(self):
        assert [row["average"] for row in editing_rows("zsre", 10, "easyedit-wise", "overtone")] == [
            79.48,
            65.16,
        ]
        assert editing_rows("wikibio", 10, "easyedit-wise", "overtone") == []

    def test_rome_has_its_own_loss_whatever_the_spec(self):
        for loss in ("cross_entropy", "overtone"):
            assert [row["average"] for row in editing_rows("zsre", 1, "rome", loss)] == [83.3, 87.78]

    @pytest.mark.parametrize(
        ("data", "method", "loss", "length"),
        [
            ("short", "lora", "overtone", 1),
            ("zsre", "lora", "overtone:hold=settled", 1),
            ("zsre", "lora", "cross_entropy:hold=0.1", 1),
            ("zsre", "lora", "overtone", 20),
            ("zsre", "unheard-of", "overtone", 1),
            ("zsre", "unheard-of", "overtone:hold=settled", 1),
        ],
    )
    def test_none_where_the_paper_has_no_such_row(self, data, method, loss, length):
        assert editing_rows(data, length, method, loss) == []

    def test_averages_are_the_means_of_their_rows_but_for_two_misprints(self):
        misprinted = {
            (data, row["source"]): mean(row)
            for data, row in all_editing_rows()
            if row["average"] != pytest.approx(mean(row), abs=0.0101)
        }
        assert misprinted == {
            ("wikibio", f"Table 4, {LLAMA_2}, MELO, T = 100"): pytest.approx(73.245),
            ("wikibio", f"Table 5, {LLAMA_3}, FT-M + Ours, T = 100"): pytest.approx(90.03),
        }

    def test_every_printed_row_is_found(self):
        """Per model, data and T: two rows for each method with a token loss, and ROME and MEMIT."""
        sources = {(data, row["source"]) for data, row in all_editing_rows()}
        assert len(sources) == 2 * 3 * ((2 * 4 + 2) + (2 * 3 + 2))


class TestMquakeRows:
    def test_table_2(self):
        assert [numbers(row) for row in question_rows("mquake", 1, "lora", "overtone")] == [
            {"rel": 99.75, "single-hop": 93.0, "multi-hop": 48.0, "average": 80.25},
            {"rel": 100.0, "single-hop": 95.0, "multi-hop": 40.0, "average": 78.33},
        ]
        assert question_rows("mquake", 1, "easyedit-melo", "overtone") == []
        assert question_rows("mquake", 1, "lora", "overtone:hold=settled") == []

    def test_averages_are_means(self):
        rows = [
            row
            for m in ("ft-m", "lora")
            for s in ("cross_entropy", "overtone")
            for row in question_rows("mquake", 1, m, s)
        ]
        assert len(rows) == 8
        for row in rows:
            assert row["average"] == pytest.approx(mean(row), abs=0.0101)


class TestAblationRows:
    def test_table_3(self):
        (row,) = ablation_rows("zsre", 1, "lora", "overtone:check=false")
        assert row["source"] == f"Table 3, {LLAMA_2}, w/o chk"
        assert numbers(row) == {"rel": 95.35, "gen": 86.51, "por": 57.92, "loc": 90.08, "average": 82.47}

    def test_averages_are_means_and_specs_are_canonical(self):
        for loss in ABLATION_ROWS:
            (row,) = ablation_rows("zsre", 1, "lora", loss)
            assert row["average"] == pytest.approx(mean(row), abs=0.0101)
            assert parse(loss).name == loss
        assert set(ABLATION_ROWS) - {"cross_entropy", "overtone"} <= set(ABLATIONS)

    def test_none_for_another_setting(self):
        assert ablation_rows("short", 1, "lora", "overtone") == []
        assert ablation_rows("zsre", 1, "ft-m", "overtone") == []
        assert ablation_rows("zsre", 10, "lora", "overtone") == []
        assert ablation_rows("zsre", 1, "lora", "overtone:lam=1") == []
