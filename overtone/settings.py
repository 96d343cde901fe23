"""The settings of a target, as the functions that work it out hand them on."""

from __future__ import annotations

import math
from typing import NamedTuple


class TargetSettings(NamedTuple):
    """What decides the target of a token; as in `overtone.overtone_loss`."""

    n_sigma: float | None
    lam: float
    check: bool

    def numbers(self) -> tuple[float, float, int]:
        """With an infinite n_sigma for no filter, and 1 or 0 for check."""
        return math.inf if self.n_sigma is None else self.n_sigma, self.lam, int(self.check)
