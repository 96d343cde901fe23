"""The paper's numbers: spot checks against the printed tables, and each average against its row."""

from __future__ import annotations

import pytest
from overtone.lab.losses import ABLATIONS, parse_loss
from overtone.lab.paper import LLAMA_2, LLAMA_3, ablation_rows, editing_rows, mquake_rows

from overtone.lab import paper

METHODS = ("ft-m", "lora", "easyedit-ft", "easyedit-lora", "easyedit-melo", "easyedit-wise", "rome", "memit")


def all_editing_rows():
    return [
        (data, row)
        for data in ("zsre", "wikibio")
        for length in (1, 10, 100)
        for method in METHODS
        for loss in ("cross_entropy", "overtone")
        for row in editing_rows(data, method, loss, length)
    ]


class TestEditingRows:
    def test_single_edits_of_zsre_with_lora(self):
        rows = editing_rows("zsre", "lora", "overtone", 1)
        assert [row.source for row in rows] == [
            f"Table 1, {LLAMA_2}, LoRA + Ours, T = 1",
            f"Table 1, {LLAMA_3}, LoRA + Ours, T = 1",
        ]
        assert rows[0].values == {"rel": 100.0, "gen": 94.31, "por": 61.16, "loc": 87.2, "average": 85.67}
        assert rows[1].values == {"rel": 100.0, "gen": 98.5, "por": 51.57, "loc": 93.13, "average": 85.8}

    def test_hundred_edits_of_wikibio_with_ft_m(self):
        rows = editing_rows("wikibio", "easyedit-ft", "cross_entropy", 100)
        assert [row.source[:7] for row in rows] == ["Table 4", "Table 5"]
        assert rows[0].values == {"rel": 93.56, "loc": 67.51, "average": 80.53}

    def test_ten_edits_with_wise_are_of_zsre_alone(self):
        assert [row.values["average"] for row in editing_rows("zsre", "easyedit-wise", "overtone", 10)] == [
            79.48,
            65.16,
        ]
        assert editing_rows("wikibio", "easyedit-wise", "overtone", 10) == []

    def test_rome_has_its_own_loss_whatever_the_spec(self):
        for loss in ("cross_entropy", "overtone"):
            assert [row.values["average"] for row in editing_rows("zsre", "rome", loss, 1)] == [83.3, 87.78]

    @pytest.mark.parametrize(
        ("data", "method", "loss", "length"),
        [
            ("short", "lora", "overtone", 1),
            ("zsre", "lora", "overtone_held", 1),
            ("zsre", "lora", "early_stopping", 1),
            ("zsre", "lora", "overtone", 20),
            ("zsre", "unheard-of", "overtone", 1),
            ("zsre", "unheard-of", "overtone_held", 1),
        ],
    )
    def test_none_where_the_paper_has_no_such_row(self, data, method, loss, length):
        assert editing_rows(data, method, loss, length) == []

    def test_averages_are_the_means_of_their_rows_but_for_two_misprints(self):
        misprinted = {
            (data, row.source): row.mean
            for data, row in all_editing_rows()
            if row.values["average"] != pytest.approx(row.mean, abs=0.0101)
        }
        assert misprinted == {
            ("wikibio", f"Table 4, {LLAMA_2}, MELO, T = 100"): pytest.approx(73.245),
            ("wikibio", f"Table 5, {LLAMA_3}, FT-M + Ours, T = 100"): pytest.approx(90.03),
        }

    def test_every_printed_row_is_found(self):
        """Per model, data and T: two rows for each method with a token loss, and ROME and MEMIT."""
        sources = {(data, row.source) for data, row in all_editing_rows()}
        assert len(sources) == 2 * 3 * ((2 * 4 + 2) + (2 * 3 + 2))


class TestMquakeRows:
    def test_table_2(self):
        assert [row.values for row in mquake_rows("lora", "overtone")] == [
            {"rel": 99.75, "single-hop": 93.0, "multi-hop": 48.0, "average": 80.25},
            {"rel": 100.0, "single-hop": 95.0, "multi-hop": 40.0, "average": 78.33},
        ]
        assert mquake_rows("easyedit-melo", "overtone") == []
        assert mquake_rows("lora", "overtone_held") == []

    def test_averages_are_means(self):
        rows = [row for m in ("ft-m", "lora") for s in ("cross_entropy", "overtone") for row in mquake_rows(m, s)]
        assert len(rows) == 8
        for row in rows:
            assert row.values["average"] == pytest.approx(row.mean, abs=0.0101)


class TestAblationRows:
    def test_table_3(self):
        (row,) = ablation_rows("zsre", "lora", "overtone:check=false", 1)
        assert row.source == f"Table 3, {LLAMA_2}, w/o chk"
        assert row.values == {"rel": 95.35, "gen": 86.51, "por": 57.92, "loc": 90.08, "average": 82.47}

    def test_averages_are_means_and_specs_are_canonical(self):
        for loss in ("cross_entropy", "overtone", *paper._ABLATION_NAMES):
            (row,) = ablation_rows("zsre", "lora", loss, 1)
            assert row.values["average"] == pytest.approx(row.mean, abs=0.0101)
            assert parse_loss(loss).name == loss
        assert set(paper._ABLATION_NAMES) <= set(ABLATIONS)

    def test_none_for_another_setting(self):
        assert ablation_rows("short", "lora", "overtone", 1) == []
        assert ablation_rows("zsre", "ft-m", "overtone", 1) == []
        assert ablation_rows("zsre", "lora", "overtone", 10) == []
        assert ablation_rows("zsre", "lora", "overtone:lam=1", 1) == []
