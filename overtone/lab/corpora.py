"""What a benchmark edits: true texts, edits of them, and what a model must know for these to mean anything.

The lab's worlds are corpora, and so are published editing data, read from the user's copies of the files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from overtone.lab.knowedit import open_wikibio, open_zsre
from overtone.lab.mquake import open_mquake
from overtone.lab.recipes import RECIPES, Recipe
from overtone.lab.world import Edit, Probe, World, build_world


class Corpus(Protocol):
    """True texts, edits of what they say, and questions that show whether a model knows them."""

    @property
    def name(self) -> str:
        """The key in `CORPORA`."""

    @property
    def knowledge_needed(self) -> Mapping[str, float]:
        """The share of each group of `knowledge_probes` below which edits of the corpus mean nothing, in [0, 1]."""

    def recipe(self, arch: str) -> Recipe:
        """How a small model of an architecture is trained on the texts."""

    def training_texts(self) -> list[str]:
        """What a small model is trained on; a text that is told more often stands there more often."""

    def held_out_texts(self) -> list[str]:
        """True texts that are not among the training texts, for perplexity."""

    def knowledge_probes(self) -> dict[str, list[Probe]]:
        """What the unedited model should know, by the title of a group of questions."""

    def edits(self, count: int, *, seed: int) -> list[Edit]:
        """Edits that contradict each other in nothing, a longer list beginning with the shorter one.

        Raises:
            ValueError: the corpus does not have ``count`` such edits.
        """


class WorldCorpus:
    """A world of the lab, edited towards one kind of target; all kinds share the world's texts and so its model."""

    knowledge_needed: Mapping[str, float] = {"facts": 0.99, "two hops": 0.95}

    def __init__(self, world: World, target: str = "short") -> None:
        """Take a world and the target of its edits, a key of `overtone.lab.relations.EDITABLE`."""
        self.world = world
        self.name = target

    def recipe(self, arch: str) -> Recipe:
        """That of the architecture."""
        return RECIPES[arch]

    def training_texts(self) -> list[str]:
        """Every text of the world."""
        return self.world.training_texts()

    def held_out_texts(self) -> list[str]:
        """Chains of thought whose two facts were told, but not together."""
        return self.world.held_out_texts()

    def knowledge_probes(self) -> dict[str, list[Probe]]:
        """All facts in all phrasings, and all two-hop questions."""
        return {"facts": self.world.fact_probes(), "two hops": self.world.two_hop_probes()}

    def edits(self, count: int, *, seed: int) -> list[Edit]:
        """The world's edits; see `overtone.lab.world.World.edits`."""
        return self.world.edits(count, seed=seed, target=self.name)


WORLDS = ("short", "long", "soft")
"""The corpora that are worlds of the lab: short targets, long ones, and edits judged on facts with several answers."""

FILES: Mapping[str, Callable[..., Corpus]] = {"zsre": open_zsre, "wikibio": open_wikibio, "mquake": open_mquake}
"""The corpora that are published files, and what opens each."""

CORPORA = (*WORLDS, *FILES)
"""The names of all corpora."""


def open_corpus(name: str, *, seed: int, path: Path | None = None, size: int | None = None) -> Corpus:
    """The corpus of a name.

    Args:
        name: one of `CORPORA`.
        seed: of the world, or of the choice of records from a file.
        path: the published file; worlds have none.
        size: how many records of the file to use, all of which a small model has to learn; by default as many as one
            learns in minutes.

    Raises:
        ValueError: an unknown name, a path or size for a world or no path for a file, a size that the file does not
            have, or a record that is not as published.
        OSError: the file cannot be read.
    """
    if name in FILES:
        if path is None:
            raise ValueError(f"path is missing: {name} is read from a published file that you name")
        chosen = {} if size is None else {"size": size}
        return FILES[name](path, seed=seed, **chosen)
    if name not in WORLDS:
        raise ValueError(f"unknown corpus {name!r}: choose from {', '.join(CORPORA)}")
    for argument, value in (("path", path), ("size", size)):
        if value is not None:
            raise ValueError(f"{argument} is {value}, but {name} is a world of the lab, which has none: leave it out")
    return WorldCorpus(build_world(seed), name)
