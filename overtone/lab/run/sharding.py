"""One run of several processes on one or several machines, as `torchrun` and `accelerate launch` start them.

Every rank takes its share of the tasks. The ranks meet in the output folder alone: a task belongs to one of them, so
there is nothing for a process group to exchange.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Task = TypeVar("Task")


@dataclass(frozen=True)
class Rank:
    """One of ``world_size`` processes, the one with number ``rank``.

    Raises:
        ValueError: rank is not in [0, world_size).
    """

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        """Validate."""
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be from 0 to world_size - 1, got {self.rank} of {self.world_size}")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Rank:
        """The one that RANK and WORLD_SIZE name; the only one where they are not set."""
        return cls(int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1)))

    @property
    def is_alone(self) -> bool:
        """Whether there are no others."""
        return self.world_size == 1

    def share(self, tasks: Sequence[Task], cost: Callable[[Task], float]) -> list[Task]:
        """This rank's part of the tasks, in their order; every task belongs to one rank.

        Args:
            tasks: the same list on every rank.
            cost: of a task; tasks of one cost are dealt out evenly, but at random, since neighbours in a grid differ in
                the same way again and again.
        """
        chance = random.Random(0)
        dealt = sorted(range(len(tasks)), key=lambda index: (-cost(tasks[index]), chance.random()))
        return [tasks[index] for index in sorted(dealt[self.rank :: self.world_size])]
