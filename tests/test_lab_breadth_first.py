"""A row of edits trained in passes over all of them: the steps of a loop written out."""

from __future__ import annotations

import dataclasses

import mini_lab
import pytest
import torch
from torch.nn import functional as F

from overtone.cut_off import without_effect
from overtone.lab.edit.breadth_first import Passes
from overtone.lab.edit.fit import fit
from overtone.lab.edit.many import Job, fit_many, target_texts
from overtone.lab.edit.methods import METHODS
from overtone.lab.edit.sessions import require_method
from overtone.lab.model.targets import encode_targets
from overtone.lab.model.workplace import Workplace
from overtone.lab.run import plan
from overtone.lab.run.settings import RunSettings
from overtone.lab.run.task import SequenceTask
from overtone.lab.run.together import together
from overtone.token_loss import parse

TARGETS = [("the head of acme is", " bo cy"), ("zed", " likes tea"), ("ana runs", " zed ."), ("bo likes", " rain milk")]


def passes(loss="cross_entropy", edits_a_step=2, targets=TARGETS, **options):
    batches = [encode_targets(mini_lab.tokenizer(), [pair]) for pair in targets]
    return Passes(batches, parse(loss).build("ft-m"), None, edits_a_step=edits_a_step, **{"seed": 0, **options})


@pytest.mark.parametrize("edits_a_step", [1, 2, 3, 4, 9])
def test_a_pass_gives_each_edit_one_turn(edits_a_step):
    found = passes(edits_a_step=edits_a_step)
    assert found.steps_a_pass == -(-len(TARGETS) // edits_a_step)
    for number in range(3):
        turns = [found.rows(number * found.steps_a_pass + place) for place in range(found.steps_a_pass)]
        assert sorted(row for turn in turns for row in turn) == list(range(len(TARGETS)))
        assert all(len(turn) <= edits_a_step for turn in turns)


def test_passes_are_shuffled_anew_by_the_seed():
    first, second = (
        [found.rows(step) for step in range(40)] for found in (passes(edits_a_step=1), passes(edits_a_step=1))
    )
    assert first == second
    assert len({tuple(map(tuple, first[start : start + 4])) for start in range(0, 40, 4)}) > 3
    assert first != [passes(edits_a_step=1, seed=7).rows(step) for step in range(40)]


def scripted(moves):
    """A loss of one number, which steps use as they are told to."""
    script = iter(moves)
    return lambda value: value.sum() if next(script) else without_effect(value.sum())


def fit_alone(moves, **options):
    weight, loss = torch.nn.Parameter(torch.zeros(1)), scripted(moves)
    trace = fit([weight], lambda: loss(weight), lr=0.1, **options)
    return trace.steps, len(trace.losses), trace.ended


def fit_in_a_batch(moves, *, steps, **options):
    model, loss = mini_lab.random_model(), scripted(moves)
    opened = METHODS["ft-m"].open_many(model, METHODS["ft-m"].settings)
    texts = tuple(target_texts(encode_targets(mini_lab.tokenizer(), TARGETS[:1])))
    job = Job(texts, lambda logits, _: loss(logits), opened.start(0), **options)
    (fitted,) = fit_many(model, opened, [job], steps=steps, lr=1e-3)
    return fitted.steps, len(fitted.losses), fitted.ended


@pytest.mark.parametrize(("threshold", "edits_a_step", "limit"), [(0.0, 1, 4), (2.0, 1, 30), (2.0, 3, 30)])
def test_is_adam_on_the_mean_of_the_edits_of_a_step_without_those_below_the_threshold(threshold, edits_a_step, limit):
    """LocFT's loop, as it is published, but that a threshold holds an edit where LocFT's holds a batch."""
    loss = f"cross_entropy:hold={threshold}" if threshold else "cross_entropy"
    edits = tuple(dataclasses.replace(mini_lab.edit(), prompt=prompt, target_new=target) for prompt, target in TARGETS)
    settings = METHODS["ft-m"].changed({"lr": 0.02, "steps": limit, "breadth_first": edits_a_step})
    model = mini_lab.random_model().double()
    task = SequenceTask("short", 0, "ft-m", settings, loss, 0, edits, ())
    workplace = Workplace(model, mini_lab.tokenizer())
    records = task.perform(workplace)
    (in_a_batch,) = next(iter(together([task], 4))).perform(workplace)

    order = passes(loss, edits_a_step)
    steps, ended = [0] * len(edits), "steps"
    with METHODS["ft-m"].open(model, settings, 0) as parameters:
        optimizer = torch.optim.Adam(parameters, lr=0.02)
        for number in range(limit):
            has_moved = False
            for place in range(order.steps_a_pass):
                optimizer.zero_grad()
                chosen = order.rows(number * order.steps_a_pass + place)
                total = torch.zeros((), dtype=torch.double)
                for edit in chosen:
                    batch = encode_targets(mini_lab.tokenizer(), [TARGETS[edit]])
                    logits = model(input_ids=batch.input_ids).logits[:, :-1].flatten(0, 1)
                    mean = F.cross_entropy(logits, batch.labels[:, 1:].flatten())
                    if mean > threshold:
                        total = total + mean / len(chosen)
                        steps[edit] += 1
                if total.requires_grad:
                    total.backward()
                    optimizer.step()
                    has_moved = True
            if not has_moved:
                ended = "held"
                break
        batch = encode_targets(mini_lab.tokenizer(), [TARGETS[0]])
        with torch.no_grad():
            p_new = (
                model(input_ids=batch.input_ids).logits[0, :-1].softmax(1)[-2:].gather(1, batch.labels[0, -2:, None])
            )
    assert ended == ("held" if threshold else "steps")
    for made in (records, in_a_batch):
        assert [record.steps for record in made] == steps
        assert {record.ended for record in made} == {ended}
        assert made[0].scores.p_new == pytest.approx(p_new.prod().item())


@pytest.mark.parametrize("fits", [fit_alone, fit_in_a_batch])
def test_ends_held_after_a_pass_without_a_step_and_not_after_as_many_steps_across_two(fits):
    moves = [True, False, False, True, False, False, True]
    assert fits(moves, steps_a_pass=2, steps=9) == (2, 6, "held")
    assert fits(moves, steps_a_pass=2, steps=2) == (2, 4, "steps")
    assert fits(moves, steps_a_pass=1, steps=9) == (1, 2, "held")


@pytest.mark.parametrize("at_once", [1, 4])
def test_a_failed_row_says_so_in_every_edit(at_once):
    edits = tuple(dataclasses.replace(mini_lab.edit(), target_new=target) for target in (" bo cy", "s"))
    settings = METHODS["lora"].changed({"steps": 2, "breadth_first": 2})
    task = SequenceTask("short", 0, "lora", settings, "cross_entropy", 0, edits, ())
    workplace = Workplace(mini_lab.random_model(), mini_lab.tokenizer())
    records = task.perform(workplace) if at_once == 1 else next(iter(together([task], at_once))).perform(workplace)[0]
    assert [record.ended for record in records] == ["failed", "failed"]
    assert all("does not continue prompt" in record.error for record in records)


def test_a_method_of_easyedits_is_refused(monkeypatch):
    monkeypatch.setattr(plan, "require_method", lambda name: None if name == "rome" else require_method(name))
    grid = RunSettings(methods=("lora", "rome"), lengths=(10,), changes={"breadth_first": 10})
    with pytest.raises(
        ValueError, match=r"breadth_first is for the lab's own methods \(lora, ft-m\), got rome beside it"
    ):
        plan.make_plan(grid)
