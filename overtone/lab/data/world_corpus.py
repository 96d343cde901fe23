"""A world of the lab as a corpus."""

from __future__ import annotations

from collections.abc import Mapping

from overtone.lab.data.edit import Edit, Probe
from overtone.lab.data.recipe import RECIPES, Recipe
from overtone.lab.data.world import World, build_world


class WorldCorpus:
    """A world, edited towards one kind of target; all kinds share the world's texts and so its model."""

    knowledge_needed: Mapping[str, float] = {"facts": 0.99, "two hops": 0.95}

    def __init__(self, world: World, target: str = "short") -> None:
        """Take a world and the target of its edits, a key of `overtone.lab.data.relations.EDITABLE`."""
        self.world = world
        self._target = target

    def recipe(self, arch: str) -> Recipe:
        """That of the architecture."""
        return RECIPES[arch]

    def training_texts(self) -> list[str]:
        """Every text of the world."""
        return self.world.training_texts()

    def held_out_texts(self) -> list[str]:
        """Chains of thought whose two facts are among the training texts, but not together."""
        return self.world.held_out_texts()

    def knowledge_probes(self) -> dict[str, list[Probe]]:
        """All facts in all phrasings, and all two-hop questions."""
        return {"facts": self.world.fact_probes(), "two hops": self.world.two_hop_probes()}

    def edits(self, count: int, *, seed: int) -> list[Edit]:
        """The world's edits; see `overtone.lab.data.world.World.edits`."""
        return self.world.edits(count, seed=seed, target=self._target)


def open_world(target: str, seed: int) -> WorldCorpus:
    """The world of a seed, edited towards a kind of target."""
    return WorldCorpus(build_world(seed), target)
