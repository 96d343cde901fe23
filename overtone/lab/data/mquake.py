"""MQuAKE as a corpus: chains of four facts that are edited together, and questions over one fact and over the chain.

File format: `princeton-nlp/MQuAKE`, MIT licence (Zhong et al., 2023, arXiv 2305.14795).
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from overtone.lab.data.edit import Edit, Probe, Question
from overtone.lab.data.prompts import MULTI_HOP_PROMPT, SINGLE_HOP_PROMPT, chain_of_thought, short_answer
from overtone.lab.data.published import Record, read_records, sample, take
from overtone.lab.data.recipe import Recipe, adapted

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Hop:
    """A fact as a sentence and as a question; ``answers`` begins with its object, its aliases follow."""

    cloze: str
    question: str
    answers: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """The cloze with its object, without a full stop."""
        return f"{self.cloze} {self.answers[0]}"


@dataclass(frozen=True)
class Case:
    """One record.

    Attributes:
        subject: of the first fact that is edited.
        rewrites: (before, after) of each fact that is edited.
        questions: wordings of one question over the chain.
        chain: the facts from the question to its answer, before the edit.
        new_chain: the same after the edit; some of its facts may be unedited.
        answers: of the questions before the edit, with aliases.
        new_answers: the same after it.
    """

    subject: str
    rewrites: tuple[tuple[Hop, Hop], ...]
    questions: tuple[str, ...]
    chain: tuple[Hop, ...]
    new_chain: tuple[Hop, ...]
    answers: tuple[str, ...]
    new_answers: tuple[str, ...]


class MQuAKECorpus:
    """Cases of an MQuAKE file, and the texts that a small model learns of them.

    It learns every fact before the edits, also those of the edited chains that no case edits, as a sentence and as a
    question, and half of the unedited chains of thought. So that it learns to go from fact to fact, and not these few
    chains by heart, it also learns half of the questions over two facts that can be said with the file's own:
    'Who is the director of the answer to "Who performed Hey Jude?"?'. Some of all questions stand behind their prompt.

    Even so a model this small follows few chains that it was not told (see ``"chains held out"`` and ``"two hops held
    out"`` of its knowledge), and an edited chain is one of these. Its multi-hop answers are near the floor; its
    single-hop answers are not.
    """

    knowledge_needed: Mapping[str, float] = {"facts": 0.5}

    def __init__(self, cases: list[Case], *, seed: int) -> None:
        """Take the cases; the seed chooses the chains that are told, and what locality asks."""
        self._cases = cases
        self._seed = seed
        self._told, self._held_out = _halves(cases, random.Random(f"chains {seed}"))
        edited = {before.cloze for case in cases for before, _ in case.rewrites}
        facts: dict[str, Hop] = {}
        for case in cases:
            for hop in (*case.chain, *(before for before, _ in case.rewrites)):
                facts.setdefault(hop.cloze, hop)
        for case in cases:
            for hop in case.new_chain:
                if hop.cloze not in edited:
                    facts.setdefault(hop.cloze, hop)
        self._facts = list(facts.values())
        links = [
            (first, second)
            for first in self._facts
            for second in self._facts
            if first is not second and _as_words(first.answers[0]).search(second.question)
        ]
        self._told_links, self._held_out_links = _halves(links, random.Random(f"links {seed}"))
        self._kept = [hop for hop in self._facts if hop.cloze not in edited]

    def recipe(self, arch: str) -> Recipe:
        """Blocks that hold a prompt, its question and the answer."""
        return adapted(MQUAKE_RECIPE, arch)

    def training_texts(self) -> list[str]:
        """Facts and half of the chains, some of them behind the paper's prompts."""
        rng = random.Random(f"prompts {self._seed}")
        texts = []
        for hop in self._facts:
            texts += [_cloze(hop).text, _asked(hop).text]
            if rng.random() < PROMPTED:
                texts.append(SINGLE_HOP_PROMPT + _asked(hop).text)
        chains = [probe for case in self._told for probe in _chains(case)]
        for probe in (*chains, *(_nested(*link) for link in self._told_links)):
            texts += [probe.text]
            if rng.random() < PROMPTED:
                texts.append(MULTI_HOP_PROMPT + probe.text)
        return texts

    def held_out_texts(self) -> list[str]:
        """The other half of the chains and of the questions over two facts; the facts were told."""
        chains = [_chains(case)[0] for case in self._held_out]
        return [probe.text for probe in (*chains, *(_nested(*link) for link in self._held_out_links))]

    def knowledge_probes(self) -> dict[str, list[Probe]]:
        """Facts as sentences, and facts and chains asked in the paper's prompts, before the edits."""
        groups = {
            "facts": [_cloze(hop) for hop in self._facts],
            "single hops": [_prompted(_asked(hop), SINGLE_HOP_PROMPT) for hop in self._facts],
            "two hops told": [_prompted(_nested(*link), MULTI_HOP_PROMPT) for link in self._told_links],
            "two hops held out": [_prompted(_nested(*link), MULTI_HOP_PROMPT) for link in self._held_out_links],
            "chains told": [_prompted(probe, MULTI_HOP_PROMPT) for case in self._told for probe in _chains(case)],
            "chains held out": [
                _prompted(probe, MULTI_HOP_PROMPT) for case in self._held_out for probe in _chains(case)
            ],
        }
        return {title: probes for title, probes in groups.items() if probes}

    def edits(self, count: int, *, seed: int) -> list[Edit]:
        """The cases that do not change a fact to something else than a case before them."""
        chosen: list[Case] = []
        changed: dict[str, str] = {}
        for case in take(self._cases, len(self._cases), seed=seed, what="cases"):
            changes = {after.cloze: after.answers[0] for _, after in case.rewrites}
            if all(changed.get(cloze, answer) == answer for cloze, answer in changes.items()):
                changed |= changes
                chosen.append(case)
        if not 1 <= count <= len(chosen):
            raise ValueError(f"count must be from 1 to {len(chosen)}, the mquake cases that agree, got {count}")
        rng = random.Random(f"locality {self._seed} {seed}")
        return [self._edit(case, rng) for case in chosen[:count]]

    def _edit(self, case: Case, rng: random.Random) -> Edit:
        (before, after), *others = case.rewrites
        kept = rng.sample(self._kept, min(6, len(self._kept)))
        return Edit(
            subject=case.subject,
            prompt=after.cloze,
            target_new=f" {after.answers[0]}",
            target_old=f" {before.answers[0]}",
            generality=tuple(_asked(new) for _, new in case.rewrites),
            portability=(_chains_to(case.questions, case.new_chain, case.new_answers)[0],),
            locality=tuple(_cloze(hop, "unrelated") for hop in kept),
            also=tuple((new.cloze, f" {new.answers[0]}") for _, new in others),
            questions=tuple(_questions(case)),
        )


MQUAKE_RECIPE = Recipe(vocabulary=800, steps=1600, blocks=3, block_length=340)
"""A block holds the multi-hop prompt, a question and its chain of thought."""

PROMPTED = 0.3
"""The share of questions that are also told behind their prompt."""


def open_mquake(path: Path, *, seed: int, size: int = 100) -> MQuAKECorpus:
    """The cases of an MQuAKE file.

    Args:
        path: a file of ``princeton-nlp/MQuAKE`` or a selection of one.
        seed: of the choice of cases, of the chains that are told, and of locality probes.
        size: how many cases.

    Raises:
        ValueError: the file is not as published, or has fewer cases.
        OSError: it cannot be read.
    """
    fields = ("requested_rewrite", "questions", "answer", "new_answer", "single_hops", "new_single_hops")
    records = sample(read_records(path, fields), size, seed=seed, path=path)
    return MQuAKECorpus([_case(record) for record in records], seed=seed)


def _case(record: Record) -> Case:
    new_chain = tuple(_hop(hop) for hop in record.records("new_single_hops"))
    rewrites = record.records("requested_rewrite")
    return Case(
        subject=rewrites[0].text("subject"),
        rewrites=tuple(_rewrite(rewrite, new_chain) for rewrite in rewrites),
        questions=record.answers("questions"),
        chain=tuple(_hop(hop) for hop in record.records("single_hops")),
        new_chain=new_chain,
        answers=_with_aliases(record, "answer"),
        new_answers=_with_aliases(record, "new_answer"),
    )


def _rewrite(rewrite: Record, new_chain: tuple[Hop, ...]) -> tuple[Hop, Hop]:
    if "{}" not in rewrite.text("prompt"):
        raise rewrite.fault("prompt", f"expected a {{}} for the subject, got {rewrite.text('prompt')!r}")
    cloze, question = rewrite.text("prompt").replace("{}", rewrite.text("subject")), rewrite.text("question")
    before, after = (
        Hop(cloze, question, (rewrite.record(field).text("str"),)) for field in ("target_true", "target_new")
    )
    in_chain = [hop for hop in new_chain if hop.sentence == after.sentence]
    # The chain's own hop has the aliases.
    return before, in_chain[0] if in_chain else after


def _hop(hop: Record) -> Hop:
    return Hop(hop.text("cloze"), hop.text("question"), _with_aliases(hop, "answer"))


def _with_aliases(record: Record, field: str) -> tuple[str, ...]:
    aliases = record.texts(f"{field}_alias") if f"{field}_alias" in record else ()
    return tuple(dict.fromkeys((record.text(field), *aliases)))


def _questions(case: Case) -> list[Question]:
    old = {after.cloze: before.answers for before, after in case.rewrites}
    single = [Question("single-hop", (hop.question,), hop.answers, old.get(hop.cloze, ())) for hop in case.new_chain]
    return [*single, Question("multi-hop", case.questions, case.new_answers, case.answers)]


def _cloze(hop: Hop, kind: str = "fact") -> Probe:
    return Probe(hop.cloze, f" {hop.answers[0]}", kind, hop.answers[0])


def _asked(hop: Hop) -> Probe:
    return Probe(short_answer(hop.question), f" {hop.answers[0]}", "single_hop", hop.answers[0])


def _chains(case: Case) -> list[Probe]:
    return _chains_to(case.questions, case.chain, case.answers)


def _chains_to(questions: tuple[str, ...], chain: tuple[Hop, ...], answers: tuple[str, ...]) -> list[Probe]:
    thought = chain_of_thought(((hop.question, hop.sentence) for hop in chain), answers[0])
    return [Probe(f"Question: {question}", thought, "multi_hop", answers[0]) for question in questions]


def _nested(first: Hop, second: Hop) -> Probe:
    """A question over two facts that says itself how it falls into two."""
    description = f'the answer to "{first.question}"'
    question = _as_words(first.answers[0]).sub(lambda _: description, second.question)
    return _chains_to((question,), (first, second), second.answers)[0]


def _as_words(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(name)}(?!\w)")


def _halves(items: list[_Item], rng: random.Random) -> tuple[list[_Item], list[_Item]]:
    order = rng.sample(items, len(items))
    half = (len(order) + 1) // 2
    return order[:half], order[half:]


def _prompted(probe: Probe, prompt: str) -> Probe:
    return Probe(prompt + probe.prompt, probe.target, probe.kind, probe.answer)
