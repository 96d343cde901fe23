"""A sequence of edits: its session, its records, and what happens when an edit fails."""

from __future__ import annotations

import dataclasses
import math

import mini_lab
import pytest
import torch

from overtone.lab.edit.methods import METHODS
from overtone.lab.edit.sessions import WeightSession, open_session, require_method, unsupported
from overtone.lab.model.fingerprint import fingerprint
from overtone.lab.model.workplace import NotRestoredError, Workplace
from overtone.lab.run import task as task_module
from overtone.lab.run.task import SequenceTask
from overtone.lab.score.perplexity import perplexity
from overtone.lab.score.scores import examine, score
from overtone.lab.score.traces import EditTrace
from overtone.token_loss import parse

HELD_OUT = ("the head of zed is dan eve .", "bo cy likes tea")
SECOND = dataclasses.replace(mini_lab.edit(), prompt="ana likes", target_new=" milk", target_old=" rain")


@pytest.fixture
def workplace():
    return Workplace(mini_lab.random_model(), mini_lab.tokenizer())


def task(loss="cross_entropy", edits=None, method="ft-m", settings=None, **changes):
    edits = (mini_lab.edit(), SECOND) if edits is None else edits
    settings = settings or METHODS[method].settings
    return SequenceTask("short", 0, method, settings, loss, 3, edits=edits, held_out_texts=HELD_OUT, **changes)


def scoring(**changes):
    return lambda *given, **how: dataclasses.replace(score(*given, **how), **changes)


class TestSession:
    @pytest.mark.parametrize("method", ["lora", "ft-m"])
    def test_edits_add_up_and_end_with_the_session(self, workplace, method):
        before = fingerprint(workplace.model)
        with open_session(workplace, method, None, 0) as session:
            states = [fingerprint(session.model)]
            for edit in (mini_lab.edit(), SECOND):
                session.apply(edit, parse("cross_entropy"))
                states.append(fingerprint(session.model))
        assert fingerprint(workplace.model) == before
        assert len(set(states)) == 3

    def test_further_pairs_of_an_edit_are_fitted_with_it(self, workplace):
        also = dataclasses.replace(mini_lab.edit(), also=((SECOND.prompt, SECOND.target_new),))
        with open_session(workplace, "lora", None, 0) as session:
            session.apply(also, parse("cross_entropy"))
            examination = examine(workplace.model, workplace.tokenizer, SECOND)
            assert score(session.model, workplace.tokenizer, examination).p_new > 0.9

    def test_refuses_an_unknown_method(self):
        with pytest.raises(ValueError, match="unknown method 'rosa': choose from lora, ft-m, easyedit-ft"):
            require_method("rosa")

    def test_a_method_of_easyedit_needs_easyedit(self, monkeypatch):
        monkeypatch.setenv("EASYEDIT_ROOT", "/nowhere")
        with pytest.raises(ValueError, match=r"method 'rome' needs EasyEdit: .*/nowhere"):
            require_method("rome")

    def test_says_which_losses_a_method_cannot_take(self):
        assert unsupported("lora", parse("overtone:dynamic=false")) is None
        assert "ROME cannot minimise 'overtone'" in unsupported("rome", parse("overtone"))


class TestPerform:
    def test_scores_all_edits_after_the_last(self, workplace):
        """By hand: both edits made, then both scored on the model that both have changed."""
        examinations = [examine(workplace.model, workplace.tokenizer, edit) for edit in task().edits]
        with open_session(workplace, "ft-m", None, 6) as session:
            steps = [session.apply(edit, parse("cross_entropy:hold=0.1")).steps for edit in task().edits]
            expected = [score(session.model, workplace.tokenizer, examination) for examination in examinations]
            after = perplexity(session.model, workplace.tokenizer, HELD_OUT)
        records = task("cross_entropy:hold=0.1").perform(workplace)
        assert [record.scores for record in records] == expected
        assert [record.perplexity for record in records] == [after, after]
        assert [record.steps for record in records] == steps
        assert [(record.position, record.index) for record in records] == [(0, 6), (1, 7)]
        settings = "lr=0.005, steps=25"
        assert {record.key for record in records} == {("short", 0, "ft-m", settings, "cross_entropy:hold=0.1", 2, 3)}
        assert {record.error for record in records} == {None}

    def test_a_single_edit_is_a_sequence_of_one(self, workplace):
        (record,) = task(edits=(mini_lab.edit(),), method="lora", is_traced=True).perform(workplace)
        assert (record.length, record.position, record.index) == (1, 0, 3)
        assert record.trace.steps[-1] == record.steps
        assert record.scores.accuracy["rel"] == 1.0

    def test_settings_reach_the_method_and_the_records(self, workplace):
        few = dataclasses.replace(METHODS["lora"].settings, lr=1e-3, steps=2, rank=4, target_modules=("v_proj",))
        (record,) = task(edits=(mini_lab.edit(),), method="lora", settings=few).perform(workplace)
        assert record.steps == 2
        assert record.settings == {"lr": 1e-3, "steps": 2, "rank": 4, "alpha": 32, "target_modules": ["v_proj"]}

    def test_every_edit_starts_from_the_clean_model(self, workplace):
        """The same task gives the same records after other edits as before them."""
        tasks = [task("overtone:hold=settled", method=method) for method in METHODS]
        first = [[dataclasses.replace(made, seconds=0.0) for made in each.perform(workplace)] for each in tasks]
        for each, expected in zip(reversed(tasks), reversed(first), strict=True):
            assert [dataclasses.replace(made, seconds=0.0) for made in each.perform(workplace)] == expected

    def test_traces_do_not_change_the_edit(self, workplace):
        (plain,), (traced,) = (
            task(edits=(mini_lab.edit(),), is_traced=flag).perform(workplace) for flag in (False, True)
        )
        assert plain.scores == traced.scores
        assert plain.trace is None

    def test_examines_the_edits_once_for_all_losses(self, workplace, monkeypatch):
        examined = []
        monkeypatch.setattr(
            "overtone.lab.run.task.examine", lambda *arguments: examined.append(arguments[2]) or examine(*arguments)
        )
        for loss in ("cross_entropy", "overtone:hold=settled"):
            task(loss).perform(workplace)
        assert examined == list(task().edits)

    def test_questions_are_asked_of_the_edited_model(self, workplace, monkeypatch):
        monkeypatch.setattr(task_module, "ask", lambda model, tokenizer, edit, seed: {edit.prompt: float(seed)})
        asked = dataclasses.replace(mini_lab.edit(), questions=("any",))
        first, second = task(edits=(asked, SECOND)).perform(workplace)
        assert (first.answers, second.answers) == ({asked.prompt: 0.0}, {})


class TestFailures:
    def test_a_failed_edit_is_recorded_and_the_model_is_clean(self, workplace, monkeypatch):
        broken = dataclasses.replace(METHODS["ft-m"].settings, lr=float("inf"))
        before = fingerprint(workplace.model)
        records = task(settings=broken).perform(workplace)
        assert fingerprint(workplace.model) == before
        assert [(record.position, record.ended, record.scores) for record in records] == [
            (0, "failed", None),
            (1, "failed", None),
        ]
        assert all(record.error.startswith("RuntimeError: the loss is nan") for record in records)

    @pytest.mark.parametrize("error", [OSError, MemoryError, torch.OutOfMemoryError])
    def test_what_fails_of_the_machine_ends_the_run(self, workplace, monkeypatch, error):
        """Recorded as a failed edit it would never be made again."""
        before = fingerprint(workplace.model)

        def full(*arguments):
            raise error("full")

        monkeypatch.setattr(task_module, "perplexity", full)
        with pytest.raises(error, match="full"):
            task().perform(workplace)
        assert fingerprint(workplace.model) == before

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_perplexity_or_kl_that_is_not_finite_is_none(self, workplace, monkeypatch, value):
        """The accuracies of an edit that broke the model's other knowledge still count."""
        expected = task().perform(workplace)
        monkeypatch.setattr(task_module, "perplexity", lambda *arguments: value)
        monkeypatch.setattr(task_module, "score", scoring(kl=value))
        for found, sound in zip(task().perform(workplace), expected, strict=True):
            assert (found.perplexity, found.error) == (None, None)
            assert found.scores == dataclasses.replace(sound.scores, kl=None)

    def test_scores_that_are_no_numbers_are_a_failure(self, workplace, monkeypatch):
        """The update after the last look at the loss can still break the model."""
        monkeypatch.setattr(task_module, "score", scoring(p_new=math.nan))
        self.assert_not_finite(task(edits=(mini_lab.edit(),)).perform(workplace))

    def test_answers_that_are_no_numbers_are_a_failure(self, workplace, monkeypatch):
        monkeypatch.setattr(task_module, "ask", lambda *arguments: {"multi-hop": math.nan})
        asked = dataclasses.replace(mini_lab.edit(), questions=("any",))
        self.assert_not_finite(task(edits=(asked,)).perform(workplace))

    def test_a_trace_that_is_no_numbers_is_a_failure(self, workplace, monkeypatch):
        trace = EditTrace([0], [math.inf], [], [1.0], [0.0])
        monkeypatch.setattr(task_module.Tracer, "trace", trace)
        self.assert_not_finite(task(edits=(mini_lab.edit(),), is_traced=True).perform(workplace))

    def assert_not_finite(self, records):
        (record,) = records
        assert record.error.startswith("ValueError: ")
        assert "not JSON compliant" in record.error

    def test_a_model_that_is_not_restored_ends_the_run(self, workplace, monkeypatch):
        def leaky(session, edit, loss, observe=None):
            with torch.no_grad():
                workplace.model.lm_head.weight[0, 0] += 1e-3
            raise RuntimeError("and then it fails")

        monkeypatch.setattr(WeightSession, "apply", leaky)
        with pytest.raises(NotRestoredError, match="ft-m did not restore the model"):
            task().perform(workplace)
