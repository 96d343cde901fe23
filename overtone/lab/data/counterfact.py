"""CounterFact as a corpus: counterfactual edits, paraphrases of them, and the same relation of other subjects.

Data: Meng et al. 2022 (arXiv 2202.05262), `kmeng01/rome`, MIT licence. Locality asks what the edit must not change in
its neighbourhood: other subjects of which the old object is true.
"""

from __future__ import annotations

from pathlib import Path

from overtone.lab.data.edit import Edit, Probe
from overtone.lab.data.knowedit import KnowEditCase, KnowEditCorpus
from overtone.lab.data.published import Record, read_records, sample
from overtone.lab.data.recipe import Recipe

COUNTERFACT_RECIPE = Recipe(vocabulary=1500, steps=400)


def open_counterfact(path: Path, *, seed: int, size: int = 100) -> KnowEditCorpus:
    """The edits of a CounterFact file.

    Args:
        path: a file in ROME's format (``requested_rewrite``, ``paraphrase_prompts``, ``neighborhood_prompts``) or in
            the flat one (``prompt``, ``target_new``, ``ground_truth``, ``rephrase_prompt``, ``locality_prompt``).
        seed: of the choice of records.
        size: how many.

    Raises:
        ValueError: the file is neither, or has fewer records.
        OSError: it cannot be read.
    """
    records = sample(read_records(path, ()), size, seed=seed, path=path)
    cases = [
        KnowEditCase(_nested_edit(record) if "requested_rewrite" in record else _flat_edit(record), ())
        for record in records
    ]
    return KnowEditCorpus("counterfact", cases, COUNTERFACT_RECIPE, seed=seed)


def _nested_edit(record: Record) -> Edit:
    rewrite = record.record("requested_rewrite")
    subject, template = rewrite.text("subject"), rewrite.text("prompt")
    if "{}" not in template:
        raise rewrite.fault("prompt", f"expected a {{}} for the subject, got {template!r}")
    new, old = (rewrite.record(field).text("str") for field in ("target_new", "target_true"))
    return Edit(
        subject=subject,
        prompt=template.replace("{}", subject),
        target_new=f" {new}",
        target_old=f" {old}",
        generality=tuple(_probe(prompt, new, "paraphrase") for prompt in record.answers("paraphrase_prompts")),
        portability=(),
        locality=tuple(_probe(prompt, old, "neighbourhood") for prompt in record.answers("neighborhood_prompts")),
    )


def _flat_edit(record: Record) -> Edit:
    new = record.text("target_new")
    return Edit(
        subject=record.text("subject"),
        prompt=record.text("prompt"),
        target_new=f" {new}",
        target_old=f" {record.text('ground_truth')}",
        generality=(_probe(record.text("rephrase_prompt"), new, "paraphrase"),),
        portability=(),
        locality=(_probe(record.text("locality_prompt"), record.text("locality_ground_truth"), "neighbourhood"),),
    )


def _probe(prompt: str, answer: str, kind: str) -> Probe:
    return Probe(prompt, f" {answer}", kind, answer)
