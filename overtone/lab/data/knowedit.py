"""KnowEdit's ZsRE and WikiBio as corpora: the published edits, and what a small model is taught so that they are edits.

Files: `zjunlp/KnowEdit`, MIT licence (Zhang et al., 2024, arXiv 2401.01286).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from overtone.lab.data.edit import Edit, Probe
from overtone.lab.data.published import Record, read_records, sample, take
from overtone.lab.data.recipe import Recipe, adapted

_SUBSTITUTABLE = ("Subject_Aliasing", "Logical_Generalization")
"""The kinds of portability whose question is about the old object once the old object is put for the new one."""


@dataclass(frozen=True)
class KnowEditCase:
    """One record: an edit, and what is true without it.

    ``unedited_portability`` are the portability questions asked of the old object, where that can be said: under
    another name of the subject, or back from the object. The answers of the others hold after the edit alone.
    """

    edit: Edit
    unedited_portability: tuple[Probe, ...]


class KnowEditCorpus:
    """Records of a KnowEdit file, and the texts that a small model learns of them."""

    def __init__(self, name: str, cases: list[KnowEditCase], recipe: Recipe, *, seed: int) -> None:
        """Take the cases; the seed chooses which phrasings of locality facts are held out."""
        self._name = name
        self._cases = cases
        self._recipe = recipe
        self._told_locality: list[Probe] = []
        self._held_out: list[Probe] = []
        rng = random.Random(f"held out {seed}")
        for case in cases:
            facts: dict[str, list[Probe]] = {}
            for probe in case.edit.locality:
                facts.setdefault(probe.answer, []).append(probe)
            for phrasings in facts.values():
                is_held_out = len(phrasings) > 1 and rng.random() < 0.5
                (self._held_out if is_held_out else self._told_locality).append(phrasings.pop())
                self._told_locality += phrasings

    @property
    def knowledge_needed(self) -> Mapping[str, float]:
        """Half of the facts: with fewer, most edits would replace nothing."""
        return {"facts": 0.5}

    def recipe(self, arch: str) -> Recipe:
        """That of the file's kind of texts."""
        return adapted(self._recipe, arch)

    def training_texts(self) -> list[str]:
        """The facts before the edits, in all their phrasings but those held out."""
        return [probe.text for probes in self._told().values() for probe in probes]

    def held_out_texts(self) -> list[str]:
        """Locality facts in a phrasing that was not told; in the other one they were."""
        return [probe.text for probe in self._held_out]

    def knowledge_probes(self) -> dict[str, list[Probe]]:
        """The facts before the edits, what follows from them, and the locality facts as told and as held out."""
        groups = self._told() | {"locality facts, held out": self._held_out}
        return {title: probes for title, probes in groups.items() if probes}

    def edits(self, count: int, *, seed: int) -> list[Edit]:
        """The records' edits that change an answer."""
        edits = [case.edit for case in self._cases if case.edit.target_new != case.edit.target_old]
        return take(edits, count, seed=seed, what=f"records of {self._name} in use that change an answer")

    def _told(self) -> dict[str, list[Probe]]:
        edits = [case.edit for case in self._cases]
        return {
            "facts": [_probe(edit.prompt, edit.target_old, "fact") for edit in edits],
            "rephrasings": [
                _probe(probe.prompt, edit.target_old, "fact") for edit in edits for probe in edit.generality
            ],
            "consequences": [probe for case in self._cases for probe in case.unedited_portability],
            "locality facts": self._told_locality,
        }


ZSRE_RECIPE = Recipe(vocabulary=1500, steps=400)
WIKIBIO_RECIPE = Recipe(vocabulary=1500, steps=1400, blocks=4, block_length=256)


def open_zsre(path: Path, *, seed: int, size: int = 100) -> KnowEditCorpus:
    """ZsRE: questions whose answer is edited, a rephrasing of each, locality facts and portability questions.

    Where a record has several old answers the first is taken. Locality asks the same subject other things. The answers
    of "Reasoning" are facts about the new object that the file tells nowhere else, so a small model trained on the file
    cannot give them, edited or not: there, portability is the share of their tokens that it guesses.

    Args:
        path: ``benchmark_ZsRE_ZsRE-test-all.json`` or a file like it.
        seed: of the choice of records.
        size: how many.

    Raises:
        ValueError: the file is not as published, or has fewer records.
        OSError: it cannot be read.
    """
    fields = ("subject", "prompt", "target_new", "ground_truth", "rephrase_prompt")
    records = sample(read_records(path, fields), size, seed=seed, path=path)
    return KnowEditCorpus("zsre", [_zsre_case(record) for record in records], ZSRE_RECIPE, seed=seed)


def open_wikibio(path: Path, *, seed: int, size: int = 50) -> KnowEditCorpus:
    """WikiBio: biographies whose next sentence is edited, and locality facts.

    The file has the right next sentence, ``labels``, and not the hallucinated one that it replaces. So a small model is
    taught another person's next sentence instead: fluent, of the same kind, and wrong.

    Args:
        path: ``benchmark_WikiBio_wikibio-test-all.json`` or a file like it.
        seed: of the choice of records.
        size: how many.

    Raises:
        ValueError: the file is not as published, or has fewer records.
        OSError: it cannot be read.
    """
    records = sample(read_records(path, ("text", "labels", "concept")), size, seed=seed, path=path)
    others = [*records[1:], records[0]]
    cases = [_wikibio_case(record, other.text("labels")) for record, other in zip(records, others, strict=True)]
    return KnowEditCorpus("wikibio", cases, WIKIBIO_RECIPE, seed=seed)


def _zsre_case(record: Record) -> KnowEditCase:
    subject, new, old = record.text("subject"), record.text("target_new"), record.answers("ground_truth")
    portability, unedited = [], []
    for kind, probes in record.groups("portability"):
        for probe in probes:
            prompt, answer = probe.text("prompt"), probe.answers("ground_truth")[0]
            portability.append(_probe(prompt, answer, kind))
            before = _probe(prompt.replace(new, old[0]), answer.replace(new, old[0]), kind)
            if kind in _SUBSTITUTABLE and before != portability[-1]:
                unedited.append(before)
    edit = Edit(
        subject=subject,
        prompt=record.text("prompt"),
        target_new=f" {new}",
        # An edit to another of the old answers would change nothing.
        target_old=f" {new}" if new in old else f" {old[0]}",
        generality=(_probe(record.text("rephrase_prompt"), new, "rephrase"),),
        portability=tuple(portability),
        locality=tuple(_locality(record)),
    )
    return KnowEditCase(edit, tuple(unedited))


def _wikibio_case(record: Record, hallucinated: str) -> KnowEditCase:
    edit = Edit(
        subject=record.text("concept"),
        prompt=record.text("text"),
        target_new=f" {record.text('labels')}",
        target_old=f" {hallucinated}",
        generality=(),
        portability=(),
        locality=tuple(_locality(record)),
    )
    return KnowEditCase(edit, ())


def _locality(record: Record) -> Iterator[Probe]:
    for kind, probes in record.groups("locality"):
        for probe in probes:
            yield _probe(probe.text("prompt"), probe.answers("ground_truth")[0], kind)


def _probe(prompt: str, target: str, kind: str) -> Probe:
    answer = target.strip()
    return Probe(prompt, f" {answer}", kind, answer)
