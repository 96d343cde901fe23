"""An anchored loss in the real EasyEdit: which positions it keeps, at what, and what its trainers minimise."""

from __future__ import annotations

import pytest
import test_stopping
import torch
from conftest import METHODS, PROMPTS
from test_flag import PRESETS, losses_of

import overtone.easyedit
from overtone import OverToneConfig
from overtone.easyedit.methods import BY_NAME
from overtone.functional import reference_loss
from overtone.token_loss import EditLoss

pytestmark = pytest.mark.easyedit

ANCHORED = {"name": "overtone", "hold": False, "anchor": 2, "anchor_epsilon": 1e-4}


def anchored(method, **changes):
    return {**ANCHORED, **changes, **({"context_templates": False} if method == "WISE" else {})}


@pytest.fixture
def recorder(monkeypatch):
    """All logits and the anchors of every anchored step."""
    original, calls = EditLoss.anchored, []

    def record(self, logits, groups):
        calls.append((logits.detach().clone(), *groups))
        return original(self, logits, groups)

    monkeypatch.setattr(EditLoss, "anchored", record)
    return calls


@pytest.fixture
def unedited(models):
    """Token ids of a text, and the unedited model's log-probabilities after each."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tok = (cls.from_pretrained(models["llama"]) for cls in (AutoModelForCausalLM, AutoTokenizer))

    @torch.no_grad()
    def of(text):
        ids = tok(text, return_tensors="pt").input_ids
        return ids[0].tolist(), model(ids).logits[0].log_softmax(-1)

    return of


class TestPositions:
    """The prompt's own tokens but the last, which predicts the target."""

    @pytest.mark.parametrize("method", METHODS)
    def test_of_one_edit(self, framework, edit, recorder, unedited, method):
        overtone.easyedit.install(framework.methods)
        edit(method, token_loss=anchored(method))
        ids, log_probs = unedited(PROMPTS[0])
        assert len(recorder) >= 2
        for _, group in recorder:
            assert len(group) == len(ids) - 1 > 2
            torch.testing.assert_close(group.log_probs, log_probs[:-1], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("method", ["FT", "LoRA"])
    def test_of_a_batch_of_padded_texts(self, framework, edit, recorder, unedited, method):
        overtone.easyedit.install(framework.methods)
        edit(method, requests=2, batch=2, token_loss=anchored(method))
        expected = torch.cat([unedited(prompt)[1][:-1] for prompt in PROMPTS[:2]])
        torch.testing.assert_close(recorder[-1][1].log_probs, expected, rtol=1e-4, atol=1e-4)

    def test_of_wise_with_its_templates(self, framework, edit, recorder, unedited):
        """Each text is a template around the prompt; the unrelated text at the end is none."""
        overtone.easyedit.install(framework.methods)
        edit("WISE", token_loss=ANCHORED)
        templates = framework.module("models.wise.utils").CONTEXT_TEMPLATES_CACHE
        expected = torch.cat([unedited(template.format(PROMPTS[0]))[1][:-1] for template in templates])
        torch.testing.assert_close(recorder[-1][1].log_probs, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("name", ["LoRA_uns", "FT_uns"])
    def test_of_the_twins(self, framework, models, recorder, unedited, name):
        test_stopping.TestTwins()._call(framework, models, name, ANCHORED)
        ids, log_probs = unedited(test_stopping.TestTwins.DATA[0]["question"])
        assert len(recorder[-1][1]) == len(ids) - 1
        torch.testing.assert_close(recorder[-1][1].log_probs, log_probs[:-1], rtol=1e-4, atol=1e-4)


class TestLoss:
    """What the trainer reports and minimises is the core's."""

    @pytest.mark.parametrize("loss", ["overtone", "cross_entropy"])
    @pytest.mark.parametrize("method", METHODS)
    def test_is_the_definition(self, framework, edit, recorder, monkeypatch, method, loss):
        overtone.easyedit.install(framework.methods)
        targets = []
        original = EditLoss.__call__

        def record(self, logits, labels, **arguments):
            targets.append((logits.detach().clone(), labels.clone()))
            return original(self, logits, labels, **arguments)

        monkeypatch.setattr(EditLoss, "__call__", record)
        run = edit(method, token_loss=anchored(method, name=loss), **_longer(method))
        preset = OverToneConfig.preset(PRESETS[method]).as_kwargs()
        own = preset if loss == "overtone" else {"epsilon": 0.0, "lam": 1.0}
        minimised = losses_of(run, method)
        moved = []
        for (logits, group), (rows, labels), seen in zip(recorder[::-1], targets[::-1], minimised[::-1], strict=False):
            alone = reference_loss(rows, labels, **own)
            kept = torch.nn.functional.kl_div(
                logits[group.at].log_softmax(-1), group.log_probs, reduction="none", log_target=True
            ).sum(-1)
            expected = alone + 2 * kept.clamp(min=1e-4).mean()
            expected = expected * len(labels) / (len(labels) + (method == "WISE"))  # which averages one position more
            assert seen == pytest.approx(expected.item(), rel=2e-4, abs=6e-4 if method == "WISE" else 1e-5)
            moved.append(kept.max().item())
        assert len(moved) >= 4
        assert max(moved) > 1e-3

    @pytest.mark.parametrize("method", METHODS)
    def test_keeps_the_prompt(self, framework, edit, recorder, method):
        """The prompt's own distributions move less with an anchor than with next to none."""
        overtone.easyedit.install(framework.methods)

        def distance(anchor):
            recorder.clear()
            edit(method, token_loss=anchored(method, anchor=anchor, anchor_epsilon=0), **_longer(method))
            logits, group = recorder[-1]
            return torch.nn.functional.kl_div(
                logits[group.at].log_softmax(-1), group.log_probs, reduction="batchmean", log_target=True
            ).item()

        assert distance(10) < 0.7 * distance(1e-6)

    @pytest.mark.parametrize("method", ["FT", "LoRA", "WISE"])
    def test_is_of_the_model_before_each_edit_of_a_row(self, framework, edit, recorder, method):
        """The second edit keeps what the first one has left, not the model of the beginning."""
        overtone.easyedit.install(framework.methods)
        edit(method, requests=2, token_loss=anchored(method), **_longer(method))
        second = recorder[len(recorder) // 2 :]
        assert len(second[0][1]) == len(second[-1][1])
        logits, group = second[0]
        at_first = logits[group.at].log_softmax(-1)
        if method != "LoRA":  # whose targets are known at the first pass, so that it is among the recorded
            assert not torch.equal(at_first, group.log_probs)
        else:
            torch.testing.assert_close(at_first, group.log_probs, rtol=0, atol=1e-6)
        assert not torch.allclose(recorder[0][1].log_probs[0], group.log_probs[0], atol=1e-3)


def _longer(method):
    return {"FT": {"num_steps": 6}, "LoRA": {"num_steps": 6}, "MELO": {"num_iter": 6}, "WISE": {"n_iter": 6}}[method]


class TestRefusals:
    """Where no prompt leads to the target tokens that the loss sees."""

    @pytest.mark.parametrize("name", ["ROME", "MEMIT", "QLoRA", "GRACE"])
    def test_of_a_file(self, framework, tmp_path, name):
        overtone.easyedit.install([name])
        (file := tmp_path / "x.yaml").write_text(f"alg_name: {name}\ntoken_loss: cross_entropy:anchor=1\n")
        package = framework.module(f"models.{BY_NAME[name].module.split('.')[0]}")
        with pytest.raises(ValueError, match="anchor=1 is for trainers whose loss follows a prompt"):
            getattr(package, BY_NAME[name].hparams_class).from_hparams(str(file))

    def test_of_an_edit(self, framework, models):
        with pytest.raises(ValueError, match="anchor=1 is for trainers whose loss follows a prompt"):
            test_stopping.TestTwins()._call(framework, models, "QLoRA", "overtone:anchor=1")
