"""Reliability after the last edit of a sequence, by how many edits were made since."""

from __future__ import annotations

from typing import Any

import pandas as pd

from overtone.lab.report.statistics import bootstrap_mean
from overtone.lab.report.tables import resampled_units

_BINS = 10


def forgetting_table(edits: pd.DataFrame) -> pd.DataFrame:
    """A row for each bin of ages, over the longest sequences of each data and method.

    Failed edits are left out, and those of rounds over a whole sequence, of which none was made before another.
    """
    rows: list[dict[str, Any]] = []
    edits = edits[edits["breadth_first"].isna()]
    for (data, method, settings), own in edits.groupby(["data", "method", "settings"], observed=True):
        length = int(own["length"].max())
        own = own[(own["length"] == length) & own["error"].isna()]
        if length == 1 or own.empty:
            continue
        ages = length - 1 - own["position"]
        bins = (ages * min(_BINS, length)) // length
        for (loss, _), group in own.assign(age=ages).groupby(["loss", bins], observed=True):
            rel = bootstrap_mean(group["rel"].astype(float), resampled_units(group)[1])
            rows.append(
                {
                    "data": data,
                    "length": length,
                    "method": method,
                    "settings": settings,
                    "loss": loss,
                    "youngest": group["age"].min(),
                    "oldest": group["age"].max(),
                    "rel": rel.mean,
                    "rel low": rel.low,
                    "rel high": rel.high,
                    "edits": len(group),
                }
            )
    return pd.DataFrame(rows)
