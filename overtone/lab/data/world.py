"""A seeded world of invented facts: what a small language model can know completely, and edits of it.

People, cities, organisations and crafts stand in relations to each other. Every fact has three phrasings, organisations
have acronyms, leading and being led are inverse, questions over two relations are answered by chain of thought, and
some relations have several true answers with different frequencies. Nothing here needs torch.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from overtone.lab.data import names
from overtone.lab.data.edit import Edit, Probe
from overtone.lab.data.relations import (
    CRAFTS,
    EDITABLE,
    INVERSE,
    PROFILE_PROMPTS,
    RELATIONS,
    SOFT_FREQUENCIES,
    SOFT_RELATIONS,
)

Fact = tuple[str, str]
"""A relation and its subject: what has an object."""


@dataclass(frozen=True)
class Size:
    """How many of each kind a world holds."""

    people: int
    couples: int
    cities: int
    countries: int
    organisations: int


SIZES: Mapping[str, Size] = {
    "tiny": Size(people=12, couples=3, cities=5, countries=2, organisations=6),
    "demo": Size(people=72, couples=24, cities=24, countries=6, organisations=44),
}


@dataclass(frozen=True)
class World:
    """The facts of a world; :func:`build_world` makes one.

    Args:
        seed: the seed that it was built from.
        facts: the object of each (relation, subject).
        soft_facts: for each (phrasing, subject) the answers, the most frequent first (see ``SOFT_FREQUENCIES``).
        acronyms: the alias of each organisation.
    """

    seed: int
    facts: Mapping[Fact, str] = field(repr=False)
    soft_facts: Mapping[Fact, tuple[str, ...]] = field(repr=False)
    acronyms: Mapping[str, str] = field(repr=False)

    def training_texts(self) -> list[str]:
        """Every text of the world; a text that is to be learned better is in the list more than once."""
        texts = [probe.text for probe in self.fact_probes()]
        texts += [f"{name} is known as {acronym}." for name, acronym in self.acronyms.items()]
        texts += [self._alias_probe(fact).text for fact in self.facts if fact[1] in self.acronyms]
        texts += [probe.text for probe in self._two_hop_split()[0]]
        for (phrasing, subject), answers in self.soft_facts.items():
            for answer, frequency in zip(answers, SOFT_FREQUENCIES, strict=True):
                texts += [f"{phrasing.format(subject)} {answer}."] * frequency
        rng = random.Random(f"profiles {self.seed}")
        for fact in self._profiled():
            for prompt in (PROFILE_PROMPTS[0], rng.choice(PROFILE_PROMPTS[1:])):
                texts.append(self._profile_probe(fact, prompt).text)
        return texts

    def held_out_texts(self) -> list[str]:
        """True texts that are not among the training texts: the other half of the two-hop chains."""
        return [probe.text for probe in self._two_hop_split()[1]]

    def fact_probes(self) -> list[Probe]:
        """Every fact with a single answer, in all its phrasings."""
        return [
            self._fact_probe(fact, kind="fact", phrasing=phrasing)
            for fact in self.facts
            for phrasing in range(len(RELATIONS[fact[0]].phrasings))
        ]

    def two_hop_probes(self) -> list[Probe]:
        """Every two-hop question, answered by chain of thought; half of them are not among the training texts."""
        return [self._two_hop_probe(fact, second) for fact in self.facts for second in self._second_hops(fact)]

    def edits(self, count: int, *, seed: int = 0, target: str = "short") -> list[Edit]:
        """Counterfactual edits of different facts, a longer list beginning with the shorter one.

        Args:
            count: how many.
            seed: chooses the facts, their new objects and the probes.
            target: ``"short"``, the new object alone; ``"long"``, three sentences of which only the new object's name
                is news; ``"soft"``, the new object alone, and only facts with several true answers to judge locality.

        Raises:
            ValueError: ``target`` is unknown, or the world does not have ``count`` such edits.
        """
        if target not in EDITABLE:
            raise ValueError(f"target must be one of {', '.join(EDITABLE)}, got {target!r}")
        changes = self._changes(random.Random(f"changes {self.seed} {seed} {target}"), EDITABLE[target])
        if not 1 <= count <= len(changes):
            raise ValueError(f"count must be from 1 to {len(changes)}, the {target} edits of this world, got {count}")
        touched = {fact for change in changes.items() for fact in self._touched(*change)}
        kept = {fact: None for fact in self.facts if fact not in touched}
        rng = random.Random(f"probes {self.seed} {seed} {target}")
        return [self._edit(fact, new, kept, rng, target) for fact, new in list(changes.items())[:count]]

    # ---- edits

    def _changes(self, rng: random.Random, relations: tuple[str, ...]) -> dict[Fact, str]:
        """At most one new object per subject; a new head leads nothing yet, a new spouse is single, each taken once."""
        people = [subject for relation, subject in self.facts if relation == "birthplace"]
        free = {
            "head": _shuffled([person for person in people if ("leads", person) not in self.facts], rng),
            "spouse": _shuffled([person for person in people if ("spouse", person) not in self.facts], rng),
        }
        objects = {name: sorted({self.facts[fact] for fact in self.facts if fact[0] == name}) for name in relations}
        divorced: set[str] = set()
        changes: dict[Fact, str] = {}
        for subject in _shuffled(dict.fromkeys(subject for _, subject in self.facts), rng):
            choices = [
                name
                for name in relations
                if (name, subject) in self.facts
                and free.get(name, objects[name])
                and not (name == "spouse" and subject in divorced)
            ]
            if not choices:
                continue
            fact = rng.choice(choices), subject
            if fact[0] in free:
                changes[fact] = free[fact[0]].pop()
            else:
                changes[fact] = rng.choice([other for other in objects[fact[0]] if other != self.facts[fact]])
            if fact[0] == "spouse":
                divorced.add(self.facts[fact])
        return changes

    def _touched(self, fact: Fact, new: str) -> tuple[Fact, ...]:
        """The facts that a change makes false or leaves open: itself and what is said of both objects in return."""
        inverse = INVERSE.get(fact[0])
        return (fact, (inverse, self.facts[fact]), (inverse, new)) if inverse else (fact,)

    def _edit(self, fact: Fact, new: str, kept: Collection[Fact], rng: random.Random, target: str) -> Edit:
        if target == "long":
            said = [self._profile_probe(fact, prompt, new=new) for prompt in PROFILE_PROMPTS]
            old = self._profile_probe(fact, PROFILE_PROMPTS[0]).target
        else:
            phrasings = range(len(RELATIONS[fact[0]].phrasings))
            said = [self._fact_probe(fact, kind="rephrase", phrasing=phrasing, new=new) for phrasing in phrasings]
            old = f" {self.facts[fact]}"
        return Edit(
            subject=fact[1],
            prompt=said[0].prompt,
            target_new=said[0].target,
            target_old=old,
            generality=tuple(said[1:]),
            portability=tuple(self._portability(fact, new, kept)),
            locality=tuple(
                self._soft_locality(fact, new, rng) if target == "soft" else self._locality(fact, kept, rng)
            ),
        )

    def _portability(self, fact: Fact, new: str, kept: Collection[Fact]) -> Iterator[Probe]:
        for second in RELATIONS[fact[0]].then:
            if (second, new) in kept:
                yield self._two_hop_probe(fact, second, new=new)
        if fact[1] in self.acronyms:
            yield self._alias_probe(fact, new=new)
        if fact[0] in INVERSE:
            yield self._fact_probe((INVERSE[fact[0]], new), kind="inverse", new=fact[1])

    def _locality(self, fact: Fact, kept: Collection[Fact], rng: random.Random) -> Iterator[Probe]:
        relation, subject = fact
        others = [other for other in kept if relation != other[0] and subject != other[1]]
        groups = {
            "same_relation": [other for other in kept if relation == other[0] and subject != other[1]],
            "same_subject": [other for other in kept if relation != other[0] and subject == other[1]],
            "unrelated": others,
        }
        for kind, facts in groups.items():
            for other in rng.sample(facts, min(2, len(facts))):
                yield self._fact_probe(other, kind=kind, phrasing=rng.randrange(3))
        first, second = rng.choice(
            [
                (other, second)
                for other in others
                for second in self._second_hops(other)
                if (second, self.facts[other]) in kept
            ]
        )
        yield replace(self._two_hop_probe(first, second), kind="unrelated")
        for soft_fact in rng.sample(list(self.soft_facts), 2):
            yield self._soft_probe(soft_fact, kind="soft")

    def _soft_locality(self, fact: Fact, new: str, rng: random.Random) -> Iterator[Probe]:
        """Of what is said of the old and the new object, and of others."""
        objects = self.facts[fact], new
        for kind, is_about_objects in (("soft_object", True), ("soft", False)):
            soft_facts = [told for told in self.soft_facts if (told[1] in objects) == is_about_objects]
            for soft_fact in rng.sample(soft_facts, min(6, len(soft_facts))):
                yield self._soft_probe(soft_fact, kind=kind)

    # ---- texts

    def _fact_probe(self, fact: Fact, *, kind: str, phrasing: int = 0, new: str | None = None) -> Probe:
        relation, subject = fact
        answer = new or self.facts[fact]
        return Probe(RELATIONS[relation].phrasings[phrasing].format(subject), f" {answer}", kind, answer)

    def _soft_probe(self, soft_fact: Fact, *, kind: str) -> Probe:
        phrasing, subject = soft_fact
        answer = self.soft_facts[soft_fact][0]
        return Probe(phrasing.format(subject), f" {answer}", kind, answer)

    def _alias_probe(self, fact: Fact, *, new: str | None = None) -> Probe:
        relation, subject = fact
        acronym = self.acronyms[subject]
        said = self._fact_probe(fact, kind="alias", new=new)
        return Probe(
            f"Question: what is the {RELATIONS[relation].label} of {acronym}? Answer:",
            f" {acronym} is {subject}. {said.prompt}{said.target}.",
            "alias",
            said.answer,
        )

    def _two_hop_probe(self, fact: Fact, second: str, *, new: str | None = None) -> Probe:
        relation, subject = fact
        first_hop = self._fact_probe(fact, kind="one_hop", new=new)
        second_hop = self._fact_probe((second, first_hop.answer), kind="one_hop")
        return Probe(
            f"Question: what is the {RELATIONS[second].label} of the {RELATIONS[relation].label} of {subject}? Answer:",
            f" {first_hop.prompt}{first_hop.target}. {second_hop.prompt}{second_hop.target}.",
            "one_hop",
            second_hop.answer,
        )

    def _profile_probe(self, fact: Fact, prompt: str, *, kind: str = "rephrase", new: str | None = None) -> Probe:
        relation, subject = fact
        answer = new or self.facts[fact]
        about = {name: self.facts[name, answer] for name in RELATIONS if (name, answer) in self.facts}
        sentences = " ".join(RELATIONS[relation].profile).format(answer, subject, **about)
        return Probe(prompt.format(RELATIONS[relation].label, subject), f" {sentences}", kind, sentences)

    # ---- which

    def _second_hops(self, fact: Fact) -> Iterator[str]:
        return (second for second in RELATIONS[fact[0]].then if (second, self.facts[fact]) in self.facts)

    def _two_hop_split(self) -> tuple[list[Probe], list[Probe]]:
        """Half of the questions about each subject (more where odd), and the rest."""
        rng = random.Random(f"two hops {self.seed}")
        by_subject: dict[str, list[Probe]] = {}
        for fact in self.facts:
            probes = [self._two_hop_probe(fact, second) for second in self._second_hops(fact)]
            by_subject.setdefault(fact[1], []).extend(probes)
        told, held_out = [], []
        for probes in by_subject.values():
            rng.shuffle(probes)
            half = (len(probes) + 1) // 2
            told += probes[:half]
            held_out += probes[half:]
        return told, held_out

    def _profiled(self) -> list[Fact]:
        return [fact for fact in self.facts if RELATIONS[fact[0]].profile]


def _shuffled(items: Iterable[str], rng: random.Random) -> list[str]:
    items = list(items)
    rng.shuffle(items)
    return items


def build_world(seed: int = 0, size: str = "demo") -> World:
    """The world of a seed.

    Args:
        seed: draws names and facts.
        size: one of ``SIZES``.

    Raises:
        ValueError: ``size`` is unknown.
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    kinds = SIZES[size]
    rng = random.Random(f"world {seed}")
    people = names.people(kinds.people, rng)
    cities = names.cities(kinds.cities, rng)
    countries = names.countries(kinds.countries, rng)
    acronyms = names.organisations(kinds.organisations, rng)

    facts: dict[Fact, str] = {}
    for organisation, head in zip(acronyms, rng.sample(people, len(acronyms)), strict=True):
        facts["head", organisation] = head
        facts["office", organisation] = rng.choice(cities)
        facts["leads", head] = organisation
    married = rng.sample(people, 2 * kinds.couples)
    for one, other in zip(married[::2], married[1::2], strict=True):
        facts["spouse", one] = other
        facts["spouse", other] = one
    for person in people:
        facts["birthplace", person] = rng.choice(cities)
        facts["craft", person] = rng.choice(list(CRAFTS))
    for city, mayor in zip(cities, rng.sample(people, len(cities)), strict=True):
        facts["country", city] = rng.choice(countries)
        facts["mayor", city] = mayor
    facts.update({("tool", craft): tool for craft, tool in CRAFTS.items()})

    soft_facts = {
        (phrasing, subject): tuple(rng.sample(answers, len(SOFT_FREQUENCIES)))
        for (phrasing, answers), subjects in zip(SOFT_RELATIONS.items(), (cities, CRAFTS), strict=True)
        for subject in subjects
    }
    return World(seed, facts, soft_facts, acronyms)
