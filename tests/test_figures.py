"""The figure: it is drawn from traces, whatever their lengths, and says what is missing."""

from __future__ import annotations

import pytest
from matplotlib.image import imread
from test_experiment import TRACE, record

from overtone.lab import figures
from overtone.lab.figures import draw_overfitting, loss_styles
from overtone.lab.losses import ABLATIONS, LOSSES
from overtone.lab.traces import EditTrace


class TestDrawOverfitting:
    @pytest.mark.parametrize("suffix", ["png", "svg"])
    def test_writes_an_image(self, tmp_path, suffix):
        path = tmp_path / f"figure.{suffix}"
        draw_overfitting([record(loss=loss, trace=TRACE) for loss in LOSSES], path, title="LoRA")
        if suffix == "png":
            image = imread(path)
            assert image.shape[1] == 1050
            assert image.std() > 0.05

    @pytest.mark.parametrize("suffix", ["png", "svg"])
    def test_same_records_same_bytes(self, tmp_path, suffix):
        records = [record(loss=loss, trace=TRACE) for loss in LOSSES]
        for name in ("a", "b"):
            draw_overfitting(records, tmp_path / f"{name}.{suffix}", title="LoRA")
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()

    def test_passes_over_records_without_a_trace(self, tmp_path):
        draw_overfitting([record(), record(trace=TRACE)], tmp_path / "figure.png", title="LoRA")

    def test_draws_edits_without_generality_and_portability_probes(self, tmp_path):
        trace = EditTrace([0, 1], [], [], [0.5], [0.1])
        draw_overfitting([record(trace=trace)], tmp_path / "figure.png", title="LoRA")
        draw_overfitting([record(trace=TRACE), record(trace=trace)], tmp_path / "figure.png", title="LoRA")

    def test_refuses_to_draw_nothing(self, tmp_path):
        with pytest.raises(ValueError, match="no record has a trace"):
            draw_overfitting([record()], tmp_path / "figure.png", title="LoRA")
        assert list(tmp_path.iterdir()) == []


class TestLossStyles:
    @staticmethod
    def _looks(styles):
        return {(style["color"], style["linestyle"]) for style in styles.values()}

    def test_a_known_loss_looks_the_same_whatever_else_is_drawn(self):
        alone = loss_styles(["overtone_held"])["overtone_held"]
        assert loss_styles(["overtone:lam=0.7", "cross_entropy", "overtone_held"])["overtone_held"] == alone

    def test_no_two_of_many_look_alike(self):
        losses = [*LOSSES, *ABLATIONS, *(f"overtone:lam=0.{digit}" for digit in range(2, 10))]
        assert len(self._looks(loss_styles(losses))) == len(losses)

    def test_all_main_losses_and_two_more_have_colours_of_their_own(self):
        losses = [*LOSSES, *(f"overtone:lam=0.{digit}" for digit in (2, 3))]
        assert len({style["color"] for style in loss_styles(losses).values()}) == len(losses)

    def test_a_loss_of_another_version_is_called_by_its_spec(self):
        assert loss_styles(["tomorrow:x=1"])["tomorrow:x=1"]["label"] == "tomorrow:x=1"


class TestMeans:
    def test_a_curve_that_ends_early_keeps_its_last_value(self):
        """At step 4: 1 and the 3 that the shorter curve ended with."""
        steps, means = figures._mean_curve([([0, 2, 4], [5.0, 3.0, 1.0]), ([0, 1], [7.0, 3.0])], last_step=6)
        assert steps == [0, 1, 2, 4, 6]
        assert means == pytest.approx([6.0, (4.0 + 3.0) / 2, 3.0, 2.0, 2.0])

    def test_positions_that_half_of_the_rows_reach(self):
        assert figures._mean_per_position([[1.0, 2.0], [3.0], [5.0]]) == [3.0]
        assert figures._mean_per_position([[1.0, 2.0], [3.0, 6.0, 9.0], [5.0, 1.0]]) == [3.0, 3.0]
        assert figures._mean_per_position([[1.0, 2.0]]) == [1.0, 2.0]

    def test_a_trace_of_one_step(self, tmp_path):
        trace = EditTrace([0], [1.0], [1.0], [0.5], [0.1])
        draw_overfitting([record(trace=trace)], tmp_path / "figure.png", title="LoRA")
