"""The corpora by name: worlds of the lab, and published files of which the user has a copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from overtone.lab.data.corpus import Corpus
from overtone.lab.data.counterfact import open_counterfact
from overtone.lab.data.knowedit import open_wikibio, open_zsre
from overtone.lab.data.mquake import open_mquake
from overtone.lab.data.wikidata import open_wikidata
from overtone.lab.data.world_corpus import open_world
from overtone.lab.registry import look_up


@dataclass(frozen=True)
class Source:
    """Where a corpus comes from.

    Attributes:
        title: what reports say.
        open: takes ``seed``, and where the corpus is a file its path first and optionally ``size``.
        is_file: it is read from a published file.
    """

    title: str
    open: Callable[..., Corpus]
    is_file: bool = False


CORPORA: Mapping[str, Source] = {
    "short": Source("Short targets", partial(open_world, "short")),
    "long": Source("Long targets", partial(open_world, "long")),
    "soft": Source("Soft knowledge", partial(open_world, "soft")),
    "zsre": Source("ZsRE", open_zsre, is_file=True),
    "wikibio": Source("WikiBio", open_wikibio, is_file=True),
    "mquake": Source("MQuAKE", open_mquake, is_file=True),
    "counterfact": Source("CounterFact", open_counterfact, is_file=True),
    "wikidata_recent": Source("WikiData recent", partial(open_wikidata, "recent"), is_file=True),
    "wikidata_counterfact": Source("WikiData counterfact", partial(open_wikidata, "counterfact"), is_file=True),
}
"""By name. The worlds have short targets, long ones, and edits judged on facts with several answers."""


def open_corpus(name: str, *, seed: int, path: Path | None = None, size: int | None = None) -> Corpus:
    """The corpus of a name.

    Args:
        name: a key of `CORPORA`.
        seed: of the world, or of the choice of records from a file.
        path: the published file; worlds have none.
        size: how many records of the file to use, all of which a small model has to learn; by default the
            corpus' own number. Worlds have none.

    Raises:
        ValueError: an unknown name, a path or size for a world, no path for a file, a size that the file does not
            have, or a record that is not as published.
        OSError: the file cannot be read.
    """
    (source,) = look_up(CORPORA, "corpus", [name])
    if source.is_file:
        if path is None:
            raise ValueError(f"data {name} needs its published file: pass --{name.replace('_', '-')} PATH")
        return source.open(path, seed=seed, **({} if size is None else {"size": size}))
    for argument, value in (("path", path), ("size", size)):
        if value is not None:
            raise ValueError(f"{argument} is {value}, but {name} is a world of the lab, which has none: leave it out")
    return source.open(seed=seed)
