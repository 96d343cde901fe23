"""The figures: which losses each shows, what its lines are made of, and that the same results give the same bytes."""

from __future__ import annotations

import pytest
from matplotlib.image import imread
from result_records import TRACE, results_of, sequence, singles

from overtone.lab.edit.compared import ABLATIONS, COMPARED, THRESHOLDS
from overtone.lab.report.drawing import COLOURS, save_figure, styles_of
from overtone.lab.report.figures import draw_figures, loss_groups
from overtone.lab.report.forgetting import forgetting_table
from overtone.lab.report.overfitting import overfitting_figure
from overtone.lab.report.tables import editing_table
from overtone.lab.score.traces import EditTrace

PRESET = list(dict.fromkeys([*COMPARED, *THRESHOLDS, *ABLATIONS]))


class TestLossGroups:
    @pytest.mark.parametrize("sweep", [0, 3, 20])
    def test_every_loss_is_drawn_and_no_figure_is_crowded(self, sweep):
        losses = [*PRESET, *(f"overtone:lam={number / 100}" for number in range(2, 2 + sweep))]
        losses += [f"cross_entropy:hold={number / 100}" for number in range(60, 60 + sweep)]
        groups = loss_groups(losses)
        assert {loss for group in groups.values() for loss in group} == set(losses)
        assert max(map(len, groups.values())) <= len(COLOURS)
        assert next(iter(groups)) == ""

    def test_a_single_threshold_and_no_ablation_need_no_figures_of_their_own(self):
        assert loss_groups(list(COMPARED)) == {"": list(COMPARED)}


class TestStyles:
    def test_the_losses_of_a_figure_differ_in_colour(self):
        for group in loss_groups(PRESET).values():
            assert len({style["color"] for style in styles_of(group).values()}) == len(group)

    def test_a_loss_with_a_name_looks_the_same_whatever_else_is_drawn(self):
        alone = styles_of(["overtone"])["overtone"]
        assert styles_of(["overtone:lam=0.7", "cross_entropy", "overtone"])["overtone"] == alone

    def test_a_loss_of_another_version_is_called_by_its_spec(self):
        assert styles_of(["tomorrow:x=1"])["tomorrow:x=1"]["label"] == "tomorrow:x=1"


class TestForgetting:
    def table(self, records):
        return forgetting_table(results_of(records).edits)

    def test_by_age_over_the_longest_sequences(self):
        """Of 20 edits in a row two fall into each bin; the last ones have the age of 0 and 1."""
        shares = [0.0] * 18 + [0.5, 1.0]
        table = self.table([*sequence(shares), *sequence([0.0] * 4), *singles([0.0])])
        assert len(table) == 10
        columns = ["length", "youngest", "oldest", "rel", "edits"]
        assert table[columns].iloc[0].tolist() == [20, 0, 1, 0.75, 2]
        assert table[columns].iloc[-1].tolist() == [20, 18, 19, 0.0, 2]

    def test_short_sequences_have_a_bin_per_age(self):
        table = self.table(sequence([0.1, 0.2, 0.3]))
        assert table[["youngest", "oldest"]].values.tolist() == [[0, 0], [1, 1], [2, 2]]
        assert table["rel"].tolist() == pytest.approx([0.3, 0.2, 0.1])

    def test_edits_of_passes_over_a_sequence_have_no_age(self):
        depth, breadth = {"lr": 0.005, "steps": 50}, {"lr": 0.005, "steps": 50, "breadth_first": 3}
        table = self.table([*sequence([0.1, 0.2, 0.3], settings=depth), *sequence([1.0, 1.0, 1.0], settings=breadth)])
        assert table["rel"].tolist() == pytest.approx([0.3, 0.2, 0.1])
        assert self.table(sequence([1.0, 1.0], settings=breadth)).empty

    def test_single_edits_and_failed_ones_are_not_forgotten(self):
        assert self.table(singles([1.0, 0.5])).empty
        assert self.table(sequence([None, None])).empty


class TestDrawFigures:
    def drawn(self, records, folder):
        edits = results_of(records).edits
        figures = draw_figures(edits, editing_table(edits), forgetting_table(edits), folder)
        return [path.name for paths in figures.values() for path in paths]

    def test_draws_nothing_from_single_edits_without_a_trace(self, tmp_path):
        assert self.drawn(singles([1.0, 0.5]), tmp_path) == []
        assert list(tmp_path.iterdir()) == []

    def test_a_loss_of_another_version_and_data_of_another_name(self, tmp_path):
        records = [
            edit
            for seed in range(3)
            for loss in ("cross_entropy", "tomorrow:x=1")
            for shares in ([0.5], [0.5, 0.2])
            for edit in sequence(shares, seed=seed, data="news", method="new", loss=loss)
        ]
        assert self.drawn(records, tmp_path) == ["lengths-new.png", "forgetting-new.png"]


class TestOverfitting:
    """Figures 1 and 2."""

    def lines(self, traces):
        (generality, portability), (initial, underfitting) = (
            row for row in zip(*[iter(overfitting_figure({"overtone": traces}, title="").axes)] * 2, strict=True)
        )
        return generality, portability, initial, underfitting

    def test_a_curve_that_ends_early_keeps_its_last_value(self):
        """At step 4: 1 and the 3 that the shorter curve ended with."""
        long = EditTrace([0, 2, 4], [5.0, 3.0, 1.0], [], [1.0], [0.0])
        short = EditTrace([0, 1], [7.0, 3.0], [], [1.0], [0.0])
        generality, portability, *_ = self.lines([long, short])
        steps, means = generality.lines[0].get_data()
        assert list(steps) == [0, 1, 2, 4]
        assert list(means) == pytest.approx([6.0, (4.0 + 3.0) / 2, 3.0, 2.0])
        assert [text.get_text() for text in portability.texts] == ["no such probes"]

    def test_positions_that_half_of_the_edits_reach(self):
        traces = [EditTrace([0], [1.0], [1.0], [0.5], values) for values in ([1.0, 2.0], [3.0, 6.0, 9.0], [5.0, 1.0])]
        *_, underfitting = self.lines(traces)
        assert list(underfitting.lines[0].get_ydata()) == [3.0, 3.0]

    def test_same_traces_same_bytes(self, tmp_path):
        for name in ("a", "b"):
            figure = overfitting_figure({loss: [TRACE] for loss in COMPARED}, title="LoRA")
            save_figure(figure, tmp_path / f"{name}.png")
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
        image = imread(tmp_path / "a.png")
        assert image.shape[1] == 1050
        assert image.std() > 0.05
