"""Looking names from a command line up in the lab's registries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

Entry = TypeVar("Entry")


def look_up(registry: Mapping[str, Entry], kind: str, names: Iterable[str]) -> list[Entry]:
    """The entries of these names, in their order.

    Args:
        registry: name to entry.
        kind: what an entry is, for the message.
        names: to look up.

    Raises:
        ValueError: a name that is not there, with those that are.
    """
    names = list(names)
    for name in names:
        if name not in registry:
            raise ValueError(f"unknown {kind} {name!r}: choose from {', '.join(registry)}")
    return [registry[name] for name in names]
