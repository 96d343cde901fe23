"""CounterFact in both its formats and KnowEdit's WikiData files: what becomes of a record, and how faults are told."""

from __future__ import annotations

import copy
import json
from functools import partial

import pytest

from overtone.lab.data.counterfact import open_counterfact
from overtone.lab.data.wikidata import open_wikidata

open_wikidata_recent = partial(open_wikidata, "recent")
open_wikidata_counterfact = partial(open_wikidata, "counterfact")

FLAT = {
    "case_id": 7,
    "prompt": "The capital of Nordland is",
    "target_new": "Southby",
    "subject": "Nordland",
    "ground_truth": "Northby",
    "rephrase_prompt": "Nordland is governed from",
    "locality_prompt": "The seat of Little Nordland is",
    "locality_ground_truth": "Northby",
}
NESTED = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "The capital of {} is",
        "relation_id": "P36",
        "target_new": {"str": "Southby", "id": "Q1"},
        "target_true": {"str": "Northby", "id": "Q2"},
        "subject": "Nordland",
    },
    "paraphrase_prompts": ["Nordland is governed from"],
    "neighborhood_prompts": ["The seat of Little Nordland is"],
    "attribute_prompts": ["The capital of Sudland is"],
    "generation_prompts": ["Nordland's capital is known for"],
}
RECENT = {
    "subject": "Ada Moor",
    "prompt": "The place of death of Ada Moor is",
    "target_new": "Southby",
    "portability": {
        "Logical_Generalization": [{"prompt": "Is Ada Moor still alive?", "ground_truth": [["no"], ["is dead"]]}],
        "Reasoning": [
            {"prompt": "The mayor of Ada Moor's place of death is", "ground_truth": [["Bo Lind", "Bo K. Lind"]]},
            {"prompt": "A question that the file leaves unanswered is", "ground_truth": [[""]]},
        ],
        "Subject_Aliasing": [{"prompt": "The place of death of A. Moor is", "ground_truth": [["Southby", "S'by"]]}],
    },
    "locality": {"Relation_Specificity": [{"prompt": "Ada Moor's father is", "ground_truth": [["Cy Moor"]]}]},
}
CHANGED = {
    "subject": "Dan Hill",
    "prompt": "The name of the position held by Dan Hill is",
    "target_new": "bishop of Southby",
    "ground_truth": "mayor of Northby",
    "portability": {
        "Subject_Aliasing": [{"prompt": "The position held by D. Hill is", "ground_truth": "bishop of Southby"}]
    },
    "locality": {
        "Relation_Specificity": [{"prompt": "The gender of Dan Hill is", "ground_truth": "male"}],
        "Forgetfulness": [{"prompt": "Another position held by Dan Hill is", "ground_truth": "mayor of Northby"}],
    },
}


def write(folder, *records):
    path = folder / "records.json"
    path.write_text(json.dumps(list(records)), encoding="utf-8")
    return path


def only_edit(open_file, folder, record):
    (edit,) = open_file(write(folder, record), seed=0, size=1).edits(1, seed=0)
    return edit


def changed(record, value, *keys):
    record = copy.deepcopy(record)
    at = record
    for key in keys[:-1]:
        at = at[key]
    if value is None:
        del at[keys[-1]]
    else:
        at[keys[-1]] = value
    return record


@pytest.mark.parametrize("record", [FLAT, NESTED], ids=["flat", "nested"])
def test_counterfact_is_the_same_edit_in_both_formats(tmp_path, record):
    edit = only_edit(open_counterfact, tmp_path, record)
    assert (edit.subject, edit.prompt) == ("Nordland", "The capital of Nordland is")
    assert (edit.target_new, edit.target_old) == (" Southby", " Northby")
    (paraphrase,), (neighbour,) = edit.generality, edit.locality
    assert (paraphrase.prompt, paraphrase.target) == ("Nordland is governed from", " Southby")
    assert (neighbour.prompt, neighbour.target) == ("The seat of Little Nordland is", " Northby")
    assert edit.portability == ()


def test_recent_facts_replace_no_known_answer(tmp_path):
    corpus = open_wikidata_recent(write(tmp_path, RECENT), seed=0, size=1)
    (edit,) = corpus.edits(1, seed=0)
    assert edit.target_old == ""
    assert corpus.knowledge_probes().keys() == {"locality facts"}
    by_kind = {probe.kind: probe for probe in edit.portability}
    assert by_kind.keys() == {"Logical_Generalization", "Reasoning", "Subject_Aliasing"}
    assert len(edit.portability) == 3, "the unanswered question is left out"
    assert (by_kind["Reasoning"].target, by_kind["Reasoning"].aliases) == (" Bo Lind", ("Bo K. Lind",))
    assert (by_kind["Logical_Generalization"].answer, by_kind["Logical_Generalization"].aliases) == ("no", ("is dead",))
    assert edit.generality == ()


def test_counterfactual_facts_say_what_they_replace(tmp_path):
    edit = only_edit(open_wikidata_counterfact, tmp_path, CHANGED)
    assert (edit.target_new, edit.target_old) == (" bishop of Southby", " mayor of Northby")
    assert [probe.kind for probe in edit.locality] == ["Relation_Specificity", "Forgetfulness"]


@pytest.mark.parametrize(
    ("open_file", "record", "field"),
    [
        (open_counterfact, changed(FLAT, None, "locality_prompt"), "locality_prompt"),
        (open_counterfact, changed(FLAT, 3, "target_new"), "target_new"),
        (open_counterfact, changed(NESTED, "no place", "requested_rewrite", "prompt"), "prompt"),
        (open_counterfact, changed(NESTED, None, "requested_rewrite", "target_true", "str"), "str"),
        (open_counterfact, changed(NESTED, [], "neighborhood_prompts"), "neighborhood_prompts"),
        (open_wikidata_recent, changed(RECENT, "", "target_new"), "target_new"),
        (open_wikidata_recent, changed(RECENT, {"Sense": [{}]}, "portability"), "portability"),
        (open_wikidata_recent, changed(RECENT, [[7]], "portability", "Reasoning", 0, "ground_truth"), "ground_truth"),
        (open_wikidata_counterfact, changed(CHANGED, None, "ground_truth"), "ground_truth"),
        (open_wikidata_counterfact, changed(CHANGED, "male", "locality", "Forgetfulness"), "Forgetfulness"),
    ],
)
def test_a_fault_is_told_by_file_record_and_field(tmp_path, open_file, record, field):
    good = {open_counterfact: FLAT, open_wikidata_recent: RECENT, open_wikidata_counterfact: CHANGED}[open_file]
    path = write(tmp_path, good, record)
    with pytest.raises(ValueError, match=rf"{path}, record 1.*{field}"):
        open_file(path, seed=0, size=2)
