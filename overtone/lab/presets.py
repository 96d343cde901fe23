"""Grids with a name for `overtone bench`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from overtone.lab.bench import BenchSettings
from overtone.lab.editors import METHODS
from overtone.lab.losses import ABLATIONS, EARLY_STOPPING_THRESHOLDS, LOSSES, parse_loss
from overtone.lab.registry import look_up

_STOPPED = tuple(parse_loss(f"early_stopping:stop_below={threshold}").name for threshold in EARLY_STOPPING_THRESHOLDS)

_BEYOND_THE_PAPER = tuple(
    parse_loss(f"overtone:lam=0.5+hold_settled={mean_kl}+hold_correct=true").name for mean_kl in (0.1, 0.2)
)

PRESETS: Mapping[str, BenchSettings] = {
    "quick": BenchSettings(fit_lengths=True),
    "paper-small": BenchSettings(
        data=("short", "long", "soft"),
        seeds=(0, 1, 2),
        methods=tuple(METHODS),
        losses=tuple(dict.fromkeys((*LOSSES, *_STOPPED, *_BEYOND_THE_PAPER, *ABLATIONS))),
        lengths=(1, 10, 100),
        edits=20,
        fit_lengths=True,
    ),
}
"""Two methods and three losses on one small world, in minutes; every loss on three worlds with three seeds, in some
hours on two cores.

The published data join the second where their files are given."""


def preset(name: str, *, paths: Mapping[str, str], **changes: Any) -> BenchSettings:
    """The settings of a preset with some of them changed.

    Args:
        name: key in `PRESETS`.
        paths: the published files; each adds its corpus to the data.
        **changes: fields of `BenchSettings`. Lengths that are asked for must fit every corpus; a preset's own are left
            out where they do not.

    Raises:
        ValueError: an unknown name.
    """
    (settings,) = look_up(PRESETS, "preset", [name])
    data = tuple(dict.fromkeys((*changes.pop("data", settings.data), *paths)))
    return replace(settings, data=data, paths=paths, **{"fit_lengths": "lengths" not in changes, **changes})
