"""Which losses a figure shows, and what the curve of forgetting is made of."""

from __future__ import annotations

import pytest
from bench_lines import sequence, singles
from overtone.lab.bench_figures import MOST_LINES, draw_figures, forgetting, loss_groups
from overtone.lab.bench_tables import editing_blocks
from overtone.lab.figures import loss_styles
from overtone.lab.losses import ABLATIONS, EARLY_STOPPING_THRESHOLDS, LOSSES, parse_loss

THRESHOLDS = [parse_loss(f"early_stopping:stop_below={value}").name for value in EARLY_STOPPING_THRESHOLDS]


class TestLossGroups:
    @pytest.mark.parametrize("sweep", [0, 3, 20])
    def test_every_loss_is_drawn_and_no_figure_is_crowded(self, sweep):
        losses = list(dict.fromkeys([*LOSSES, *THRESHOLDS, *ABLATIONS]))
        losses += [f"overtone:lam={number / 100}" for number in range(2, 2 + sweep)]
        losses += [f"early_stopping:stop_below={number / 100}" for number in range(60, 60 + sweep)]
        groups = loss_groups(losses)
        assert {loss for group in groups.values() for loss in group} == set(losses)
        assert max(map(len, groups.values())) <= MOST_LINES
        assert next(iter(groups)) == ""

    def test_the_presets_losses_differ_in_colour_within_each_figure(self):
        losses = list(dict.fromkeys([*LOSSES, *THRESHOLDS, *ABLATIONS]))
        styles = loss_styles(losses)
        for group in loss_groups(losses).values():
            assert len({styles[loss]["color"] for loss in group}) == len(group)

    def test_a_single_threshold_needs_no_figure_of_its_own(self):
        assert loss_groups(list(LOSSES)) == {"": list(LOSSES)}


class TestForgetting:
    def test_by_age_over_the_longest_sequences(self):
        """Of 20 edits in a row two fall into each bin; the last ones have the age of 0 and 1."""
        shares = [0.0] * 18 + [0.5, 1.0]
        points = forgetting([*sequence(shares), *sequence([0.0] * 4), *singles([0.0])])
        assert len(points) == 10
        youngest = points[0]
        assert (youngest.length, youngest.youngest, youngest.oldest, youngest.rel.mean) == (20, 0, 1, 0.75)
        assert (points[-1].youngest, points[-1].oldest, points[-1].rel.mean) == (18, 19, 0.0)

    def test_short_sequences_have_a_bin_per_age(self):
        points = forgetting(sequence([0.1, 0.2, 0.3]))
        assert [(point.youngest, point.oldest, point.rel.mean) for point in points] == [
            (0, 0, pytest.approx(0.3)),
            (1, 1, pytest.approx(0.2)),
            (2, 2, pytest.approx(0.1)),
        ]

    def test_single_edits_and_failed_ones_are_not_forgotten(self):
        assert forgetting(singles([1.0, 0.5])) == []
        assert forgetting(sequence([None, None])) == []


class TestDrawFigures:
    def test_draws_nothing_from_single_edits_without_a_trace(self, tmp_path):
        outcomes = singles([1.0, 0.5])
        drawn = draw_figures(outcomes, editing_blocks(outcomes), [], tmp_path)
        assert drawn == {"overfitting": [], "lengths": [], "forgetting": []}
        assert list(tmp_path.iterdir()) == []

    def test_a_loss_of_another_version_and_data_of_another_name(self, tmp_path):
        outcomes = [
            edit
            for seed in range(3)
            for loss in ("cross_entropy", "tomorrow:x=1")
            for shares in ([0.5], [0.5, 0.2])
            for edit in sequence(shares, seed=seed, data="news", method="new", loss=loss)
        ]
        drawn = draw_figures(outcomes, editing_blocks(outcomes), forgetting(outcomes), tmp_path)
        assert [path.name for paths in drawn.values() for path in paths] == ["lengths-new.png", "forgetting-new.png"]
