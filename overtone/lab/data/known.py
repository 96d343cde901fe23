"""A corpus of which only those facts are edited that a model knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from overtone.lab.data.corpus import Corpus
from overtone.lab.data.edit import Edit, Probe
from overtone.lab.data.recipe import Recipe


class KnownFacts:
    """A corpus with some of its edits left out."""

    def __init__(self, corpus: Corpus, knows: Callable[[Sequence[Edit]], list[bool]]) -> None:
        """Take the corpus, and what says of each edit whether what it replaces is known."""
        self._corpus = corpus
        self._knows = knows
        self._known = lru_cache(maxsize=1)(self._known_edits)

    @property
    def knowledge_needed(self) -> Mapping[str, float]:
        """See `Corpus`."""
        return self._corpus.knowledge_needed

    def recipe(self, arch: str) -> Recipe:
        """See `Corpus`."""
        return self._corpus.recipe(arch)

    def training_texts(self) -> list[str]:
        """See `Corpus`."""
        return self._corpus.training_texts()

    def held_out_texts(self) -> list[str]:
        """See `Corpus`."""
        return self._corpus.held_out_texts()

    def knowledge_probes(self) -> dict[str, list[Probe]]:
        """See `Corpus`."""
        return self._corpus.knowledge_probes()

    def edits(self, count: int, *, seed: int) -> list[Edit]:
        """The corpus' edits of known facts, in its order.

        Raises:
            ValueError: there are not so many.
        """
        known = self._known(seed)
        if not 1 <= count <= len(known):
            raise ValueError(
                f"count must be from 1 to {len(known)}, the edits of facts that the model knows, got {count}: use more "
                "records of the file"
            )
        return known[:count]

    def _known_edits(self, seed: int) -> list[Edit]:
        edits = _all_edits(self._corpus, seed)
        return [edit for edit, is_known in zip(edits, self._knows(edits), strict=True) if is_known]


def _all_edits(corpus: Corpus, seed: int) -> list[Edit]:
    """Every edit of a corpus, which only says how many it has by refusing to give more."""
    count = 1
    edits = corpus.edits(count, seed=seed)
    step = 1
    while step:
        try:
            edits, count = corpus.edits(count + step, seed=seed), count + step
            step *= 2
        except ValueError:
            step //= 2
    return edits
