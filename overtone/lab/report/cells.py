"""Numbers as a reader sees them: percents, intervals, signed differences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd


@dataclass(frozen=True)
class Column:
    """How a measure is written.

    Attributes:
        heading: of the column.
        factor: what the values are multiplied by; 100 for a share that is written in %.
        decimals: of the mean.
        interval_decimals: of the interval's ends; None: it is not written.
    """

    heading: str
    factor: float = 100.0
    decimals: int = 1
    interval_decimals: int | None = 0

    def mean(self, row: Mapping[str, Any], name: str) -> str | None:
        """A row's mean of the measure; None where it has none."""
        value = row.get(name, math.nan)
        return None if pd.isna(value) else f"{self.factor * value:.{self.decimals}f}"

    def interval(self, row: Mapping[str, Any], name: str) -> tuple[str, str] | None:
        """The ends of its interval; None where there is none, or it is not written."""
        low, high = (row.get(f"{name} {end}", math.nan) for end in ("low", "high"))
        if self.interval_decimals is None or pd.isna(low) or pd.isna(high):
            return None
        return f"{self.factor * low:.{self.interval_decimals}f}", f"{self.factor * high:.{self.interval_decimals}f}"


COLUMNS: Mapping[str, Column] = {
    "rel": Column("Rel"),
    "gen": Column("Gen"),
    "por": Column("Por"),
    "loc": Column("Loc"),
    "average": Column("Average", interval_decimals=1),
    "por of others": Column("Por, other answers"),
    "rel begins": Column("Rel begins", interval_decimals=None),
    "gen begins": Column("Gen begins", interval_decimals=None),
    "por begins": Column("Por begins", interval_decimals=None),
    "rel said": Column("Rel said", interval_decimals=None),
    "gen said": Column("Gen said", interval_decimals=None),
    "por said": Column("Por said", interval_decimals=None),
    "exact match": Column("Exact match"),
    "kl": Column("KL", factor=1.0, decimals=3, interval_decimals=2),
    "perplexity": Column("Perplexity", factor=1.0, decimals=2, interval_decimals=None),
    "steps": Column("Steps", factor=1.0, interval_decimals=None),
    "seconds": Column("Seconds", factor=1.0, decimals=2, interval_decimals=None),
}


def signed(share: float) -> str:
    """A difference of shares in points, with as many decimals as tell it from 0."""
    points = 100.0 * share
    return f"{points:+.1f}" if abs(points) >= 0.05 or abs(points) < 1e-9 else f"{points:+.1g}"
