"""KnowEdit's files as corpora: six published ZsRE records, invented WikiBio ones, and faults in both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from overtone.lab.data.knowedit import open_wikibio, open_zsre

ZSRE = Path(__file__).parent / "fixtures" / "zsre.json"


def biography(name: str, sentence: str, **changes):
    facts = [
        {"prompt": f"The place of birth of {name} is", "ground_truth": [["Rill", "Rill Town"]]},
        {"prompt": f"{name} place of birth", "ground_truth": ["Rill"]},
    ]
    record = {
        "text": f" This is a Wikipedia passage about {name}. {name} was a baker. ",
        "labels": sentence,
        "concept": name,
        "locality": {"Relation_Specificity": facts},
    }
    return {**record, **changes}


PEOPLE = [
    biography("ann bell", "She baked rye."),
    biography("cy dorn", "He baked oats."),
    biography("eve fay", "She sold it."),
    biography("gus hill", "He sold none.", locality={}),
]


def write(tmp_path, records):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="module")
def zsre():
    return open_zsre(ZSRE, seed=0, size=6)


@pytest.fixture(scope="module")
def by_subject(zsre):
    return {edit.subject: edit for edit in zsre.edits(5, seed=0)}


class TestZsRE:
    def test_an_edit_is_the_record(self, by_subject):
        edit = by_subject["Epaspidoceras"]
        assert edit.prompt == "Which family does Epaspidoceras belong to?"
        assert (edit.target_new, edit.target_old) == (" Noctuidae", " Aspidoceratidae")
        assert [(probe.prompt, probe.target) for probe in edit.generality] == [
            ("What family are Epaspidoceras?", " Noctuidae")
        ]
        assert [(probe.kind, probe.target) for probe in edit.portability] == [("Reasoning", " Owlet moths")]
        assert [probe.prompt for probe in edit.locality] == [
            "The taxon rank of Epaspidoceras is",
            "Epaspidoceras taxon rank",
        ]

    def test_an_edit_to_what_is_known_already_is_none(self, zsre, by_subject):
        assert "USA-199" not in by_subject
        with pytest.raises(
            ValueError, match="count must be from 1 to 5, the records of zsre in use that change an answer"
        ):
            zsre.edits(6, seed=0)

    def test_prompts_and_targets_meet_at_one_space(self, by_subject):
        for edit in by_subject.values():
            pairs = [(edit.prompt, edit.target_new), (edit.prompt, edit.target_old)]
            pairs += [(probe.prompt, probe.target) for probe in (*edit.generality, *edit.portability, *edit.locality)]
            for prompt, target in pairs:
                assert prompt == prompt.strip()
                assert target == f" {target.strip()}"

    def test_the_first_of_several_old_answers_is_taken(self, by_subject):
        assert by_subject["Petteri Nummelin"].target_old == " Minnesota Wild"

    def test_the_facts_before_the_edits_are_told(self, zsre):
        texts = zsre.training_texts()
        for text in (
            "Which family does Epaspidoceras belong to? Aspidoceratidae.",
            "What family are Epaspidoceras? Aspidoceratidae.",
            # Back from the old object, and under another name.
            "Who is the son of Wang Yanjun? Wang Jipeng.",
            "What is the constellation of 3 Mon? Monoceros.",
        ):
            assert text in texts
        assert not [text for text in texts if "Noctuidae" in text or "Owlet" in text]

    def test_a_locality_fact_is_told_in_one_phrasing_at_least(self, zsre):
        texts, held_out = zsre.training_texts(), zsre.held_out_texts()
        assert held_out
        assert not set(held_out) & set(texts)
        for edit in zsre.edits(5, seed=0):
            assert any(f"{probe.prompt}{probe.target}." in texts for probe in edit.locality)

    def test_knowledge_covers_what_is_told_and_held_out(self, zsre):
        probes = zsre.knowledge_probes()
        sizes = {title: len(group) for title, group in probes.items()}
        assert (sizes["facts"], sizes["rephrasings"], sizes["consequences"]) == (6, 6, 2)
        assert sizes["locality facts"] + sizes["locality facts, held out"] == 12

    def test_a_longer_list_begins_with_the_shorter(self, zsre):
        assert zsre.edits(5, seed=3)[:2] == zsre.edits(2, seed=3)
        assert len({zsre.edits(1, seed=seed)[0].subject for seed in range(9)}) > 1

    def test_a_seed_chooses_the_records(self):
        def subjects(seed):
            return {probe.answer for probe in open_zsre(ZSRE, seed=seed, size=2).knowledge_probes()["facts"]}

        assert len({frozenset(subjects(seed)) for seed in range(6)}) > 1

    def test_no_more_records_than_there_are(self):
        with pytest.raises(ValueError, match=r"size must be from 1 to 6, the records of .*zsre.json, got 7"):
            open_zsre(ZSRE, seed=0, size=7)

    def test_a_record_without_portability_and_locality_has_no_such_probes(self, tmp_path):
        bare = {
            name: value
            for name, value in json.loads(ZSRE.read_text())[0].items()
            if name not in ("portability", "locality")
        }
        (edit,) = open_zsre(write(tmp_path, [bare]), seed=0, size=1).edits(1, seed=0)
        assert (edit.portability, edit.locality) == ((), ())

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("target_new", " ", r"record 0, field 'target_new': expected a text, got ' '"),
            ("target_new", None, r"record 0, field 'target_new': missing or empty"),
            ("ground_truth", [["", " "]], r"record 0, field 'ground_truth': expected at least one answer, got none"),
            ("ground_truth", [1992], r"record 0, field 'ground_truth': expected texts, got 1992"),
            ("portability", [1], r"record 0, field 'portability' must be an object, got \[1\]"),
            ("locality", {"Other": "yes"}, r"field 'locality', field 'Other': expected a list, got 'yes'"),
            ("locality", {"Other": [{"prompt": "x"}]}, r"field 'Other', item 0, field 'ground_truth': missing"),
        ],
    )
    def test_a_fault_is_told_by_file_record_and_field(self, tmp_path, field, value, message):
        path = write(tmp_path, [{**json.loads(ZSRE.read_text())[0], field: value}])
        with pytest.raises(ValueError, match=message) as caught:
            open_zsre(path, seed=0, size=1)
        assert str(caught.value).startswith(f"{path}, ")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "is not JSON"),
            ('{"a": 1}', "must hold a list of records"),
            ("[]", "got []"),
            ("[3]", "record 0 must be an object"),
        ],
    )
    def test_another_file_is_refused(self, tmp_path, content, message):
        path = tmp_path / "other.json"
        path.write_text(content)
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            open_zsre(path, seed=0, size=1)
        assert message in str(caught.value)


class TestWikiBio:
    @pytest.fixture
    def wikibio(self, tmp_path):
        return open_wikibio(write(tmp_path, PEOPLE), seed=0, size=4)

    def test_an_edit_puts_the_next_sentence_in_another_ones_place(self, wikibio):
        edits = wikibio.edits(4, seed=0)
        sentences = {f" {person['labels']}" for person in PEOPLE}
        assert {edit.target_new for edit in edits} == {edit.target_old for edit in edits} == sentences
        for edit in edits:
            assert edit.prompt.startswith(f"This is a Wikipedia passage about {edit.subject}.")
            assert edit.target_new != edit.target_old
            assert f"{edit.prompt}{edit.target_old}" in wikibio.training_texts()
            assert f"{edit.prompt}{edit.target_new}" not in wikibio.training_texts()
            assert (edit.generality, edit.portability) == ((), ())

    def test_the_first_of_nested_answers_is_the_locality_fact(self, wikibio):
        edit = next(edit for edit in wikibio.edits(4, seed=0) if edit.subject == "ann bell")
        assert [probe.answer for probe in edit.locality] == ["Rill", "Rill"]

    def test_knowledge_has_no_groups_without_questions(self, wikibio):
        assert {"rephrasings", "consequences"}.isdisjoint(wikibio.knowledge_probes())
