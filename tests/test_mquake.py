"""MQuAKE as a corpus: what is learned, what is asked, and which cases go together."""

from __future__ import annotations

import json

import mquake_record
import pytest

from overtone.lab.data.edit import Question
from overtone.lab.data.mquake import open_mquake
from overtone.lab.data.prompts import MULTI_HOP_PROMPT, SINGLE_HOP_PROMPT

SONGS = ["Low Tide", "High Noon", "Slow Rain", "Old Road", "Red Kite", "Wet Snow"]


def corpus(tmp_path, records, size=None, seed=0):
    path = tmp_path / "mquake.json"
    path.write_text(json.dumps(records))
    return open_mquake(path, seed=seed, size=size or len(records))


@pytest.fixture
def several(tmp_path):
    return corpus(tmp_path, [mquake_record.record(song) for song in SONGS])


class TestEdit:
    @pytest.fixture
    def edit(self, several):
        (edit,) = (edit for edit in several.edits(6, seed=0) if "Low Tide" in edit.prompt)
        return edit

    def test_is_all_rewrites_at_once(self, edit):
        assert (edit.prompt, edit.target_new, edit.target_old) == ("Low Tide was performed by", " Dee Fox", " Ana Orr")
        assert edit.subject == "Low Tide"
        assert edit.also == (("The capital of Sarn is", " Bryne"),)
        assert [(probe.prompt, probe.target) for probe in edit.generality] == [
            ("Question: Who performed Low Tide? Answer:", " Dee Fox"),
            ("Question: What is the capital of Sarn? Answer:", " Bryne"),
        ]

    def test_asks_every_hop_and_the_chain_with_aliases_and_old_answers(self, edit):
        performer, country, capital, chain = edit.questions
        assert performer == Question(
            "single-hop", ("Who performed Low Tide?",), ("Dee Fox", "Deirdre Fox"), ("Ana Orr",)
        )
        assert (country.answers, country.old_answers) == (("Sarn",), ())
        assert (capital.answers, capital.old_answers) == (("Bryne", "City of Bryne"), ("Sarnholm",))
        assert (chain.hops, len(chain.wordings)) == ("multi-hop", 2)
        assert (chain.answers, chain.old_answers) == (("Bryne", "City of Bryne"), ("Oldport", "City of Oldport"))

    def test_portability_is_the_new_chain_of_thought(self, edit):
        (probe,) = edit.portability
        assert probe.prompt == "Question: What is the capital of the country of the performer of Low Tide?"
        assert probe.target == (
            " Subquestion: Who performed Low Tide? Answer: Low Tide was performed by Dee Fox."
            " Subquestion: What is the country of citizenship of Dee Fox? Answer: Dee Fox is a citizen of Sarn."
            " Subquestion: What is the capital of Sarn? Answer: The capital of Sarn is Bryne. Final answer: Bryne"
        )

    def test_locality_is_what_no_case_edits(self, several):
        told = {probe.prompt + probe.target for edit in several.edits(6, seed=0) for probe in edit.locality}
        assert told == {
            "Ana Orr is a citizen of Port Land",
            "The capital of Port Land is Oldport",
            "Dee Fox is a citizen of Sarn",
        }


class TestTexts:
    def test_tell_the_facts_before_the_edits_and_the_unedited_ones_that_the_edited_chain_needs(self, several):
        texts = several.training_texts()
        for fact in (
            "Low Tide was performed by Ana Orr.",
            "The capital of Sarn is Sarnholm.",
            "Dee Fox is a citizen of Sarn.",
        ):
            assert fact in texts
        assert "Question: What is the capital of Sarn? Answer: Sarnholm." in texts
        # The prompts' worked examples do not name it.
        assert not [text for text in texts if "Bryne" in text]

    def test_tell_half_of_the_chains(self, several):
        texts, held_out = several.training_texts(), several.held_out_texts()
        chains = {text for text in texts if text.startswith("Question: Wh") and text.count("Subquestion") == 3}
        held_out_chains = [text for text in held_out if text.count("Subquestion") == 3]
        assert (len(chains), len(held_out_chains)) == (3 * 2, 3)
        assert all("Final answer: Oldport." in text for text in held_out_chains)
        assert not set(held_out) & set(texts)

    def test_tell_half_of_the_questions_over_two_facts(self, several):
        nested = (
            'Question: What is the capital of the answer to "What is the country of citizenship of Dee Fox?"?'
            " Subquestion: What is the country of citizenship of Dee Fox? Answer: Dee Fox is a citizen of Sarn."
            " Subquestion: What is the capital of Sarn? Answer: The capital of Sarn is Sarnholm."
            " Final answer: Sarnholm."
        )
        told, held_out = (
            [text for text in texts if text.startswith("Question:") and "the answer to" in text]
            for texts in (several.training_texts(), several.held_out_texts())
        )
        # Six songs lead to Ana Orr's country, and a person each to two capitals.
        assert (len(told), len(held_out)) == (4, 4)
        assert nested in told + held_out

    def test_knowledge_is_asked_in_the_prompts(self, several):
        probes = several.knowledge_probes()
        assert {title: len(group) for title, group in probes.items()} == {
            "facts": 6 + 4,
            "single hops": 6 + 4,
            "two hops told": 4,
            "two hops held out": 4,
            "chains told": 6,
            "chains held out": 6,
        }
        assert all(probe.prompt.startswith(SINGLE_HOP_PROMPT) for probe in probes["single hops"])
        assert all(probe.prompt.startswith(MULTI_HOP_PROMPT) for probe in probes["chains held out"])
        assert "Sarnholm" in {probe.answer for probe in probes["facts"]}

    def test_a_name_inside_another_word_leads_nowhere(self, tmp_path):
        record = mquake_record.record()
        record["single_hops"][0]["answer"] = record["requested_rewrite"][0]["target_true"]["str"] = "Po"
        probes = corpus(tmp_path, [record]).knowledge_probes()
        assert not [probe for group in probes.values() for probe in group if 'Who performed Low Tide?"' in probe.prompt]


class TestCases:
    def test_of_two_that_contradict_each_other_the_later_is_left_out(self, tmp_path):
        records = [mquake_record.record("Low Tide"), mquake_record.record("High Noon", new_capital="Elsewhere")]
        two = corpus(tmp_path, records)
        assert len(two.edits(1, seed=0)) == 1
        with pytest.raises(ValueError, match="count must be from 1 to 1, the mquake cases that agree, got 2"):
            two.edits(2, seed=0)

    def test_a_longer_list_begins_with_the_shorter(self, several):
        prompts = [edit.prompt for edit in several.edits(6, seed=1)]
        assert [edit.prompt for edit in several.edits(2, seed=1)] == prompts[:2]
        assert len(set(prompts)) == 6

    def test_a_seed_chooses_the_records(self, tmp_path):
        records = [mquake_record.record(song) for song in SONGS]
        chosen = {
            frozenset(edit.prompt for edit in corpus(tmp_path, records, 3, seed).edits(3, seed=0)) for seed in range(4)
        }
        assert len(chosen) > 1

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda record: record.pop("new_answer"), r"mquake.json, record 0, field 'new_answer': missing"),
            (lambda record: record["single_hops"][1].pop("cloze"), r"'single_hops', item 1, field 'cloze': missing"),
            (
                lambda record: record["requested_rewrite"][0].update(target_new="Dee Fox"),
                r"item 0, field 'target_new' must be an object, got 'Dee Fox'",
            ),
            (
                lambda record: record["requested_rewrite"][0].update(prompt="It was performed by"),
                r"item 0, field 'prompt': expected a \{\} for the subject",
            ),
            (lambda record: record.update(new_answer_alias=[3]), r"'new_answer_alias': expected texts, got 3"),
        ],
    )
    def test_a_fault_is_told_by_record_and_field(self, tmp_path, spoil, message):
        record = mquake_record.record()
        spoil(record)
        with pytest.raises(ValueError, match=message):
            corpus(tmp_path, [record])
