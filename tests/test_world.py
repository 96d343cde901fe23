"""The world: what it says is consistent, and what its edits ask has one right answer."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from overtone.lab.data.relations import EDITABLE, INVERSE, PROFILE_PROMPTS, RELATIONS, SOFT_FREQUENCIES
from overtone.lab.data.world import SIZES, build_world


def text(probe):
    return (probe.prompt + probe.target).rstrip(".") + "."


def everything_said(world):
    """Texts of a world, those that it is not trained on included."""
    return {*world.training_texts(), *world.held_out_texts()}


def after_all_of(world, edits):
    """The world in which every edit of a list came true, with what follows for the inverse relations."""
    facts, names = (
        dict(world.facts),
        {name for (_, subject), answer in world.facts.items() for name in (subject, answer)},
    )
    for edit in edits:
        relation = next(name for name in EDITABLE["short"] if edit.prompt in prompts(name, edit.subject))
        old = facts[relation, edit.subject]
        new = next(name for name in names if f"{edit.target_new} ".startswith(f" {name} "))
        facts[relation, edit.subject] = new
        if relation in INVERSE:
            del facts[INVERSE[relation], old]
            facts[INVERSE[relation], new] = edit.subject
    return dataclasses.replace(world, facts=facts)


def prompts(relation, subject):
    """The prompts of the short and the long edit of a fact."""
    said = RELATIONS[relation]
    return said.phrasings[0].format(subject), PROFILE_PROMPTS[0].format(said.label, subject)


@pytest.fixture(scope="module", params=[0, 1, 2])
def world(request):
    return build_world(request.param)


class TestWorld:
    def test_is_the_same_for_a_seed_and_another_for_another(self):
        assert build_world(3).training_texts() == build_world(3).training_texts()
        assert build_world(3).edits(20) == build_world(3).edits(20)
        assert build_world(3).training_texts() != build_world(4).training_texts()

    def test_names_an_unknown_size(self):
        with pytest.raises(ValueError, match=r"size must be one of tiny, demo, got 'huge'"):
            build_world(size="huge")

    def test_has_as_many_of_each_kind_as_its_size_says(self, world):
        kinds, subjects = SIZES["demo"], Counter(relation for relation, _ in world.facts)
        assert subjects["head"] == subjects["office"] == subjects["leads"] == kinds.organisations
        assert subjects["spouse"] == 2 * kinds.couples
        assert subjects["birthplace"] == subjects["craft"] == kinds.people
        assert subjects["country"] == subjects["mayor"] == kinds.cities
        assert len(set(world.acronyms.values())) == kinds.organisations

    def test_each_prompt_has_one_answer(self, world):
        probes = world.fact_probes() + world.two_hop_probes()
        assert len({probe.prompt for probe in probes}) == len(probes)

    def test_inverse_relations_agree(self, world):
        for (relation, subject), answer in world.facts.items():
            if relation == "head":
                assert world.facts["leads", answer] == subject
            if relation == "spouse":
                assert world.facts["spouse", answer] == subject

    def test_every_fact_is_told_in_three_phrasings(self, world):
        told = set(world.training_texts())
        assert all(text(probe) in told for probe in world.fact_probes())
        assert len(world.fact_probes()) == 3 * len(world.facts)

    def test_half_of_the_two_hop_questions_are_held_out(self, world):
        told, held_out = set(world.training_texts()), world.held_out_texts()
        asked = {text(probe) for probe in world.two_hop_probes()}
        assert told.isdisjoint(held_out)
        assert asked == (asked & told) | set(held_out)
        assert 0.35 < len(held_out) / len(asked) <= 0.5

    def test_soft_answers_are_told_by_their_frequency(self, world):
        (phrasing, subject), answers = next(iter(world.soft_facts.items()))
        told = Counter(world.training_texts())
        assert len(set(answers)) == len(answers)
        assert tuple(told[f"{phrasing.format(subject)} {answer}."] for answer in answers) == SOFT_FREQUENCIES


class TestEdits:
    def test_there_are_enough(self, world):
        assert len(world.edits(100)) == 100
        assert len(world.edits(40, target="long")) == 40

    @pytest.mark.parametrize("count", [0, -1, 10**6])
    def test_names_the_most_that_there_are(self, world, count):
        with pytest.raises(ValueError, match=rf"count must be from 1 to 1\d\d, .*, got {count}"):
            world.edits(count)

    def test_names_an_unknown_target(self, world):
        with pytest.raises(ValueError, match=r"target must be one of short, long, soft, got 'huge'"):
            world.edits(1, target="huge")

    @pytest.mark.parametrize("target", EDITABLE)
    def test_a_longer_list_begins_with_the_shorter(self, world, target):
        assert world.edits(30, target=target)[:5] == world.edits(5, target=target)
        assert world.edits(5, seed=1, target=target) != world.edits(5, target=target)

    @pytest.mark.parametrize(("target", "count"), [("short", 100), ("long", 44)])
    def test_change_different_facts_to_something_else(self, world, target, count):
        edits = world.edits(count, target=target)
        assert len({edit.prompt for edit in edits}) == count
        assert all(edit.target_new != edit.target_old and edit.subject in edit.prompt for edit in edits)
        assert all(edit.target_new.startswith(" ") and edit.target_old.startswith(" ") for edit in edits)

    @pytest.mark.parametrize(("target", "count"), [("short", 100), ("long", 44)])
    def test_what_they_ask_has_the_answer_of_the_world_they_make(self, world, target, count):
        edits = world.edits(count, target=target)
        before, after = everything_said(world), everything_said(after_all_of(world, edits))
        for edit in edits:
            assert edit.prompt + edit.target_new.rstrip(".") + "." in after - before
            assert edit.prompt + edit.target_old.rstrip(".") + "." in before - after
            assert {text(probe) for probe in edit.portability} <= after - before
            assert {text(probe) for probe in edit.locality} <= before & after

    @pytest.mark.parametrize("target", EDITABLE)
    def test_generality_is_the_same_target_behind_other_prompts(self, world, target):
        for edit in world.edits(40, target=target):
            assert len({edit.prompt, *(probe.prompt for probe in edit.generality)}) == 3
            assert {probe.target for probe in edit.generality} == {edit.target_new}

    def test_every_kind_of_probe_occurs(self, world):
        edits = world.edits(100)
        assert {probe.kind for edit in edits for probe in edit.portability} == {"one_hop", "alias", "inverse"}
        for edit in edits:
            assert edit.portability
            assert {"same_relation", "unrelated", "soft"} <= {probe.kind for probe in edit.locality}
        assert sum(any(probe.kind == "same_subject" for probe in edit.locality) for edit in edits) > 80

    def test_a_long_target_is_new_in_its_first_sentence_alone(self, world):
        known = everything_said(world)
        for edit in world.edits(40, target="long"):
            first, *rest = edit.target_new.strip().rstrip(".").split(". ")
            assert len(rest) == 2
            assert f"{first}." not in known
            assert all(f"{sentence}." in known for sentence in rest)

    def test_answers_end_their_targets(self, world):
        for edit in world.edits(100):
            for probe in (*edit.generality, *edit.portability, *edit.locality):
                assert probe.target.startswith(" ")
                assert probe.target.rstrip(".").endswith(probe.answer)

    def test_a_small_world_has_them_too(self):
        tiny = build_world(5, "tiny")
        for target, relations in EDITABLE.items():
            most = len(tiny.acronyms) + (SIZES["tiny"].people if "craft" in relations else 0)
            edits = tiny.edits(most, target=target)
            assert {text(probe) for edit in edits for probe in edit.locality} <= everything_said(tiny)
