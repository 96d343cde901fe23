"""What a run does: the grid, and grids with a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from overtone.lab.edit.compared import ABLATIONS, COMPARED, THRESHOLDS
from overtone.lab.edit.methods import METHODS
from overtone.lab.registry import look_up


@dataclass(frozen=True)
class RunSettings:
    """The grid.

    Attributes:
        data: names in `overtone.lab.data.corpora.CORPORA`.
        seeds: of the corpora, their models and the choice of edits. They do not reach the methods: the random initial
            weights of LoRA are those of the first edit's place in the list, the same for sequence i of every seed.
        methods: names that `overtone.lab.edit.sessions.require_method` accepts; single edits of the first one, with the
            first seed, are traced for the figures.
        losses: loss specs (see `overtone.token_loss`).
        lengths: of the sequences of edits; 1 for single edits.
        edits: how many edits of each corpus and seed, cut into sequences of each length. A remainder that fills no
            sequence is left out; a length above this number has one sequence.
        fit_lengths: leave out the lengths for which a corpus has too few edits, instead of refusing them.
        paths: data to published file, for corpora that are read from one.
        size: how many records of such a file a small model is to know; None: the corpus' own default.
        model: name or folder of the model to edit; None: a small one trained on each corpus.
        arch: of the small models, a key of `overtone.lab.model.training.ARCHITECTURES`.
        lrs: learning rates, each a grid of its own; none: the method's.
        changes: of the methods' other settings, by the names of `overtone.lab.edit.methods.MethodSettings`. Each method
            takes those that it has.
        at_once: how many edits of the lab's own methods share a pass. From 2 on only what needs no generation is
            measured, which is much less for a large model. None: 8 for a named model, else 1.
        generate: let edited models whose edits share a pass say what they answer, which takes longer than the rest of
            scoring (`overtone.lab.score.scores.Scores.said`).
        held_out_texts: on how many of a corpus' held-out texts the perplexity is measured, at most; all of them would
            take longer than an edit. 0: it is not measured.
        only_known: edit only facts whose old answer the model begins with, after the edit's own prompt.
        dtype: of the weights of a named model, such as "bfloat16"; None: float32 on the CPU, elsewhere as stored.
    """

    data: tuple[str, ...] = ("short",)
    seeds: tuple[int, ...] = (0,)
    methods: tuple[str, ...] = tuple(METHODS)
    losses: tuple[str, ...] = COMPARED
    lengths: tuple[int, ...] = (1,)
    edits: int = 20
    fit_lengths: bool = True
    paths: Mapping[str, str] = field(default_factory=dict)
    size: int | None = None
    model: str | None = None
    arch: str = "llama"
    lrs: tuple[float, ...] = ()
    changes: Mapping[str, Any] = field(default_factory=dict)
    at_once: int | None = None
    generate: bool = False
    held_out_texts: int = 64
    only_known: bool = False
    dtype: str | None = None

    @property
    def sharing(self) -> int:
        """How many edits share a pass."""
        by_default = 1 if self.model is None else 8
        return by_default if self.at_once is None else self.at_once


_BEYOND_THE_PAPER = ("overtone:lam=0.5+hold=correct,0.1", "overtone:lam=0.5+hold=correct,0.2")

GRIDS: Mapping[str, RunSettings] = {
    # Its table has no perplexity, which would take a fifth of its time.
    "demo": RunSettings(held_out_texts=0),
    "quick": RunSettings(losses=("cross_entropy", "cross_entropy:hold=0.1", "overtone:hold=settled"), lengths=(1, 10)),
    "paper-small": RunSettings(
        data=("short", "long", "soft"),
        seeds=(0, 1, 2),
        losses=tuple(dict.fromkeys((*COMPARED, *THRESHOLDS, *_BEYOND_THE_PAPER, *ABLATIONS))),
        lengths=(1, 10, 100),
    ),
}
"""Single edits with six losses on one small world; two methods and three losses, singly and in rows of 10; baselines,
thresholds, OverTone and its ablations on three worlds with three seeds.

The published data join a preset's where their files are given."""


def preset(name: str, *, paths: Mapping[str, str], **changes: Any) -> RunSettings:
    """The settings of a preset with some of them changed.

    Args:
        name: key in `GRIDS`.
        paths: the published files; each adds its corpus to the data.
        **changes: fields of `RunSettings`. Lengths that are asked for must fit every corpus; a preset's own are left
            out where they do not.

    Raises:
        ValueError: an unknown name.
    """
    (settings,) = look_up(GRIDS, "preset", [name])
    # What a named model knows of an invented world is nothing.
    worlds = () if changes.get("model") and paths else settings.data
    data = tuple(dict.fromkeys((*changes.pop("data", worlds), *paths)))
    return replace(settings, data=data, paths=paths, **{"fit_lengths": "lengths" not in changes, **changes})
