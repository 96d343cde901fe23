"""A line now and then where no progress bar can move: in a log."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console

SECONDS_A_LINE = 30.0
"""How often a log gets a line at most."""


class LogLines:
    """Lines on standard error about something that takes long, unless a bar moves there.

    Attributes:
        console: standard error, for the bar.
    """

    def __init__(self) -> None:
        """Start the clock: the first line comes after `SECONDS_A_LINE`."""
        self.console = Console(stderr=True)
        self._has_bar = self.console.is_terminal and not self.console.is_dumb_terminal
        self._told = time.monotonic()

    def tell(self, line: Callable[[], str]) -> None:
        """Print the line if it is time for one."""
        if not self._has_bar and time.monotonic() - self._told >= SECONDS_A_LINE:
            self._told = time.monotonic()
            self.console.print(line(), highlight=False)
