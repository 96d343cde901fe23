"""An evaluation is cross-entropy, and says so, unless OverTone is asked for."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from tiny_trainer import arguments, rows
from transformers import Trainer

from overtone import OverToneConfig
from overtone.huggingface import attach, compute_loss_func

CONSTANT = OverToneConfig(epsilon=50.0)


class TestWithoutGradients:
    @pytest.mark.parametrize("mode", [True, False])
    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_an_attached_model_computes_its_own_loss(self, model, batch, mode, context):
        """To the last digits; and OverTone's as soon as gradients are enabled."""
        model.train(mode)
        with context():
            own = model(**batch).loss
            with attach(model, CONSTANT):
                torch.testing.assert_close(model(**batch).loss, own)
            with attach(model, CONSTANT, eval_loss="overtone"):
                assert model(**batch).loss.item() == pytest.approx(50)
        with attach(model, CONSTANT):
            assert model(**batch).loss.item() == pytest.approx(50)

    def test_compute_loss_func_computes_cross_entropy(self, model, batch):
        """The same there."""
        with torch.no_grad():
            outputs, own = model(input_ids=batch["input_ids"]), model(**{**batch, "attention_mask": None}).loss
            torch.testing.assert_close(compute_loss_func(CONSTANT)(outputs, batch["labels"]), own)
            asked = compute_loss_func(CONSTANT, eval_loss="overtone")
            assert asked(outputs, batch["labels"]).item() == pytest.approx(50)

    def test_a_mask_weighs_the_tokens_there_too(self, model, batch):
        """A weight of 0 is the label -100."""
        mask = (torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(0)) > 0.4).float()
        with torch.no_grad():
            own = model(**{**batch, "labels": batch["labels"].masked_fill(mask == 0, -100)}).loss
            with attach(model, CONSTANT):
                torch.testing.assert_close(model(**batch, loss_mask=mask).loss, own)


class TestTrainer:
    @pytest.mark.parametrize("way", ["attach", "compute_loss_func"])
    @pytest.mark.parametrize("eval_loss", ["cross_entropy", "overtone"])
    def test_eval_loss(self, model, batch, way, eval_loss, tmp_path):
        """As without the loss, or the floor of 50 that was asked for; perplexities and best checkpoints follow."""
        args = arguments(tmp_path, per_device_eval_batch_size=3)
        # Trainers of older versions count the first label, which nothing predicts.
        batch["labels"][:, 0] = -100
        own = Trainer(model=model, args=args, eval_dataset=rows(batch)).evaluate()["eval_loss"]
        expected = own if eval_loss == "cross_entropy" else 50
        given: dict[str, Any] = {}
        if way == "attach":
            attach(model, CONSTANT, eval_loss=eval_loss)
        else:
            given["compute_loss_func"] = compute_loss_func(CONSTANT, eval_loss=eval_loss)
        trainer = Trainer(model=model, args=args, eval_dataset=rows(batch), train_dataset=rows(batch), **given)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
        trainer.train()
        assert trainer.state.log_history[-2]["loss"] == pytest.approx(50)


class TestWords:
    @pytest.mark.parametrize("eval_loss", ["cross-entropy", None, True])
    def test_another_name_is_refused(self, model, eval_loss):
        """Before anything changes."""
        for make in (lambda: attach(model, eval_loss=eval_loss), lambda: compute_loss_func(eval_loss=eval_loss)):
            with pytest.raises(ValueError, match="eval_loss must be one of"):
                make()
        assert "_loss_function" not in model.__dict__

    def test_it_is_said(self, model, caplog):
        """In the log, once for each loss that is put to use."""
        with caplog.at_level(logging.INFO, logger="overtone"):
            attach(model)
            compute_loss_func()
        assert [record.args[-1] for record in caplog.records] == ["cross_entropy", "cross_entropy"]
