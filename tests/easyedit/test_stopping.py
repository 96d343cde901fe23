"""An edit that needs nothing more ends, or stands still, by the trainers' own rules."""

from __future__ import annotations

import re
from typing import ClassVar

import pytest
import torch
from hparams import build

import overtone.easyedit

pytestmark = pytest.mark.easyedit


def epochs(run):
    return run.output.count("Epoch: ")


class TestFtM:
    """FT-M stops below a mean loss of 1e-2, which OverTone's floor alone keeps it from."""

    def test_ends_once_every_token_is_settled(self, framework, edit):
        overtone.easyedit.install(framework.methods)
        run = edit("FT", num_steps=120, token_loss={"name": "overtone", "epsilon": 0.3, "hold_settled": True})
        printed = run.printed()
        assert epochs(run) < 100
        assert printed[-1] == 0
        assert min(printed[:-1]) >= 0.3 - 1e-6

    def test_ends_at_a_mean(self, framework, edit):
        overtone.easyedit.install(framework.methods)
        at_mean = edit("FT", num_steps=120, token_loss={"name": "overtone", "epsilon": 0.3, "hold_settled": 1.0})
        settled = edit("FT", num_steps=120, token_loss={"name": "overtone", "epsilon": 0.3, "hold_settled": True})
        assert epochs(at_mean) < epochs(settled)

    def test_runs_out_its_steps_in_the_papers_behaviour(self, framework, edit):
        overtone.easyedit.install(framework.methods)
        run = edit("FT", num_steps=60, token_loss={"name": "overtone", "epsilon": 0.3, "hold_settled": False})
        assert epochs(run) == 60
        assert min(run.printed()) >= 0.3 - 1e-6

    def test_early_stopped_cross_entropy(self, framework, edit):
        overtone.easyedit.install(framework.methods)
        run = edit("FT", num_steps=120, token_loss={"name": "cross_entropy", "hold_settled": 0.3})
        assert epochs(run) < 100
        assert min(run.printed()[:-1]) > 0.3 - 0.1


class TestLoraAndMelo:
    """They have no stop: once held, further steps change no weight."""

    @pytest.mark.parametrize("method", ["LoRA", "MELO"])
    def test_held_steps_leave_every_weight(self, framework, edit, method):
        overtone.easyedit.install(framework.methods)
        steps = "num_steps" if method == "LoRA" else "num_iter"
        loss = {"name": "overtone", "epsilon": 1.0, "hold_settled": True}
        short = edit(method, token_loss=loss, **{steps: 60})
        long = edit(method, token_loss=loss, **{steps: 66})
        assert (short.printed() if method == "LoRA" else short.editor.model.losses)[-1] == 0
        assert all(torch.equal(value, long.weights()[name]) for name, value in short.weights().items())

    @pytest.mark.parametrize("method", ["LoRA", "MELO"])
    def test_without_a_hold_adam_moves_on(self, framework, edit, method):
        overtone.easyedit.install(framework.methods)
        steps = "num_steps" if method == "LoRA" else "num_iter"
        loss = {"name": "overtone", "epsilon": 1.0, "hold_settled": False}
        short = edit(method, token_loss=loss, **{steps: 60}).weights()
        long = edit(method, token_loss=loss, **{steps: 66}).weights()
        assert any(not torch.equal(value, long[name]) for name, value in short.items())


class TestWise:
    """WISE's meter stops at a total of 0.02, once the activation loss is done too."""

    MARGINS: ClassVar = {"alpha": 1e3, "beta": -1.0, "gamma": -1e3}
    """No activation loss."""

    def _steps(self, run):
        return len(re.findall(r"^loss ", run.output, re.MULTILINE))

    def test_ends_once_every_token_is_settled(self, framework, edit):
        overtone.easyedit.install(framework.methods)
        loss = {"name": "overtone", "epsilon": 0.5, "hold_settled": True}
        run = edit("WISE", n_iter=200, edit_lr=5.0, mask_ratio=1.0, token_loss=loss, **self.MARGINS)
        assert 2 < self._steps(run) < 200
        assert re.findall(r"^loss (\S+)", run.output, re.MULTILINE)[-2:] == ["0.0", "0.0"]

    def test_runs_out_its_steps_in_the_papers_behaviour(self, framework, edit):
        overtone.easyedit.install(framework.methods)
        loss = {"name": "overtone", "epsilon": 0.5, "hold_settled": False}
        run = edit("WISE", n_iter=60, edit_lr=5.0, mask_ratio=1.0, token_loss=loss, **self.MARGINS)
        assert self._steps(run) == 60


class TestTwins:
    """QLoRA, LoRA_uns and FT_uns share the seams."""

    DATA: ClassVar = [{"question": "The capital of Ardan is", "answer": "Corin Solen"}]

    def _call(self, framework, models, name, token_loss):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        package = {"LoRA_uns": "lora_uns.lora_uns_main", "FT_uns": "ft_uns.ft_uns_main", "QLoRA": "qlora.qlora_main"}
        try:
            module = framework.module(f"models.{package[name]}")
        except ModuleNotFoundError:
            pytest.skip(f"{name} is not in this EasyEdit")
        overtone.easyedit.install([name])
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(models["llama"])
        tok = AutoTokenizer.from_pretrained(models["llama"])
        tok.pad_token_id, tok.padding_side = tok.eos_token_id, "left"
        hparams = build(framework, "FT" if name == "FT_uns" else "LoRA", models["llama"])
        if token_loss is not None:
            hparams.token_loss = token_loss
        if name == "QLoRA":
            hparams.lora_r, hparams.max_length, hparams.num_steps = 4, 16, 3
            request = {"prompt": self.DATA[0]["question"], "target_new": self.DATA[0]["answer"]}
            return module.apply_qlora_to_model(model, tok, [request], hparams)[0]
        apply = module.apply_lora_uns_to_model if name == "LoRA_uns" else module.apply_ft_uns_to_model
        return apply(model, tok, hparams, self.DATA)[0]

    @pytest.mark.parametrize("name", ["LoRA_uns", "FT_uns", "QLoRA"])
    def test_uses_the_loss(self, framework, models, name):
        calls = []

        def counted(logits, labels):
            calls.append(len(labels))
            return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

        through = self._call(framework, models, name, counted).state_dict()
        assert len(calls) == 3
        stock = self._call(framework, models, name, None).state_dict()
        for key, value in stock.items():
            torch.testing.assert_close(through[key], value, rtol=1e-4, atol=1e-5, msg=key)

    @pytest.mark.parametrize("name", ["LoRA_uns", "FT_uns", "QLoRA"])
    def test_takes_overtone(self, framework, models, name):
        stock = self._call(framework, models, name, None).state_dict()
        flagged = self._call(framework, models, name, {"name": "overtone", "check": False}).state_dict()
        assert any(not torch.equal(value, flagged[key]) for key, value in stock.items())
