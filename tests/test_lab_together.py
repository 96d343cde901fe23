"""A grid whose edits share passes: the numbers of the same grid made edit by edit, also after a failure."""

from __future__ import annotations

import dataclasses
import json
import weakref

import mini_lab
import pytest
import torch

from overtone.lab.edit.families import Family, families
from overtone.lab.edit.methods import METHODS
from overtone.lab.model.targets import IGNORE_INDEX, TargetBatch, encode_targets
from overtone.lab.model.workplace import Workplace
from overtone.lab.run import together as together_module
from overtone.lab.run.task import SequenceTask
from overtone.lab.run.together import together
from overtone.lab.score import exact, scores
from overtone.lab.score.batched import score_many
from overtone.token_loss import parse

LOSSES = [
    *("cross_entropy", "cross_entropy:hold=0.5", "cross_entropy:hold=2", "cross_entropy:hold=correct"),
    *("overtone:epsilon=0.5", "overtone:epsilon=0.5+hold=settled", "overtone:epsilon=0.5+hold=correct,1.0"),
    *("label_smoothing:smoothing=0.2", "overtone:dynamic=false+hold=settled"),
    *("cross_entropy:anchor=1", "cross_entropy:hold=0.5+anchor=1"),
    *("overtone:epsilon=0.5+hold=settled+anchor=3+anchor_epsilon=0.2", "overtone:epsilon=0.5+anchor=0.5"),
]


@pytest.fixture
def workplace():
    return Workplace(mini_lab.random_model().double(), mini_lab.tokenizer())


def edits():
    first = mini_lab.edit()
    return [
        first,
        dataclasses.replace(first, prompt="ana likes", target_new=" milk", target_old=" rain"),
        dataclasses.replace(first, prompt="zed runs", target_new=" eve ana", target_old="", locality=()),
        dataclasses.replace(first, prompt="dan is led by", target_new=" cy", portability=()),
    ]


def grid(method, length=1, losses=LOSSES, **changes):
    settings = METHODS[method].changed({"lr": 0.02, "steps": 8, **changes})
    made = edits()
    return [
        SequenceTask(
            "short",
            0,
            method,
            settings,
            parse(loss).name,
            number,
            tuple(made[number * length :][:length]),
            ("bo cy likes tea",),
        )
        for loss in losses
        for number in range(len(made) // length)
    ]


def by_key(sequences):
    return {records[0].key: records for records in sequences}


@pytest.mark.parametrize(("length", "breadth_first"), [(1, None), (2, None), (2, 1), (4, 3)])
@pytest.mark.parametrize("method", ["lora", "ft-m"])
def test_records_are_those_of_the_edits_made_one_by_one(workplace, method, length, breadth_first, monkeypatch):
    # One by one the lab also generates, which takes a third of the time and is not compared.
    for module in (scores, exact):
        monkeypatch.setattr(module, "complete", lambda model, tokenizer, prompts, limit: [""] * len(prompts))
    losses = LOSSES if length == 1 else [*LOSSES[1:6:2], LOSSES[-1]]
    tasks = grid(method, length, losses, breadth_first=breadth_first)
    shared = by_key(records for task in together(tasks, at_once=2) for records in task.perform(workplace))
    # Losses of the same edits follow each other: what the unedited model says is kept for the next one.
    alone = by_key(task.perform(workplace) for task in sorted(tasks, key=lambda task: task.sequence))
    assert shared.keys() == alone.keys()
    ended = {record.ended for records in shared.values() for record in records}
    assert ended == ({"steps"} if breadth_first and method == "ft-m" else {"steps", "held"})
    for key, records in shared.items():
        for made, expected in zip(records, alone[key], strict=True):
            assert (made.steps, made.ended, made.index) == (expected.steps, expected.ended, expected.index), key
            assert made.scores.accuracy == pytest.approx(expected.scores.accuracy)
            assert made.scores.accuracy_by_kind == pytest.approx(expected.scores.accuracy_by_kind)
            assert made.scores.p_new == pytest.approx(expected.scores.p_new, rel=1e-4)
            assert (made.scores.kl or 0) == pytest.approx(expected.scores.kl or 0, rel=1e-4)
            assert made.scores.exact_match == {}
            json.dumps(made.as_json(), allow_nan=False)


def test_thresholds_share_one_run(workplace):
    sizes = [{loss.name for loss in family} for family in families(map(parse, LOSSES))]
    assert {"cross_entropy", "cross_entropy:hold=0.5", "cross_entropy:hold=2", "cross_entropy:hold=correct"} in sizes
    assert {"overtone:epsilon=0.5", "overtone:epsilon=0.5+hold=settled"} in sizes
    assert sum(map(len, sizes)) == len(LOSSES)
    assert len(sizes) == 8


@pytest.mark.parametrize("method", ["lora", "ft-m"])
def test_a_shared_run_keeps_the_gate_of_a_hold_on_first_choices(method):
    """A token below epsilon that is not the first choice still counts, as it does in an edit made alone."""
    losses = [parse("overtone:epsilon=1+hold=correct,0.1"), parse("overtone:epsilon=1+hold=correct,0.2")]
    assert len(families(losses)) == 1
    label = 5
    labels = torch.tensor([[IGNORE_INDEX, label]])
    batch = TargetBatch(torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.long), labels)
    logits = torch.full((1, 20), -9.0)
    logits[0, label], logits[0, label - 1] = 0.0, 0.01

    def gradient(loss):
        leaf = logits.clone().requires_grad_()
        loss(leaf).backward()
        return leaf.grad

    alone = gradient(lambda leaf: losses[0].build(method).mean(leaf, torch.tensor([label])))
    assert alone.abs().sum() > 0
    together = Family(losses, method).job(batch, torch.zeros(1), None)
    assert torch.equal(gradient(lambda leaf: together.objective(leaf, [0])), alone)


def test_a_run_ends_with_the_last_of_its_losses(workplace):
    """Without a loss that takes all steps nothing is computed after the last hold."""
    opened = METHODS["lora"].open_many(workplace.model, METHODS["lora"].settings)
    batch = encode_targets(workplace.tokenizer, edits()[0].pairs)
    family = Family([parse("cross_entropy:hold=2"), parse("cross_entropy:hold=0.5")], "lora")
    (fitted,) = together_module.fit_many(
        workplace.model, opened, [family.job(batch, opened.start(0), None)], steps=99, lr=0.02
    )
    ends = family.results(fitted)
    assert fitted.steps == ends["cross_entropy:hold=0.5"][0].steps < 99
    assert ends["cross_entropy:hold=2"][0].steps < fitted.steps


def test_an_edit_that_fails_takes_no_other_with_it(workplace):
    tasks = grid("ft-m", losses=["cross_entropy"])
    broken = dataclasses.replace(tasks[1].edits[0], target_new="s")
    tasks[1] = dataclasses.replace(tasks[1], edits=(broken,))
    records = [record for task in together(tasks, at_once=4) for made in task.perform(workplace) for record in made]
    assert [record.error is None for record in records] == [True, False, True, True]
    assert "does not continue prompt" in records[1].error


def test_a_row_keeps_the_weights_of_its_last_edit_alone(workplace, monkeypatch):
    earlier, alive = [], []

    def fit_many(*args, **kwargs):
        alive.append(sum(weights() is not None for weights in earlier))
        fitted = fit(*args, **kwargs)
        earlier.extend(weakref.ref(edit.weights) for edit in fitted)
        return fitted

    fit = together_module.fit_many
    monkeypatch.setattr(together_module, "fit_many", fit_many)
    (task,) = together(grid("lora", length=4, losses=["cross_entropy"]), at_once=2)
    (records,) = task.perform(workplace)
    assert [record.error for record in records] == [None] * 4
    assert alive == [0, 1, 1, 1]


def test_a_group_of_single_edits_is_one_run_of_as_many_edits_as_share_a_pass():
    """So what is finished is on disk after one run, not after the runs of all losses."""
    groups = together(grid("lora"), at_once=3)
    assert [len(group.runs) for group in groups] == [3] * 8 + [1] * 8
    for group in groups:
        assert len(families(parse(task.loss) for task in group.runs[0])) == 1
        assert all({task.loss for task in run} == {task.loss for task in group.runs[0]} for run in group.runs)
    assert sorted(task.key for group in groups for task in group.tasks) == sorted(task.key for task in grid("lora"))


def test_a_group_of_rows_is_as_many_rows_as_share_a_pass():
    groups = together(grid("lora", length=2), at_once=4)
    assert [[len(run) for run in group.runs] for group in groups] == [[1] * 4] * 6 + [[1] * 2]


@pytest.mark.parametrize("length", [1, 2])
def test_edited_models_say_what_they_answer_where_that_is_asked_for(workplace, length):
    tasks = grid("lora", length, losses=["cross_entropy"])
    silent, speaking = (
        by_key(made for group in together(tasks, 2, generates=generates) for made in group.perform(workplace))
        for generates in (False, True)
    )
    for key, records in speaking.items():
        for record, other in zip(records, silent[key], strict=True):
            assert {"rel", "gen"} <= record.scores.said.keys() <= {"rel", "gen", "por"}
            assert dataclasses.replace(record.scores, said={}) == other.scores
            # With words for tokens an answer is said where it is begun with.
            assert {name: record.scores.begins[name] for name in record.scores.said} == record.scores.said
    assert {share for records in speaking.values() for made in records for share in made.scores.said.values()} >= {0, 1}


def test_losses_that_end_a_run_at_one_step_are_scored_once(workplace, monkeypatch):
    scored = []

    def counted(model, opened, examined):
        scored.extend(examined)
        return score_many(model, opened, examined)

    monkeypatch.setattr(together_module, "score_many", counted)
    tasks = grid("lora", losses=["cross_entropy:hold=50", "cross_entropy:hold=60", "cross_entropy:hold=0.1"])
    (task,) = together(tasks, at_once=4)
    made = by_key(task.perform(workplace))
    early, other_early, late = (made[task.key][0].scores for task in tasks[::4])
    assert early == other_early != late
    assert len(scored) == 2 * 4
