"""From the grid to its tasks: what is refused before anything takes time, and what is left out and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from overtone.lab.data.corpora import CORPORA, open_corpus
from overtone.lab.data.corpus import Corpus
from overtone.lab.data.edit import Edit
from overtone.lab.data.known import KnownFacts
from overtone.lab.edit.methods import METHODS, MethodSettings
from overtone.lab.edit.sessions import require_method, unsupported
from overtone.lab.registry import look_up
from overtone.lab.run.settings import RunSettings
from overtone.lab.run.task import SequenceTask
from overtone.token_loss import parse

_BEYOND = 2**31
"""No setting of a method can be so large; libraries count in 32 and 64 bits."""


@dataclass
class Plan:
    """What there is to do.

    Attributes:
        corpora: by name and seed.
        tasks: the losses of a sequence follow each other.
        left_out: one sentence for each part of the grid that cannot be done.
    """

    corpora: dict[tuple[str, int], Corpus] = field(default_factory=dict)
    tasks: list[SequenceTask] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def edits(self) -> int:
        """How many the whole grid has."""
        return sum(task.length for task in self.tasks)


def make_plan(settings: RunSettings, knows: Callable[[Sequence[Edit]], list[bool]] | None = None) -> Plan:
    """The tasks of a grid.

    Args:
        settings: the grid.
        knows: says of edits whether the model knows what they replace; needed for `only_known`.

    Raises:
        ValueError: an unknown name, no name, too few edits in a corpus, a method that can minimise none of the losses,
            or a number out of range.
        OSError: a file cannot be read.
    """
    _check(settings)
    plan = Plan()
    pairs = _possible_pairs(settings, plan)
    for seed in settings.seeds:
        for data in settings.data:
            corpus = open_corpus(data, seed=seed, path=path_of(settings, data), size=size_of(settings, data))
            plan.corpora[data, seed] = corpus
            if settings.only_known:
                assert knows is not None
                plan.corpora[data, seed] = KnownFacts(corpus, knows)
            plan.tasks += _tasks(settings, plan, data, seed, pairs)
    if not plan.tasks:
        raise ValueError(f"there is nothing to do: {'; '.join(plan.left_out)}")
    return plan


def path_of(settings: RunSettings, data: str) -> Path | None:
    """The file of a corpus that is read from one."""
    return Path(settings.paths[data]) if data in settings.paths else None


def size_of(settings: RunSettings, data: str) -> int | None:
    """How many records of its file a corpus takes."""
    return settings.size if CORPORA[data].is_file else None


def held_out_texts(settings: RunSettings, corpus: Corpus, seed: int) -> tuple[str, ...]:
    """Those that the perplexity is measured on."""
    texts = corpus.held_out_texts()
    return tuple(Random(f"perplexity {seed}").sample(texts, min(len(texts), settings.held_out_texts)))


def _check(settings: RunSettings) -> None:
    for argument in ("data", "seeds", "methods", "losses", "lengths"):
        if not getattr(settings, argument):
            raise ValueError(f"{argument} is empty: name at least one")
    whole = {name: settings.changes[name] for name in ("steps", "rank", "alpha") if name in settings.changes}
    at_least_1 = {"lengths": min(settings.lengths), "edits": settings.edits, "at_once": settings.sharing, **whole}
    for argument, least in at_least_1.items():
        if least < 1:
            raise ValueError(f"{argument} must be at least 1, got {least}")
    for argument, number in whole.items():
        if number >= _BEYOND:
            raise ValueError(f"{argument} must be below {_BEYOND}, got {number}")
    if settings.held_out_texts < 0:
        raise ValueError(f"held_out_texts must be at least 0, got {settings.held_out_texts}")
    for lr in settings.lrs:
        if not 0 < lr < float("inf"):
            raise ValueError(f"lr must be a number above 0, got {lr}")
    if settings.generate and settings.sharing == 1:
        raise ValueError(
            "generate is for edits that share a pass, but at_once is 1: completions are generated and exact matches "
            "counted there anyway; leave generate out"
        )
    if settings.model is None and settings.only_known:
        raise ValueError("only_known is for a named model: the lab's small models were trained on the facts")
    if settings.model is None and settings.dtype is not None:
        raise ValueError(f"dtype is {settings.dtype}, but the lab's small models have float32: name a model")
    look_up(CORPORA, "corpus", settings.data)
    if settings.size is not None and not any(CORPORA[data].is_file for data in settings.data):
        raise ValueError(
            f"size is {settings.size}, but no data here is read from a published file: name one, or leave size out"
        )
    for method in settings.methods:
        require_method(method)
    edits_a_step = settings.changes.get("breadth_first")
    if edits_a_step is not None:
        _check_breadth_first(settings, edits_a_step)


def _check_breadth_first(settings: RunSettings, edits_a_step: Any) -> None:
    if type(edits_a_step) is not int or edits_a_step < 1:
        raise ValueError(f"breadth_first must be a whole number of edits a step, at least 1, got {edits_a_step!r}")
    if max(settings.lengths) == 1:
        raise ValueError(
            f"breadth_first is {edits_a_step}, but lengths has single edits alone: ask for longer sequences, or leave "
            "breadth_first out"
        )
    others = [method for method in settings.methods if method not in METHODS]
    if others:
        raise ValueError(
            f"breadth_first is for the lab's own methods ({', '.join(METHODS)}), got {', '.join(others)} beside it: "
            "leave one of the two out"
        )


def _possible_pairs(settings: RunSettings, plan: Plan) -> list[tuple[str, str]]:
    """The pairs of method and loss, method after method."""
    losses = {loss.name: loss for loss in map(parse, settings.losses)}
    pairs = []
    for method in settings.methods:
        reasons = {name: unsupported(method, loss) for name, loss in losses.items()}
        possible = [name for name, reason in reasons.items() if reason is None]
        if not possible:
            raise ValueError(f"losses: {next(iter(reasons.values()))}")
        pairs += [(method, name) for name in possible]
        plan.left_out += [reason for reason in reasons.values() if reason is not None]
    return pairs


def _tasks(
    settings: RunSettings, plan: Plan, data: str, seed: int, pairs: list[tuple[str, str]]
) -> Iterator[SequenceTask]:
    corpus = plan.corpora[data, seed]
    unseen, known = held_out_texts(settings, corpus, seed), tuple(corpus.training_texts())
    traced = settings.methods[0], settings.seeds[0], 1
    for length in settings.lengths:
        for number, edits in enumerate(_sequences(settings, plan, data, seed, length)):
            for method, chosen, loss in (
                (m, chosen, loss) for m, loss in pairs for chosen in _settings(settings, m, length)
            ):
                is_own = method in METHODS
                yield SequenceTask(
                    data=data,
                    seed=seed,
                    method=method,
                    settings=chosen,
                    loss=loss,
                    sequence=number,
                    edits=edits,
                    held_out_texts=unseen,
                    known_texts=() if is_own else known,
                    is_traced=settings.sharing == 1 and is_own and (method, seed, length) == traced,
                )


def _settings(settings: RunSettings, method: str, length: int) -> list[MethodSettings | None]:
    """What an editor sets of a method: once for each learning rate; None where EasyEdit's files decide."""
    if method not in METHODS:
        return [None]
    rates = [{"lr": lr} for lr in settings.lrs] or [{}]
    is_large = settings.model is not None
    changes = dict(settings.changes)
    if changes.get("breadth_first") is not None:
        # Rounds over a single edit are its steps, and no step has more edits than the sequence.
        changes["breadth_first"] = min(changes["breadth_first"], length) if length > 1 else None
    return [METHODS[method].changed({**changes, **rate}, is_large=is_large) for rate in rates]


def _sequences(settings: RunSettings, plan: Plan, data: str, seed: int, length: int) -> list[tuple[Edit, ...]]:
    count = max(1, settings.edits // length)
    try:
        edits = plan.corpora[data, seed].edits(count * length, seed=seed)
    except ValueError as error:
        if length <= settings.edits or not settings.fit_lengths:
            raise ValueError(f"{data}, sequences of {length}: {error}") from error
        plan.left_out.append(f"{data} has no sequence of {length} with seed {seed}: {error}")
        return []
    return [tuple(edits[start : start + length]) for start in range(0, len(edits), length)]
