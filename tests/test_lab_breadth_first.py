"""A row of edits trained in rounds over all of them: the steps of a loop written out."""

from __future__ import annotations

import dataclasses

import mini_lab
import pytest
import torch
from torch.nn import functional as F

from overtone import cli
from overtone.cut_off import without_effect
from overtone.lab.edit import sessions
from overtone.lab.edit.breadth_first import Rounds
from overtone.lab.edit.fit import fit
from overtone.lab.edit.many import Job, fit_many, target_texts
from overtone.lab.edit.methods import METHODS
from overtone.lab.edit.sessions import require_method
from overtone.lab.model.positions import logits_at
from overtone.lab.model.targets import encode_targets
from overtone.lab.model.workplace import Workplace
from overtone.lab.run import plan
from overtone.lab.run import together as together_module
from overtone.lab.run.settings import RunSettings
from overtone.lab.run.task import SequenceTask
from overtone.lab.run.together import together
from overtone.token_loss import parse

PAIRS = [
    [("the head of acme is", " bo cy")],
    [("zed", " likes")],
    [("ana runs", " zed by dan .")],
    [("bo likes", " rain milk"), ("the spouse of dan is", " eve")],
]
"""Of each edit, of targets of one token to four; the last one has two texts."""

EDITS = tuple(
    dataclasses.replace(mini_lab.edit(), prompt=prompt, target_new=target, also=tuple(also))
    for (prompt, target), *also in PAIRS
)


def tokenizer():
    """With a BOS, which begins a text and which no anchor stands on."""
    words = mini_lab.tokenizer()
    words.bos_token = "the"
    return words


def rounds(loss="cross_entropy", edits_a_step=2, edits=EDITS, **options):
    model, build_loss = mini_lab.random_model().double(), lambda: parse(loss).build("ft-m")
    return Rounds(model, tokenizer(), edits, build_loss, edits_a_step=edits_a_step, **{"seed": 0, **options})


@pytest.mark.parametrize("edits_a_step", [1, 2, 3, 4, 9])
def test_a_round_gives_each_edit_one_turn_with_all_of_its_texts(edits_a_step):
    found = rounds(edits_a_step=edits_a_step)
    assert found.steps_a_round == -(-len(EDITS) // edits_a_step)
    for number in range(3):
        turns = [found.rows(number * found.steps_a_round + place) for place in range(found.steps_a_round)]
        assert sorted(row for turn in turns for row in turn) == list(range(5))
        assert all((3 in turn) == (4 in turn) and len(turn) - (4 in turn) <= edits_a_step for turn in turns)


def test_rounds_are_shuffled_anew_by_the_seed():
    orders = [[rounds(edits_a_step=1, seed=seed).rows(step) for step in range(40)] for seed in (0, 0, 7)]
    assert orders[0] == orders[1] != orders[2]
    assert len({tuple(map(tuple, orders[0][start : start + 4])) for start in range(0, 40, 4)}) > 3


@pytest.mark.parametrize(
    ("options", "message"),
    [({"edits": ()}, "edits is empty"), ({"edits_a_step": 0}, "edits_a_step must be at least 1, got 0")],
)
def test_names_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        rounds(**options)


def losses_of(model, edit, reference):
    """The mean cross-entropy of an edit's target tokens, and the mean KL of its prompts' tokens to the reference."""
    entropies, distances = [], []
    for number, pair in enumerate(PAIRS[edit]):
        batch = encode_targets(tokenizer(), [pair])
        logits = model(input_ids=batch.input_ids).logits[0]
        is_target = batch.labels[0, 1:] != -100
        entropies.append(F.cross_entropy(logits[:-1][is_target], batch.labels[0, 1:][is_target], reduction="none"))
        before = reference.setdefault((edit, number), logits.detach().log_softmax(1))
        is_kept = ~is_target & (batch.input_ids[0, :-1] != tokenizer().bos_token_id)
        kl = (before.exp() * (before - logits.log_softmax(1))).sum(1)
        distances.append(kl[:-1][is_kept].clamp(min=0.05))
    return torch.cat(entropies).mean(), torch.cat(distances).mean()


def written_out(loss, anchor, threshold, order, model, parameters, limit):
    """LocFT's loop, as it is published, but that a threshold holds an edit where LocFT's holds a step."""
    steps, reference = [0] * len(EDITS), {}
    with torch.no_grad():
        for edit in range(len(EDITS)):
            losses_of(model, edit, reference)
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    for number in range(limit):
        has_moved = False
        for place in range(order.steps_a_round):
            optimizer.zero_grad()
            rows = order.rows(number * order.steps_a_round + place)
            chosen = [edit for edit in range(len(EDITS)) if edit in rows]
            total = torch.zeros((), dtype=torch.double)
            for edit in chosen:
                entropy, kept = losses_of(model, edit, reference)
                if entropy > threshold:
                    total = total + (entropy + anchor * kept) / len(chosen)
                    steps[edit] += 1
            if total.requires_grad:
                total.backward()
                optimizer.step()
                has_moved = True
        if not has_moved:
            return steps, "held"
    return steps, "steps"


@pytest.mark.parametrize(
    ("loss", "anchor", "threshold", "edits_a_step", "limit"),
    [
        ("cross_entropy", 0, 0, 1, 3),
        ("cross_entropy:hold=2.0", 0, 2, 1, 40),
        ("cross_entropy:hold=2.0", 0, 2, 3, 40),
        ("cross_entropy:anchor=2", 2, 0, 1, 4),
        ("cross_entropy:anchor=2", 2, 0, 3, 4),
    ],
)
@pytest.mark.parametrize("number", [0, 1])
def test_is_adam_on_the_mean_of_the_edits_of_a_step(loss, anchor, threshold, edits_a_step, limit, number):
    """The same from both ways to make a row, also of a row that is not the first."""
    model = mini_lab.random_model().double()
    workplace = Workplace(model, tokenizer())
    settings = METHODS["ft-m"].changed({"lr": 0.02, "steps": limit, "breadth_first": edits_a_step})
    task = SequenceTask("short", 0, "ft-m", settings, parse(loss).name, number, EDITS, ())
    made = [task.perform(workplace), *next(iter(together([task], 4))).perform(workplace)]
    order = rounds(loss, edits_a_step, seed=number * len(EDITS))
    with METHODS["ft-m"].open(model, settings, 0) as parameters:
        steps, ended = written_out(loss, anchor, threshold, order, model, parameters, limit)
        batch = encode_targets(tokenizer(), PAIRS[0])
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids).logits[0, :-1][-2:]
        p_new = logits.softmax(1).gather(1, batch.labels[0, -2:, None]).prod().item()
    assert ended == ("held" if threshold else "steps")
    for records in made:
        assert [record.steps for record in records] == steps
        assert {record.ended for record in records} == {ended}
        assert len({record.seconds for record in records}) == 1
        assert records[0].scores.p_new == pytest.approx(p_new)


@pytest.mark.parametrize("edits_a_step", [1, 4])
def test_a_frozen_target_is_that_of_each_edit_before_the_first_step(edits_a_step):
    spec = parse("overtone:dynamic=false+epsilon=0+check=false")
    model = mini_lab.random_model().double()
    order = Rounds(model, tokenizer(), EDITS, lambda: spec.build("ft-m"), edits_a_step=edits_a_step, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():  # as if other edits had been trained since
            parameter.mul_(1.1)
    for step in range(order.steps_a_round):
        rows = order.rows(step)
        expected = []
        for edit in sorted({min(row, 3) for row in rows}):
            alone = spec.build("ft-m")
            texts = target_texts(encode_targets(tokenizer(), PAIRS[edit]))
            labels = torch.cat([text.ids[text.positions + 1] for text in texts])
            alone(logits_at(mini_lab.random_model().double(), texts), labels)
            expected.append(alone.mean(logits_at(model, texts), labels))
        logits = logits_at(model, [order.texts[row] for row in rows])
        torch.testing.assert_close(order.mean(logits, rows), torch.stack(expected).mean())


def made_both_ways(loss):
    workplace = Workplace(mini_lab.random_model().double(), tokenizer())
    settings = METHODS["ft-m"].changed({"lr": 0.02, "steps": 2, "breadth_first": 2})
    task = SequenceTask("short", 0, "ft-m", settings, parse(loss).name, 0, EDITS, ())
    return [task.perform(workplace), *next(iter(together([task], 4))).perform(workplace)]


def test_each_edit_has_a_loss_of_its_own_which_remembers_it_alone():
    alone, in_a_batch = made_both_ways("overtone:dynamic=false+epsilon=0")
    for one, other in zip(alone, in_a_batch, strict=True):
        assert [one.error, other.error] == [None, None]
        assert one.scores.p_new == pytest.approx(other.scores.p_new)


def test_the_time_of_a_row_is_shared_by_its_edits(monkeypatch):
    monkeypatch.setattr(sessions, "fit", lambda *a, **o: dataclasses.replace(fit(*a, **o), seconds=8.0))
    monkeypatch.setattr(
        together_module,
        "fit_many",
        lambda *a, **o: [dataclasses.replace(made, seconds=8.0) for made in fit_many(*a, **o)],
    )
    for records in made_both_ways("cross_entropy"):
        assert [record.seconds for record in records] == [2.0] * 4


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
    texts = tuple(target_texts(encode_targets(mini_lab.tokenizer(), PAIRS[0])))
    job = Job(texts, lambda logits, _: loss(logits), opened.start(0), **options)
    (fitted,) = fit_many(model, opened, [job], steps=steps, lr=1e-3)
    return fitted.steps, len(fitted.losses), fitted.ended


@pytest.mark.parametrize("fits", [fit_alone, fit_in_a_batch])
def test_ends_held_after_a_round_without_a_step_and_not_after_as_many_steps_across_two(fits):
    moves = [True, False, False, True, False, False, True]
    assert fits(moves, steps_a_round=2, steps=9) == (2, 6, "held")
    assert fits(moves, steps_a_round=2, steps=2) == (2, 4, "steps")
    assert fits(moves, steps_a_round=1, steps=9) == (1, 2, "held")
    with pytest.raises(ValueError, match="steps_a_round must be at least 1, got 0"):
        fits(moves, steps_a_round=0, steps=9)


def test_a_finished_row_need_not_wait_for_more_than_share_its_pass():
    settings = METHODS["ft-m"].changed({"breadth_first": 4})
    tasks = [SequenceTask("short", 0, "ft-m", settings, "cross_entropy", number, EDITS, ()) for number in range(6)]
    assert [len(group.tasks) for group in together(tasks, 8)] == [2, 2, 2]
    assert [(len(group.tasks), group.at_once) for group in together(tasks, 2)] == [(1, 1)] * 6


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


def test_is_an_option_of_the_bench():
    assert cli._chosen(cli.parse_arguments(["bench", "--breadth-first", "10"]))["changes"] == {"breadth_first": 10}
    assert cli._chosen(cli.parse_arguments(["bench"]))["changes"] == {}
