"""One finding about an hparams file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Trap:
    """One finding.

    Attributes:
        finding: what is wrong with the file.
        mend: what to do about it.
        fatal: the edit would not run at all.
        always: it holds for every file of the method, whatever the file says.
    """

    finding: str
    mend: str
    fatal: bool = False
    always: bool = False

    def __str__(self) -> str:
        """One line."""
        return f"{self.finding}: {self.mend}"
