"""What tables and figures say of a hold."""

from __future__ import annotations

from overtone.hold import Hold


def hold_title(hold: Hold) -> str:
    """ "not held", "held" (once settled), "held at 0.2", "held at the first choice and 0.2"."""
    if not hold:
        return "not held"
    names = ["the first choice"] * hold.correct + ["settled"] * hold.settled
    names += [] if hold.mean is None else [f"{hold.mean:g}"]
    return "held" if names == ["settled"] else f"held at {' and '.join(names)}"
