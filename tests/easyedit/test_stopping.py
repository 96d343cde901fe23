"""An edit that needs nothing more ends, or stands still, by the trainers' own rules."""

from __future__ import annotations

import functools
import re
from typing import ClassVar

import conftest
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
        run = edit("FT", num_steps=120, token_loss={"name": "overtone", "epsilon": 0.3, "hold": "settled"})
        printed = run.printed()
        assert epochs(run) < 100
        assert printed[-1] == 0
        assert min(printed[:-1]) >= 0.3 - 1e-6

    def test_ends_at_a_mean(self, framework, edit):
        overtone.easyedit.install(framework.methods)
        at_mean = edit("FT", num_steps=120, token_loss={"name": "overtone", "epsilon": 0.3, "hold": 1.0})
        settled = edit("FT", num_steps=120, token_loss={"name": "overtone", "epsilon": 0.3, "hold": "settled"})
        assert epochs(at_mean) < epochs(settled)

    def test_runs_out_its_steps_in_the_papers_behaviour(self, framework, edit):
        overtone.easyedit.install(framework.methods)
        run = edit("FT", num_steps=60, token_loss={"name": "overtone", "epsilon": 0.3, "hold": False})
        assert epochs(run) == 60
        assert min(run.printed()) >= 0.3 - 1e-6

    def test_early_stopped_cross_entropy(self, framework, edit):
        overtone.easyedit.install(framework.methods)
        run = edit("FT", num_steps=120, token_loss={"name": "cross_entropy", "hold": 0.3})
        assert epochs(run) < 100
        assert min(run.printed()[:-1]) > 0.3 - 0.1


class TestLoraAndMelo:
    """They have no stop: once held, further steps change no weight."""

    @pytest.mark.parametrize("method", ["LoRA", "MELO"])
    def test_held_steps_leave_every_weight(self, framework, edit, method):
        overtone.easyedit.install(framework.methods)
        steps = "num_steps" if method == "LoRA" else "num_iter"
        loss = {"name": "overtone", "epsilon": 1.0, "hold": "settled"}
        short = edit(method, token_loss=loss, **{steps: 60})
        long = edit(method, token_loss=loss, **{steps: 66})
        assert (short.printed() if method == "LoRA" else short.editor.model.losses)[-1] == 0
        assert all(torch.equal(value, long.weights()[name]) for name, value in short.weights().items())

    @pytest.mark.parametrize("method", ["LoRA", "MELO"])
    def test_without_a_hold_adam_moves_on(self, framework, edit, method):
        overtone.easyedit.install(framework.methods)
        steps = "num_steps" if method == "LoRA" else "num_iter"
        loss = {"name": "overtone", "epsilon": 1.0, "hold": False}
        short = edit(method, token_loss=loss, **{steps: 60}).weights()
        long = edit(method, token_loss=loss, **{steps: 66}).weights()
        assert any(not torch.equal(value, long[name]) for name, value in short.items())

    def test_held_steps_leave_every_weight_with_adalora_too(self, framework, edit, monkeypatch):
        """Its orthogonality term is added outside of the model; this PEFT wants a total_step that EasyEdit lacks."""
        module = framework.module("models.lora.lora_main")
        monkeypatch.setattr(module, "AdaLoraConfig", functools.partial(module.AdaLoraConfig, total_step=1000))
        overtone.easyedit.install(["LoRA"])
        loss = {"name": "overtone", "epsilon": 100.0}
        runs = [edit("LoRA", token_loss=loss, num_steps=steps, lora_type="adalora") for steps in (1, 6)]
        assert runs[1].printed()[-1] > 0
        moved = [name for name, value in runs[0].weights().items() if not torch.equal(value, runs[1].weights()[name])]
        assert not moved

    def test_held_steps_leave_every_weight_of_a_mixture_of_experts(self, framework, models, tmp_path):
        """Its router loss is added inside of the model."""
        import transformers

        folder = tmp_path / "mistral-moe"
        conftest.tiny_tokenizer(folder)
        config = transformers.MixtralConfig(
            vocab_size=400,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_local_experts=4,
            output_router_logits=True,
            router_aux_loss_coef=1.0,
            pad_token_id=0,
        )
        transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
        overtone.easyedit.install(["LoRA"])
        runs = []
        for steps in (1, 6):
            hparams = build(framework, "LoRA", models["mistral"], num_steps=steps, model_name=str(folder))
            hparams.token_loss = {"name": "overtone", "epsilon": 100.0}
            torch.manual_seed(0)
            runs.append(conftest.edit_with(framework, hparams))
        assert runs[1].printed()[-1] > 0
        moved = [name for name, value in runs[0].weights().items() if not torch.equal(value, runs[1].weights()[name])]
        assert not moved


class TestWise:
    """WISE's meter stops at a total of 0.02, once the activation loss is done too."""

    MARGINS: ClassVar = {"alpha": 1e3, "beta": -1.0, "gamma": -1e3}
    """No activation loss."""

    def _steps(self, run):
        return len(re.findall(r"^loss ", run.output, re.MULTILINE))

    def test_ends_once_every_token_is_settled(self, framework, edit):
        overtone.easyedit.install(framework.methods)
        loss = {"name": "overtone", "epsilon": 0.5, "hold": "settled"}
        run = edit("WISE", n_iter=200, edit_lr=5.0, mask_ratio=1.0, token_loss=loss, **self.MARGINS)
        assert 2 < self._steps(run) < 200
        assert re.findall(r"^loss (\S+)", run.output, re.MULTILINE)[-2:] == ["0.0", "0.0"]

    def test_runs_out_its_steps_in_the_papers_behaviour(self, framework, edit):
        overtone.easyedit.install(framework.methods)
        loss = {"name": "overtone", "epsilon": 0.5, "hold": False}
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
