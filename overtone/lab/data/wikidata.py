"""KnowEdit's WikiData recent and WikiData counterfact as corpora.

Structure as published in EasyEdit's ``examples/KnowEdit.md`` (`zjunlp/KnowEdit`, MIT licence, arXiv 2401.01286).
Answers stand there as a text, as a list of aliases, or as a list of answers of which each is a list of aliases.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from overtone.lab.data.edit import Edit, Probe
from overtone.lab.data.knowedit import KnowEditCase, KnowEditCorpus
from overtone.lab.data.published import Record, read_records, sample
from overtone.lab.data.recipe import Recipe

WIKIDATA_RECIPE = Recipe(vocabulary=1500, steps=400)

PORTABILITY = ("Logical_Generalization", "Reasoning", "Subject_Aliasing")
LOCALITY = ("Relation_Specificity", "Forgetfulness")


_FIELDS = {
    "recent": ("subject", "prompt", "target_new"),
    "counterfact": ("subject", "prompt", "target_new", "ground_truth"),
}


def open_wikidata(part: str, path: Path, *, seed: int, size: int = 100) -> KnowEditCorpus:
    """A part of KnowEdit's WikiData.

    Args:
        part: "recent", facts newer than most models, which replace no answer that the file names; or "counterfact",
            facts with another object, where "Forgetfulness" asks a relation's other objects.
        path: ``recent_test.json``, ``test_cf.json`` or a file like it.
        seed: of the choice of records.
        size: how many.

    Raises:
        ValueError: the file is not as published, or has fewer records.
        OSError: it cannot be read.
    """
    records = sample(read_records(path, _FIELDS[part]), size, seed=seed, path=path)
    cases = [KnowEditCase(_edit(record), ()) for record in records]
    return KnowEditCorpus(f"wikidata_{part}", cases, WIKIDATA_RECIPE, seed=seed)


def _edit(record: Record) -> Edit:
    new = record.text("target_new")
    old = record.answers("ground_truth") if "ground_truth" in record else ()
    return Edit(
        subject=record.text("subject"),
        prompt=record.text("prompt"),
        target_new=f" {new}",
        # An edit to another of the old answers would change nothing.
        target_old="" if not old else f" {new}" if new in old else f" {old[0]}",
        generality=tuple(_rephrase(record, new)),
        portability=tuple(_probes(record, "portability", PORTABILITY)),
        locality=tuple(_probes(record, "locality", LOCALITY)),
    )


def _rephrase(record: Record, answer: str) -> Iterator[Probe]:
    # Some redistributions add one.
    if "rephrase" in record or "rephrase_prompt" in record:
        field = "rephrase" if "rephrase" in record else "rephrase_prompt"
        for prompt in record.answers(field):
            yield Probe(prompt, f" {answer}", "rephrase", answer)


def _probes(record: Record, field: str, known: tuple[str, ...]) -> Iterator[Probe]:
    for kind, probes in record.groups(field):
        if kind not in known:
            raise record.fault(field, f"unknown kind {kind!r}: expected {', '.join(known)}")
        for probe in probes:
            answers = probe.texts("ground_truth")
            # The published files have questions with an empty answer, which EasyEdit leaves out too.
            if answers:
                yield Probe(probe.text("prompt"), f" {answers[0]}", kind, answers[0], answers[1:])
