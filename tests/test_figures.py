"""The figure: it is drawn from traces, whatever their lengths, and says what is missing."""

from __future__ import annotations

import pytest
from matplotlib.image import imread
from test_experiment import TRACE, record

from overtone.lab import figures
from overtone.lab.figures import draw_overfitting
from overtone.lab.losses import LOSSES, NamedLoss
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

    def test_same_records_same_bytes(self, tmp_path):
        records = [record(loss=loss, trace=TRACE) for loss in LOSSES]
        for name in ("a.png", "b.png"):
            draw_overfitting(records, tmp_path / name, title="LoRA")
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()

    def test_passes_over_records_without_a_trace(self, tmp_path):
        draw_overfitting([record(), record(trace=TRACE)], tmp_path / "figure.png", title="LoRA")

    def test_refuses_to_draw_nothing(self, tmp_path):
        with pytest.raises(ValueError, match="no record has a trace"):
            draw_overfitting([record()], tmp_path / "figure.png", title="LoRA")
        assert list(tmp_path.iterdir()) == []

    def test_every_loss_has_a_colour_of_its_own(self):
        assert len({figures._style(loss)["color"] for loss in LOSSES}) == len(LOSSES)

    def test_draws_a_loss_that_is_new_in_the_registry(self, tmp_path, monkeypatch):
        for number in range(9):
            monkeypatch.setitem(LOSSES, f"new {number}", NamedLoss(f"new {number}", "a new one"))
        draw_overfitting([record(loss=loss, trace=TRACE) for loss in LOSSES], tmp_path / "figure.png", title="LoRA")
        assert len({tuple(figures._style(loss).items()) for loss in LOSSES}) == len(LOSSES)


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
