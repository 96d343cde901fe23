"""A sequence of edits: its session, its checkpoint, its outcomes, and what happens when an edit fails."""

from __future__ import annotations

import dataclasses
import math

import mini_lab
import pytest
import torch

from overtone.lab import sequences, sessions
from overtone.lab.checkpoint import SequenceCheckpoint
from overtone.lab.experiment import NotRestoredError, Workplace, fingerprint
from overtone.lab.losses import parse_loss
from overtone.lab.metrics import examine, score
from overtone.lab.outcomes import EditOutcome, whole_sequences
from overtone.lab.perplexity import perplexity
from overtone.lab.sequences import SequenceTask, checkpoint_path
from overtone.lab.sessions import WeightSession, open_session, require_method, unsupported
from overtone.lab.traces import EditTrace

HELD_OUT = ("the head of zed is dan eve .", "bo cy likes tea")
SECOND = dataclasses.replace(mini_lab.edit(), prompt="ana likes", target_new=" milk", target_old=" rain")


@pytest.fixture
def workplace():
    return Workplace(mini_lab.random_model(), mini_lab.tokenizer())


def task(loss="cross_entropy", edits=None, method="ft-m", **changes):
    edits = (mini_lab.edit(), SECOND) if edits is None else edits
    return SequenceTask("short", 0, method, loss, 3, edits=edits, held_out_texts=HELD_OUT, **changes)


def without_seconds(outcomes):
    return [dataclasses.replace(outcome, seconds=0.0) for outcome in outcomes]


class TestSession:
    @pytest.mark.parametrize("method", ["lora", "ft-m"])
    def test_edits_add_up_and_end_with_the_session(self, workplace, method):
        before = fingerprint(workplace.model)
        with open_session(workplace, method, 0) as session:
            states = [session.state()]
            for edit in (mini_lab.edit(), SECOND):
                session.apply(edit, parse_loss("cross_entropy"))
                states.append(session.state())
        assert fingerprint(workplace.model) == before
        assert len({sum(weight.sum().item() for weight in state.values()) for state in states}) == 3

    @pytest.mark.parametrize("method", ["lora", "ft-m"])
    def test_restore_goes_on_from_a_state(self, workplace, method):
        """The second edit on the restored state is the second edit in one go."""
        with open_session(workplace, method, 5) as session:
            session.apply(mini_lab.edit(), parse_loss("overtone"))
            between = session.state()
            expected = session.apply(SECOND, parse_loss("overtone")).losses
            whole = session.state()
        with open_session(workplace, method, 5) as session:
            session.restore(between, mini_lab.edit(), parse_loss("overtone"))
            assert session.apply(SECOND, parse_loss("overtone")).losses == expected
            assert all(torch.equal(weight, whole[name]) for name, weight in session.state().items())

    def test_further_pairs_of_an_edit_are_fitted_with_it(self, workplace):
        also = dataclasses.replace(mini_lab.edit(), also=((SECOND.prompt, SECOND.target_new),))
        with open_session(workplace, "lora", 0) as session:
            session.apply(also, parse_loss("cross_entropy"))
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
        assert unsupported("lora", parse_loss("overtone:dynamic=false")) is None
        assert "ROME cannot minimise 'overtone'" in unsupported("rome", parse_loss("overtone"))


class TestPerform:
    def test_scores_all_edits_after_the_last(self, workplace):
        """By hand: both edits made, then both scored on the model that both have changed."""
        examinations = [examine(workplace.model, workplace.tokenizer, edit) for edit in task().edits]
        with open_session(workplace, "ft-m", 6) as session:
            steps = [session.apply(edit, parse_loss("early_stopping")).steps for edit in task().edits]
            expected = [score(session.model, workplace.tokenizer, examination) for examination in examinations]
            after = perplexity(session.model, workplace.tokenizer, HELD_OUT)
        outcomes = task("early_stopping").perform(workplace)
        assert [outcome.scores for outcome in outcomes] == expected
        assert [outcome.perplexity for outcome in outcomes] == [after, after]
        assert [outcome.steps for outcome in outcomes] == steps
        assert [(outcome.position, outcome.index) for outcome in outcomes] == [(0, 6), (1, 7)]
        assert {outcome.sequence_key for outcome in outcomes} == {("short", 0, "ft-m", "early_stopping", 2, 3)}
        assert {outcome.error for outcome in outcomes} == {None}

    def test_a_single_edit_is_a_sequence_of_one(self, workplace):
        (outcome,) = task(edits=(mini_lab.edit(),), method="lora", is_traced=True).perform(workplace)
        assert (outcome.length, outcome.position, outcome.index) == (1, 0, 3)
        assert outcome.trace.steps[-1] == outcome.steps
        assert outcome.scores.accuracy["rel"] == 1.0

    def test_examines_the_edits_once_for_all_losses(self, workplace, monkeypatch):
        examined = []
        monkeypatch.setattr(
            "overtone.lab.experiment.examine", lambda *arguments: examined.append(arguments[2]) or examine(*arguments)
        )
        for loss in ("cross_entropy", "overtone_held"):
            task(loss).perform(workplace)
        assert examined == list(task().edits)

    def test_questions_are_asked_of_the_edited_model(self, workplace, monkeypatch):
        monkeypatch.setattr(sequences, "ask", lambda model, tokenizer, edit, seed: {edit.prompt: float(seed)})
        asked = dataclasses.replace(mini_lab.edit(), questions=("any",))
        first, second = task(edits=(asked, SECOND)).perform(workplace)
        assert (first.answers, second.answers) == ({asked.prompt: 0.0}, {})


class TestFailures:
    def test_a_failed_edit_is_recorded_and_the_model_is_clean(self, workplace, monkeypatch):
        monkeypatch.setitem(sessions.METHODS, "ft-m", dataclasses.replace(sessions.METHODS["ft-m"], lr=float("inf")))
        before = fingerprint(workplace.model)
        outcomes = task().perform(workplace)
        assert fingerprint(workplace.model) == before
        assert [(outcome.position, outcome.ended, outcome.scores) for outcome in outcomes] == [
            (0, "failed", None),
            (1, "failed", None),
        ]
        assert all(outcome.error.startswith("RuntimeError: the loss is nan") for outcome in outcomes)

    @pytest.mark.parametrize("error", [OSError, MemoryError, torch.OutOfMemoryError])
    def test_what_fails_of_the_machine_ends_the_run(self, workplace, monkeypatch, error):
        """Recorded as a failed edit it would never be made again."""
        before = fingerprint(workplace.model)

        def full(*arguments):
            raise error("full")

        monkeypatch.setattr(sequences, "perplexity", full)
        with pytest.raises(error, match="full"):
            task().perform(workplace)
        assert fingerprint(workplace.model) == before

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_perplexity_or_kl_that_is_not_finite_is_none(self, workplace, monkeypatch, value):
        """The accuracies of an edit that broke the model's other knowledge still count."""
        expected = task().perform(workplace)
        monkeypatch.setattr(sequences, "perplexity", lambda *arguments: value)
        monkeypatch.setattr(sequences, "score", lambda *given: dataclasses.replace(score(*given), kl=value))
        for found, sound in zip(task().perform(workplace), expected, strict=True):
            assert (found.perplexity, found.error) == (None, None)
            assert found.scores == dataclasses.replace(sound.scores, kl=None)

    def test_scores_that_are_no_numbers_are_a_failure(self, workplace, monkeypatch):
        """The update after the last look at the loss can still break the model."""
        monkeypatch.setattr(sequences, "score", lambda *given: dataclasses.replace(score(*given), p_new=math.nan))
        self.assert_not_finite(task(edits=(mini_lab.edit(),)).perform(workplace))

    def test_answers_that_are_no_numbers_are_a_failure(self, workplace, monkeypatch):
        monkeypatch.setattr(sequences, "ask", lambda *arguments: {"multi-hop": math.nan})
        asked = dataclasses.replace(mini_lab.edit(), questions=("any",))
        self.assert_not_finite(task(edits=(asked,)).perform(workplace))

    def test_a_trace_that_is_no_numbers_is_a_failure(self, workplace, monkeypatch):
        trace = EditTrace([0], [math.inf], [], [1.0], [0.0])
        monkeypatch.setattr(sequences.Tracer, "trace", trace)
        self.assert_not_finite(task(edits=(mini_lab.edit(),), is_traced=True).perform(workplace))

    def assert_not_finite(self, outcomes):
        (outcome,) = outcomes
        assert outcome.error.startswith("ValueError: ")
        assert "not JSON compliant" in outcome.error

    def test_a_model_that_is_not_restored_ends_the_run(self, workplace, monkeypatch):
        def leaky(session, edit, loss, observe=None):
            with torch.no_grad():
                workplace.model.lm_head.weight[0, 0] += 1e-3
            raise RuntimeError("and then it fails")

        monkeypatch.setattr(WeightSession, "apply", leaky)
        with pytest.raises(NotRestoredError, match="ft-m did not restore the model"):
            task().perform(workplace)


class TestCheckpoint:
    def interrupted(self, workplace, tmp_path, monkeypatch, edits=1, method="ft-m"):
        """Interrupt the task after some edits; what is on disk stays there."""
        apply, made = WeightSession.apply, []

        def limited(session, *arguments):
            if len(made) == edits:
                raise KeyboardInterrupt
            made.append(arguments)
            return apply(session, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(WeightSession, "apply", limited)
            with pytest.raises(KeyboardInterrupt):
                task(checkpoints=tmp_path, method=method).perform(workplace)
        return checkpoint_path(tmp_path, task(method=method).key)

    def applied(self, monkeypatch):
        apply, made = WeightSession.apply, []

        def counted(session, *arguments):
            made.append(arguments[0])
            return apply(session, *arguments)

        monkeypatch.setattr(WeightSession, "apply", counted)
        return made

    def test_goes_on_inside_the_sequence(self, workplace, tmp_path, monkeypatch):
        expected = task().perform(workplace)
        assert self.interrupted(workplace, tmp_path, monkeypatch).exists()
        made = self.applied(monkeypatch)
        assert without_seconds(task(checkpoints=tmp_path).perform(workplace)) == without_seconds(expected)
        assert made == [SECOND]

    @pytest.mark.parametrize("damage", [b"", b"no checkpoint"])
    def test_a_broken_file_is_passed_over(self, workplace, tmp_path, monkeypatch, damage):
        self.interrupted(workplace, tmp_path, monkeypatch).write_bytes(damage)
        made = self.applied(monkeypatch)
        task(checkpoints=tmp_path).perform(workplace)
        assert len(made) == 2

    @pytest.mark.parametrize("broken", ["of", "fitted", "losses", "state", "weight", "shape", "everything"])
    def test_a_malformed_file_is_passed_over(self, workplace, tmp_path, monkeypatch, broken):
        """The sequence starts from no edit."""
        expected = task(method="lora").perform(workplace)
        path = self.interrupted(workplace, tmp_path, monkeypatch, method="lora")
        saved = torch.load(path)
        if broken == "losses":
            del saved["fitted"][0]["losses"]
        elif broken == "weight":
            del saved["state"][max(saved["state"])]
        elif broken == "shape":
            saved["state"][max(saved["state"])] = torch.zeros(3, 5)
        elif broken == "everything":
            saved = [1]
        else:
            del saved[broken]
        torch.save(saved, path)
        made = self.applied(monkeypatch)
        found = task(checkpoints=tmp_path, method="lora").perform(workplace)
        assert without_seconds(found) == without_seconds(expected)
        assert len(made) == 2

    @pytest.mark.parametrize("changed", ["steps", "lr", "version"])
    def test_the_state_of_another_optimiser_or_version_is_passed_over(self, workplace, tmp_path, monkeypatch, changed):
        self.interrupted(workplace, tmp_path, monkeypatch)
        made = self.applied(monkeypatch)
        if changed == "version":
            monkeypatch.setattr(sequences, "version", lambda name: "0")
        else:
            other = dataclasses.replace(sessions.METHODS["ft-m"], **{changed: 2})
            monkeypatch.setitem(sessions.METHODS, "ft-m", other)
        task(checkpoints=tmp_path).perform(workplace)
        assert len(made) == 2

    def test_the_state_of_another_model_is_passed_over(self, workplace, tmp_path, monkeypatch):
        self.interrupted(workplace, tmp_path, monkeypatch)
        made = self.applied(monkeypatch)
        task(checkpoints=tmp_path).perform(Workplace(mini_lab.random_model(seed=1), mini_lab.tokenizer()))
        assert len(made) == 2

    def test_single_edits_leave_none(self, workplace, tmp_path):
        task(edits=(mini_lab.edit(),), checkpoints=tmp_path).perform(workplace)
        assert list(tmp_path.iterdir()) == []

    def test_a_session_without_a_state_leaves_none(self, tmp_path):
        class Stateless:
            def state(self):
                return None

        SequenceCheckpoint(tmp_path / "some.pt", "this").save(Stateless(), [])
        assert list(tmp_path.iterdir()) == []


class TestWholeSequences:
    def outcome(self, position, length=2, steps=0):
        return EditOutcome("short", 0, "lora", "overtone", length, 0, position, position, "a", " b", " c", steps=steps)

    def test_leaves_out_those_with_missing_edits(self):
        assert whole_sequences([self.outcome(0), self.outcome(0, length=1)]) == {
            ("short", 0, "lora", "overtone", 1, 0): [self.outcome(0, length=1)]
        }

    def test_has_every_edit_once_in_order(self):
        (found,) = whole_sequences([self.outcome(1), self.outcome(0), self.outcome(1, steps=3)]).values()
        assert found == [self.outcome(0), self.outcome(1, steps=3)]
