"""With and without the flag, in the real EasyEdit: what changes and what must not."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import ARCHITECTURES, METHODS, TARGETS

import overtone.easyedit
from overtone import OverToneConfig
from overtone.functional import reference_loss
from overtone.token_loss import EditLoss, parse

pytestmark = pytest.mark.easyedit

WITHOUT_TEMPLATES = "overtone:context_templates=false"

PRESETS = {"FT": "ft-m", "LoRA": "lora", "MELO": "melo", "WISE": "wise"}


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


class TestWithoutTheFlag:
    """Installed or not, hparams without the key run the framework's own code on the framework's own loss."""

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    @pytest.mark.parametrize("method", METHODS)
    def test_same_weights_bit_for_bit(self, framework, edit, method, arch):
        before = edit(method, arch).weights()
        overtone.easyedit.install(framework.methods)
        during = edit(method, arch).weights()
        overtone.easyedit.uninstall()
        assert_same_weights(before, during)
        assert_same_weights(before, edit(method, arch).weights())

    @pytest.mark.parametrize("method", METHODS)
    def test_edits_the_model(self, framework, edit, models, method):
        """The comparisons here are of edited weights: the edit is still in them."""
        from transformers import AutoModelForCausalLM

        original = AutoModelForCausalLM.from_pretrained(models["llama"]).state_dict()
        edited = edit(method).weights()
        new = [name for name in edited if not any(name.endswith(known) for known in original)]
        changed = [name for name in original if name in edited and not torch.equal(edited[name], original[name])]
        assert new or changed

    @pytest.mark.parametrize("method", METHODS)
    def test_same_weights_after_several_edits(self, framework, edit, method):
        before = edit(method, requests=3).weights()
        overtone.easyedit.install(framework.methods)
        assert_same_weights(before, edit(method, requests=3).weights())

    @pytest.mark.parametrize("method", METHODS)
    def test_same_scores_of_single_edits(self, framework, edit, method):
        before = edit(method, requests=2, sequential=False).metrics
        overtone.easyedit.install(framework.methods)
        assert edit(method, requests=2, sequential=False).metrics == before

    @pytest.mark.parametrize("method", METHODS)
    def test_cross_entropy_is_the_trainers_own_loss(self, framework, edit, method):
        before = edit(method).weights()
        overtone.easyedit.install(framework.methods)
        assert_same_weights(before, edit(method, token_loss="cross_entropy").weights())

    @pytest.mark.parametrize("method", METHODS)
    def test_a_flagged_edit_leaves_nothing_behind(self, framework, edit, method):
        before = edit(method).weights()
        overtone.easyedit.install(framework.methods)
        edit(method, token_loss="overtone")
        assert_same_weights(before, edit(method).weights())


@pytest.fixture
def recorder(monkeypatch):
    """Logits, labels and values of every token loss that a trainer asked for."""
    original, calls = EditLoss.__call__, []

    def record(self, logits, labels, **arguments):
        values, held = original(self, logits, labels, **arguments)
        calls.append((logits.detach().clone(), labels.clone(), values.detach().clone()))
        return values, held

    monkeypatch.setattr(EditLoss, "__call__", record)
    return calls


def losses_of(run, method):
    """The values that the trainer itself minimised, in order, as it kept or printed them."""
    if method == "MELO":
        return [float(value) for value in run.editor.model.losses]
    if method == "WISE":
        return [float(value) for value in re.findall(r"^loss \S+ = (\S+) \+", run.output, re.MULTILINE)]
    return run.printed()


class TestWithTheFlag:
    """The loss that each trainer minimises is the core's, at the paper's values, on the target tokens."""

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    @pytest.mark.parametrize("method", METHODS)
    def test_minimises_overtone(self, framework, edit, recorder, method, arch):
        overtone.easyedit.install(framework.methods)
        run = edit(method, arch, token_loss="overtone" if method != "WISE" else WITHOUT_TEMPLATES)
        minimised = losses_of(run, method)
        assert len(minimised) == len(recorder) == 3
        preset = OverToneConfig.preset(PRESETS[method]).as_kwargs()
        target = run.editor.tok(" " + TARGETS[0], add_special_tokens=False)["input_ids"]
        for (logits, labels, loss), seen in zip(recorder, minimised, strict=True):
            torch.testing.assert_close(loss, reference_loss(logits, labels, reduction="none", **preset))
            assert labels[-len(target) :].tolist() == target
            values = loss[-len(target) :]
            # WISE averages over the position before the target too, where its label is -100 and its loss 0.
            mean = values.sum() / (len(target) + (method == "WISE"))
            assert seen == pytest.approx(mean.item(), abs=6e-4 if method == "WISE" else 1e-5)

    @pytest.mark.parametrize("method", METHODS)
    def test_only_target_tokens_are_scored_once_the_trainer_is_known(self, framework, edit, recorder, method):
        """FT-M hands over its prompt too; after the first gradient the adapter leaves it out."""
        overtone.easyedit.install(framework.methods)
        run = edit(method, token_loss="overtone" if method != "WISE" else WITHOUT_TEMPLATES)
        target = run.editor.tok(" " + TARGETS[0], add_special_tokens=False)["input_ids"]
        for _, labels, _ in recorder[1:]:
            assert labels.tolist() == target

    @pytest.mark.parametrize("method", METHODS)
    def test_changes_the_edit(self, framework, edit, method):
        stock = edit(method).weights()
        overtone.easyedit.install(framework.methods)
        flagged = edit(method, token_loss={"name": "label_smoothing", "smoothing": 0.5}).weights()
        assert any(not torch.equal(stock[name], flagged[name]) for name in stock)

    @pytest.mark.parametrize("method", METHODS)
    def test_a_mapping_overrides_the_paper(self, framework, edit, recorder, method):
        overtone.easyedit.install(framework.methods)
        edit(method, token_loss={"name": "overtone", "epsilon": "2e-1", "lam": 0.3, "n_sigma": None})
        logits, labels, values = recorder[0]
        settings = {"epsilon": 0.2, "lam": 0.3, "n_sigma": None}
        torch.testing.assert_close(values, reference_loss(logits, labels, reduction="none", **settings))

    @pytest.mark.parametrize("method", METHODS)
    def test_recommended(self, framework, edit, recorder, method):
        """The trainer minimises the recommended loss, and WISE its own templates with it."""
        overtone.easyedit.install(framework.methods)
        run = edit(method, token_loss="overtone_recommended")
        settings = parse("overtone_recommended").config(PRESETS[method]).as_kwargs()
        for logits, labels, values in recorder:
            torch.testing.assert_close(values, reference_loss(logits, labels, reduction="none", **settings))
        target = run.editor.tok(" " + TARGETS[0], add_special_tokens=False)["input_ids"]
        texts = len(framework.module("models.wise.utils").CONTEXT_TEMPLATES_CACHE) if method == "WISE" else 1
        assert len(recorder[-1][1]) == len(target) * texts

    @pytest.mark.parametrize("method", METHODS)
    def test_a_callable_gets_label_tokens_and_is_minimised(self, framework, edit, method):
        overtone.easyedit.install(framework.methods)

        def constant(logits, labels):
            assert logits.dim() == 2
            assert labels.shape == logits.shape[:1]
            assert (labels >= 0).all()
            return logits.sum(dim=1) * 0 + 7.0

        run = edit(method, token_loss=constant)
        target = run.editor.tok(" " + TARGETS[0], add_special_tokens=False)["input_ids"]
        expected = 7.0 * len(target) / (len(target) + (method == "WISE"))
        assert losses_of(run, method) == pytest.approx([expected] * 3, abs=6e-4)

    @pytest.mark.parametrize("method", METHODS)
    def test_cross_entropy_as_a_callable_makes_the_same_edit(self, framework, edit, method):
        """The seam itself adds nothing: torch's cross-entropy through it gives the trainer's own weights."""
        stock = edit(method).weights()
        overtone.easyedit.install(framework.methods)

        def cross_entropy(logits, labels):
            return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

        through = edit(method, token_loss=cross_entropy).weights()
        for name, value in stock.items():
            torch.testing.assert_close(through[name], value, rtol=1e-4, atol=1e-5, msg=name)

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("sequential", [True, False])
    def test_every_edit_uses_it(self, framework, edit, recorder, method, sequential):
        overtone.easyedit.install(framework.methods)
        edit(method, requests=3, sequential=sequential, token_loss="overtone")
        assert len(recorder) == 9

    @pytest.mark.parametrize("method", ["FT", "LoRA"])
    def test_batched_edits_score_every_target(self, framework, edit, recorder, method):
        overtone.easyedit.install(framework.methods)
        run = edit(method, requests=3, batch=2, token_loss="overtone")
        tokens = [len(run.editor.tok(" " + target, add_special_tokens=False)["input_ids"]) for target in TARGETS]
        assert len(recorder) == 6
        assert len(recorder[1][1]) == tokens[0] + tokens[1]
        assert len(recorder[4][1]) == tokens[2]


class TestWise:
    """The paper's thresholds come with the loss, its missing templates do not; both can be set."""

    def test_thresholds_and_templates(self, framework, edit, recorder):
        overtone.easyedit.install(framework.methods)
        run = edit("WISE", token_loss="overtone")
        assert run.edited.config.act_ratio == pytest.approx(0.88 * 0.6)
        assert run.editor.hparams.act_ratio == 0.88
        templates = framework.module("models.wise.utils").CONTEXT_TEMPLATES_CACHE
        rows = len(run.editor.tok(" " + TARGETS[0], add_special_tokens=False)["input_ids"])
        assert len(templates) > 1
        assert len(recorder[-1][1]) == rows * len(templates)

    def test_both_can_be_set(self, framework, edit, recorder):
        overtone.easyedit.install(framework.methods)
        run = edit("WISE", token_loss={"name": "overtone", "activation_scale": 1.0, "context_templates": False})
        assert run.edited.config.act_ratio == 0.88
        rows = len(run.editor.tok(" " + TARGETS[0], add_special_tokens=False)["input_ids"])
        assert len(recorder[-1][1]) == rows

    def test_cross_entropy_keeps_both_unless_told(self, framework, edit):
        stock = edit("WISE").weights()
        overtone.easyedit.install(framework.methods)
        without = edit("WISE", token_loss={"name": "cross_entropy", "context_templates": False})
        assert any(not torch.equal(value, stock[name]) for name, value in without.weights().items())
        assert without.edited.config.act_ratio == 0.88

    def test_says_so_in_the_log(self, framework, edit, monkeypatch, caplog):
        monkeypatch.setattr("overtone.easyedit.hparams._announced", set())
        overtone.easyedit.install(framework.methods)
        with caplog.at_level("INFO", logger="overtone.easyedit"):
            edit("WISE", token_loss=WITHOUT_TEMPLATES)
        assert "act_ratio 0.88 scaled to 0.528" in caplog.text
        assert "context templates off" in caplog.text
        assert "epsilon=0.05" in caplog.text
