"""EasyEdit's trainers as editing sessions of the lab, against EasyEdit itself."""

from __future__ import annotations

import contextlib
import io
import logging
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy
import pytest
import torch
import transformers
from packaging.version import Version

from overtone.easyedit.installation import installed
from overtone.lab.data.edit import Edit, Probe
from overtone.lab.edit.easyedit import process
from overtone.lab.edit.easyedit import session as session_module
from overtone.lab.edit.easyedit.algorithms import ALGORITHMS
from overtone.lab.edit.easyedit.session import open_easyedit_session
from overtone.lab.model.completion import complete
from overtone.lab.model.targets import encode_targets, target_logits
from overtone.lab.model.workplace import Workplace
from overtone.lab.score.scores import examine, score
from overtone.token_loss import parse

pytestmark = [
    pytest.mark.easyedit,
    pytest.mark.skipif(
        Version(transformers.__version__) < Version("4.53"), reason="the lab needs transformers 4.53 or newer"
    ),
]

CROSS_ENTROPY = parse("cross_entropy")
TEXTS = ["The head of Velin is Mavi .", "The spouse of Solen is Corin Tass .", "people of the city", "Yes Tass ."]


def make_edit(subject="Ardan", relation="capital", target=" Corin Solen", old=" Belmor", also=()):
    return Edit(
        subject=subject,
        prompt=f"The {relation} of {subject} is",
        target_new=target,
        target_old=old,
        generality=(Probe(f"Question: what {relation} of {subject} Answer:", target, "rephrase", target.strip()),),
        portability=(),
        locality=(Probe("The spouse of Tass is", " Mavi", "unrelated", "Mavi"),),
        also=also,
    )


EDIT = make_edit()
SECOND = make_edit("Velin", "head", " Tass", " Mavi")
THIRD = make_edit("Solen", "spouse", " Belmor", " Corin Tass")


@pytest.fixture
def workplace(framework, models):
    """A clean tiny model; the framework is imported."""
    return Workplace.load(models["llama"])


SEEDS = {"rome": range(8), "memit": range(8)}
"""Of the prefixes that they write themselves: in a random model some bring the target out, and which ones do depends on
the rounding of the processor."""


@torch.no_grad()
def loss_of(model, tokenizer, edit):
    """Cross-entropy of an edit's target."""
    logits, labels = target_logits(model, encode_targets(tokenizer, [(edit.prompt, edit.target_new)]))
    return torch.nn.functional.cross_entropy(logits, labels).item()


def process_state():
    """Everything that EasyEdit keeps, or changes, beyond a model."""
    kept = [
        value
        for name, attributes in process._STATE.items()
        for value in map(vars(process.module(name)).get, attributes)
    ]
    rome, memit = process.module("models.rome.compute_u"), process.module("models.memit.memit_main")
    seams = [rome.layer_stats, rome.inv_mom2_cache, memit.layer_stats, memit.COV_CACHE]
    generators = random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()
    return [*map(id, [*kept, *seams])], str(kept), generators, installed(), logging.getLogger().level


class TestEverySession:
    """Whatever the method: it edits, it is scored, and it leaves nothing behind."""

    @pytest.mark.parametrize("method", ALGORITHMS)
    def test_edits_and_restores(self, workplace, method):
        """The target becomes likelier on the session's model (with some seed), and nothing outside it changes."""
        model, tokenizer = workplace.model, workplace.tokenizer
        examination = examine(model, tokenizer, EDIT)
        model.get_parameter("model.norm.weight").requires_grad_(False)
        wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        modules = [(name, type(module), module.training) for name, module in model.named_modules()]
        config, outside = model.config.to_dict(), process_state()
        before = loss_of(model, tokenizer, EDIT)
        after = []
        for seed in SEEDS.get(method, (0,)):
            with open_easyedit_session(workplace, method, seed, TEXTS) as session:
                trace = session.apply(EDIT, CROSS_ENTROPY)
                after.append(loss_of(session.model, tokenizer, EDIT))
                scores = score(session.model, tokenizer, examination)
        assert min(after) < before
        assert trace.steps > 0
        assert trace.ended in ("steps", "stopped")
        assert set(scores.accuracy) == {"rel", "gen", "loc"}
        workplace.require_restored(method)
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
        assert all(parameter.grad is None for parameter in model.parameters())
        assert [(name, type(module), module.training) for name, module in model.named_modules()] == modules
        assert model.config.to_dict() == config
        assert process_state() == outside

    @pytest.mark.parametrize("method", ALGORITHMS)
    def test_the_same_seed_makes_the_same_edit(self, workplace, method):
        """Whatever has happened in the process before."""

        def completions():
            batch = encode_targets(workplace.tokenizer, [(EDIT.prompt, EDIT.target_new)])
            with open_easyedit_session(workplace, method, 3, TEXTS) as session:
                session.apply(EDIT, CROSS_ENTROPY)
                return target_logits(session.model, batch)[0]

        first = completions()
        torch.manual_seed(7)
        numpy.random.seed(7)
        with open_easyedit_session(workplace, method, 4, TEXTS) as session:
            session.apply(SECOND, CROSS_ENTROPY)
        assert torch.equal(completions(), first)

    @pytest.mark.parametrize("method", ALGORITHMS)
    def test_a_failed_edit_leaves_nothing(self, workplace, method, monkeypatch):
        """Also where the trainer fails in the middle of its steps."""
        outside = process_state()

        def fail(*args, **kwargs):
            raise FloatingPointError("in the middle")

        optimizer = torch.optim.SGD if method == "easyedit-wise" else torch.optim.Adam
        with open_easyedit_session(workplace, method, 0, TEXTS) as session:
            monkeypatch.setattr(optimizer, "step", fail)
            with pytest.raises(FloatingPointError, match="in the middle"):
                session.apply(EDIT, CROSS_ENTROPY)
        workplace.require_restored(method)
        assert process_state() == outside

    @pytest.mark.parametrize("method", ["easyedit-melo", "easyedit-wise"])
    def test_padding_has_no_part_in_scores(self, workplace, method):
        """Methods that decide for a whole batch are asked text by text."""
        prompts = [EDIT.prompt, "Mavi", "The river of the unrelated city of Solen is"]
        with open_easyedit_session(workplace, method, 0, TEXTS) as session:
            session.apply(EDIT, CROSS_ENTROPY)
            together = complete(session.model, workplace.tokenizer, prompts, 4)
            alone = [complete(session.model, workplace.tokenizer, [prompt], 4)[0] for prompt in prompts]
        assert together == alone

    def test_gpt2(self, framework, models):
        """The other way to build a model, on which WISE finds its edit too rarely to be asked for it."""
        workplace = Workplace.load(models["gpt2"])
        for method in ALGORITHMS:
            before = loss_of(workplace.model, workplace.tokenizer, EDIT)
            after = []
            for seed in SEEDS.get(method, (0,)):
                with open_easyedit_session(workplace, method, seed, TEXTS) as session:
                    session.apply(EDIT, CROSS_ENTROPY)
                    after.append(loss_of(session.model, workplace.tokenizer, EDIT))
            assert min(after) < before or method == "easyedit-wise", method
            workplace.require_restored(method)

    def test_other_models_are_refused(self, workplace):
        """With what they would have to look like."""
        strange = SimpleNamespace(named_modules=lambda: iter(()), parameters=lambda: iter(()))
        strange_workplace = SimpleNamespace(model=strange, tokenizer=workplace.tokenizer)
        with pytest.raises(ValueError, match="not built like LLaMA"):
            open_easyedit_session(strange_workplace, "easyedit-ft", 0).__enter__()


class TestAgainstTheEditor:
    """A session does what EasyEdit's own editor does with the same hparams."""

    def test_ft_in_a_row(self, workplace, framework, models, monkeypatch):
        """Bit for bit, a row of two edits included."""
        made = []
        make = session_module.make_hparams
        monkeypatch.setattr(session_module, "make_hparams", lambda *args: made.append(make(*args)) or made[-1])
        batch = encode_targets(workplace.tokenizer, [(edit.prompt, edit.target_new) for edit in (EDIT, SECOND)])
        with open_easyedit_session(workplace, "easyedit-ft", 0) as session:
            for edit in (EDIT, SECOND):
                session.apply(edit, CROSS_ENTROPY)
            ours = target_logits(session.model, batch)[0]
        hparams = made[0]
        hparams.model_name, hparams.batch_size = str(models["llama"]), 1
        with contextlib.redirect_stdout(io.StringIO()):
            editor = framework.editor_class.from_hparams(hparams)
            editor.edit(
                prompts=[EDIT.prompt, SECOND.prompt],
                target_new=[EDIT.target_new.strip(), SECOND.target_new.strip()],
                ground_truth=["Belmor", "Mavi"],
                sequential_edit=True,
                verbose=False,
            )
        assert torch.equal(target_logits(editor.model.eval(), batch)[0], ours)


class TestSequences:
    """Edits in a row."""

    @pytest.mark.parametrize("method", ["easyedit-melo", "easyedit-wise", "easyedit-lora"])
    def test_the_first_edit_is_still_there(self, workplace, method):
        """The methods that wrap a model wrap it once."""
        before = loss_of(workplace.model, workplace.tokenizer, EDIT)
        with open_easyedit_session(workplace, method, 0, TEXTS) as session:
            session.apply(EDIT, CROSS_ENTROPY)
            session.apply(SECOND, CROSS_ENTROPY)
            assert loss_of(session.model, workplace.tokenizer, EDIT) < before

    @pytest.mark.parametrize("method", ["easyedit-ft", "easyedit-lora", "easyedit-melo", "easyedit-wise"])
    def test_further_pairs_are_edited_too(self, workplace, method):
        """An edit of two prompts makes both targets likelier."""
        edit = make_edit(also=((SECOND.prompt, SECOND.target_new),))
        before = [loss_of(workplace.model, workplace.tokenizer, part) for part in (EDIT, SECOND)]
        with open_easyedit_session(workplace, method, 0, TEXTS) as session:
            session.apply(edit, CROSS_ENTROPY)
            after = [loss_of(session.model, workplace.tokenizer, part) for part in (EDIT, SECOND)]
        assert all(new < old for new, old in zip(after, before, strict=True))


class TestLosses:
    """The losses of the lab reach the trainers."""

    @pytest.mark.parametrize(("spec", "ended"), [("overtone:hold=3", "held"), ("cross_entropy:hold=3", "held")])
    @pytest.mark.parametrize("method", ["easyedit-ft", "easyedit-lora", "easyedit-melo"])
    def test_an_edit_ends_where_its_loss_says(self, workplace, method, spec, ended):
        """After fewer steps than cross-entropy takes, and less near to the target."""
        steps, left = {}, {"nothing": loss_of(workplace.model, workplace.tokenizer, EDIT)}
        for name in ("cross_entropy", spec):
            with open_easyedit_session(workplace, method, 0) as session:
                trace = session.apply(EDIT, parse(name))
                steps[name], left[name] = trace.steps, loss_of(session.model, workplace.tokenizer, EDIT)
        assert 0 < steps[spec] < steps["cross_entropy"]
        assert trace.ended == ended
        assert left["cross_entropy"] < left[spec] < left["nothing"]

    @pytest.mark.parametrize("method", ["rome", "memit"])
    def test_what_cannot_be_minimised(self, workplace, method):
        """ROME and MEMIT refuse other losses, and subjects that are not in the prompt."""
        with open_easyedit_session(workplace, method, 0, TEXTS) as session:
            with pytest.raises(ValueError, match="cannot minimise 'overtone'"):
                session.apply(EDIT, parse("overtone"))
            with pytest.raises(ValueError, match="'Nobody' does not stand in the prompt"):
                session.apply(replace(EDIT, subject="Nobody"), CROSS_ENTROPY)
            with pytest.raises(ValueError, match="observe must be None"):
                session.apply(EDIT, CROSS_ENTROPY, observe=print)

    @pytest.mark.parametrize("method", ["rome", "memit"])
    def test_statistics_are_those_of_the_texts(self, workplace, method, monkeypatch):
        """No data set is loaded; other texts make another edit."""
        stats = process.module("models.rome.layer_stats")
        monkeypatch.setattr(stats, "load_dataset", lambda *args: pytest.fail("asked for a data set"))
        weights = []
        for texts in (TEXTS, TEXTS[:2]):
            fresh = Workplace(workplace.model, workplace.tokenizer)
            with open_easyedit_session(fresh, method, 0, texts) as session:
                session.apply(EDIT, CROSS_ENTROPY)
                weights.append(session.model.state_dict())
        assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
