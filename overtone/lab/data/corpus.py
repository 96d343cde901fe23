"""What a loader gives: the one interface behind which worlds and published files look alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from overtone.lab.data.edit import Edit, Probe
from overtone.lab.data.recipe import Recipe


class Corpus(Protocol):
    """True texts, edits of what they say, and questions that show whether a model knows them."""

    @property
    def knowledge_needed(self) -> Mapping[str, float]:
        """The share of each group of `knowledge_probes` below which edits of the corpus mean nothing, in [0, 1]."""

    def recipe(self, arch: str) -> Recipe:
        """How a small model of an architecture is trained on the texts."""

    def training_texts(self) -> list[str]:
        """What a small model is trained on; a text that is to be learned better is in the list more than once."""

    def held_out_texts(self) -> list[str]:
        """True texts that are not among the training texts, for perplexity."""

    def knowledge_probes(self) -> dict[str, list[Probe]]:
        """What the unedited model should know, by the title of a group of questions."""

    def edits(self, count: int, *, seed: int) -> list[Edit]:
        """Edits that do not contradict each other, a longer list beginning with the shorter one.

        Raises:
            ValueError: the corpus does not have ``count`` such edits.
        """
