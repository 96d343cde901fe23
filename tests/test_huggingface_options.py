"""Trainers' options that would put another loss, or another count of tokens, in the place of the one asked for."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from tiny_trainer import arguments, rows, trained_gradients, word_tokenizer
from transformers import Trainer, TrainerCallback

from overtone import OverToneConfig
from overtone.huggingface import DataCollatorWithLossMask, TokenStatesCallback, attach, compute_loss_func

CONSTANT = OverToneConfig(epsilon=100.0)
HELD = OverToneConfig(epsilon=50.0, hold="settled")


@pytest.fixture(autouse=True)
def no_trainer_compiles_the_next_ones_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch_compile=True stays behind in the environment, where the process's later Trainers find it."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")


def foreign(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return outputs.logits.float().mean()


class OwnLoss(Trainer):
    """Takes the labels out, as many trainers do."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
        return (loss, outputs) if return_outputs else loss


class TestLabelSmoothing:
    def test_beside_an_attached_loss_is_refused(self, model, batch, tmp_path):
        """Trainer would take the labels out and train on its own loss, bit for bit the un-attached one."""
        attach(model, CONSTANT)
        with pytest.raises(ValueError, match=r"label_smoothing_factor must be 0, got 0.1 in Trainer.*detach"):
            trained_gradients(model, arguments(tmp_path, label_smoothing_factor=0.1), batch)

    def test_beside_an_attached_loss_in_a_compiled_model_is_refused(self, model, batch, tmp_path):
        """Where nobody can look at the stack from the forward."""
        attach(model, CONSTANT)
        args = arguments(tmp_path, label_smoothing_factor=0.1, torch_compile=True, torch_compile_backend="eager")
        with pytest.raises(ValueError, match="label_smoothing_factor must be 0"):
            trained_gradients(model, args, batch)

    def test_of_an_evaluation_is_refused(self, model, batch, tmp_path):
        """It would not be the cross-entropy that an evaluation promises."""
        attach(model)
        args = arguments(tmp_path, label_smoothing_factor=0.1)
        with pytest.raises(ValueError, match="label_smoothing_factor must be 0"):
            Trainer(model=model, args=args, eval_dataset=rows(batch)).evaluate()

    def test_beside_compute_loss_func_is_refused(self, model, batch, tmp_path):
        """Trainer ignores the factor then."""
        args = arguments(tmp_path, label_smoothing_factor=0.1)
        with pytest.raises(ValueError, match=r"label_smoothing_factor must be 0, got 0.1 in Trainer"):
            trained_gradients(model, args, batch, compute_loss_func=compute_loss_func())

    @pytest.mark.parametrize("way", ["attach", "compute_loss_func"])
    def test_in_sft_trainer_is_refused(self, model, way, tmp_path):
        """It ignores it beside the function, and smooths past an attached model."""
        # Not a package of every environment; what it brings is under test in one function alone.
        sft = pytest.importorskip("test_huggingface_trainer").TestSFTTrainer()
        config = sft.config(tmp_path, label_smoothing_factor=0.1)
        given = {"compute_loss_func": compute_loss_func()} if way == "compute_loss_func" else {}
        if way == "attach":
            attach(model, CONSTANT)
        with pytest.raises(ValueError, match="label_smoothing_factor must be 0"):
            sft.gradients(model, config, **given)

    def test_after_detach_is_the_trainers_own(self, model, batch, tmp_path):
        """As before, bit for bit."""
        args = arguments(tmp_path, label_smoothing_factor=0.1)
        expected = trained_gradients(tiny_models.build(), args, batch)
        attach(model, CONSTANT).detach()
        torch.testing.assert_close(trained_gradients(model, args, batch), expected, rtol=0, atol=0)


class TestOtherLosses:
    def test_another_compute_loss_func_beside_an_attached_loss_is_refused(self, model, batch, tmp_path):
        """One of the two would not train."""
        attach(model, CONSTANT)
        with pytest.raises(ValueError, match=r"compute_loss_func=<function foreign.*takes the place"):
            trained_gradients(model, arguments(tmp_path), batch, compute_loss_func=foreign)

    @pytest.mark.parametrize("compiled", [False, True])
    def test_a_trainer_with_a_loss_of_its_own_is_refused(self, model, batch, compiled, tmp_path):
        """It calls the model without labels."""
        attach(model, CONSTANT)
        args = arguments(tmp_path, torch_compile=compiled, torch_compile_backend="eager" if compiled else None)
        trainer = OwnLoss(model=model, args=args, train_dataset=rows(batch))
        with pytest.raises(RuntimeError, match="OwnLoss calls LlamaForCausalLM without labels"):
            trainer.train()

    def test_our_function_beside_an_attached_loss_is_no_other_one(self, model, batch, tmp_path):
        """The function's settings train."""
        attach(model)
        trainer = Trainer(
            model=model,
            args=arguments(tmp_path),
            train_dataset=rows(batch),
            compute_loss_func=compute_loss_func(CONSTANT),
        )
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(100)

    def test_loops_of_ones_own_may_call_it_without_labels(self, model, batch):
        """And compute what they like from the logits; another model's trainer around them changes nothing."""
        attach(model)

        class Nested(Trainer):
            def compute_loss(self, other: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
                return model(input_ids=batch["input_ids"]).logits.sum()

        assert model(input_ids=batch["input_ids"]).logits.requires_grad
        trainer = Nested.__new__(Nested)
        trainer.model = torch.nn.Linear(1, 1)
        assert trainer.compute_loss(None, {}).requires_grad


def mask_of(labels: torch.Tensor) -> torch.Tensor:
    return (torch.rand(labels.shape, generator=torch.Generator().manual_seed(0)) > 0.4).float()


class TestLossMask:
    @pytest.mark.parametrize(
        ("way", "accumulation"),
        [*itertools.product(["attach", "fused", "compute_loss_func"], [1, 3]), ("compiled", 1)],
    )
    def test_zero_is_the_label_that_is_ignored(self, way, accumulation, tmp_path):
        """In a Trainer, whose number of tokens counts the masked ones: the gradients of the same labels as -100."""

        layers = 1 if way == "compiled" else 2

        def gradients(batch: dict[str, torch.Tensor], way: str) -> Any:
            model = tiny_models.build(layers=layers, sharpness=3)
            args = arguments(
                tmp_path,
                per_device_train_batch_size=3 // accumulation,
                gradient_accumulation_steps=accumulation,
                remove_unused_columns=False,
                **({"torch_compile": True, "torch_compile_backend": "eager"} if way == "compiled" else {}),
            )
            torch.compiler.reset()
            if way == "compute_loss_func":
                return trained_gradients(model, args, batch, compute_loss_func=compute_loss_func())
            with attach(model, fused=way == "fused"):
                return trained_gradients(model, args, batch)

        batch = tiny_models.ragged_batch(tiny_models.build(layers=layers, sharpness=3))
        mask = mask_of(batch["labels"])
        ignored = {**batch, "labels": batch["labels"].masked_fill(mask == 0, -100)}
        expected = gradients(ignored, "attach" if way == "compiled" else way)
        torch.testing.assert_close(gradients({**batch, "loss_mask": mask}, way), expected, rtol=1e-5, atol=1e-6)

    def test_the_trainers_evaluation_counts_alike(self, model, batch, tmp_path):
        """eval_loss with a mask is that of the ignored labels."""
        mask = mask_of(batch["labels"])
        args = arguments(tmp_path, per_device_eval_batch_size=3, remove_unused_columns=False)
        attach(model)
        losses = [
            Trainer(model=model, args=args, eval_dataset=rows(given)).evaluate()["eval_loss"]
            for given in (
                {**batch, "loss_mask": mask},
                {**batch, "labels": batch["labels"].masked_fill(mask == 0, -100)},
            )
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)

    def test_a_number_of_ones_own_stays(self, model, batch):
        """Outside of a Trainer num_items_in_batch is what the caller says."""
        mask = mask_of(batch["labels"])
        with attach(model):
            one, two = (model(**batch, loss_mask=mask, num_items_in_batch=number).loss for number in (1, 2))
        torch.testing.assert_close(one, 2 * two)


class TestCollator:
    def features(self) -> list[dict[str, list[float]]]:
        return [
            {"input_ids": [3, 4, 5, 6], "labels": [-100, 4, 5, 6], "loss_mask": [1.0, 1.0, 0.0, 0.5]},
            {"input_ids": [7, 8], "labels": [7, 8], "loss_mask": [1.0, 0.0]},
        ]

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_pads_the_mask_as_the_labels(self, side):
        """With 0, on the tokenizer's side; and a masked token is one that is ignored. Features stay as they are."""
        tokenizer = word_tokenizer()
        tokenizer.padding_side = side
        features = self.features()
        batch = DataCollatorWithLossMask(tokenizer)(features)
        pad = [(7, 1.0, 7), (8, 0.0, -100)]
        ragged = pad + [(0, 0.0, -100)] * 2 if side == "right" else [(0, 0.0, -100)] * 2 + pad
        for name, place in (("input_ids", 0), ("loss_mask", 1), ("labels", 2)):
            assert batch[name][1].tolist() == [entry[place] for entry in ragged]
        assert batch["labels"][0].tolist() == [-100, 4, -100, 6]
        assert batch["loss_mask"][0].tolist() == [1.0, 1.0, 0.0, 0.5]
        assert features == self.features()

    def test_a_mask_of_another_length_is_refused(self):
        """By name."""
        with pytest.raises(ValueError, match="loss_mask must have one weight for each of the 4 labels, got 3"):
            DataCollatorWithLossMask(word_tokenizer())([{**self.features()[0], "loss_mask": [1, 1, 1]}])

    @pytest.mark.parametrize("way", ["attach", "compute_loss_func"])
    def test_ragged_rows_train(self, way, tmp_path):
        """A Trainer's loss is the weighted sum over the tokens that count."""
        model = tiny_models.build()
        features = self.features()
        # Trainers of older versions count the first label, which nothing predicts.
        features[1]["labels"][0] = -100
        given: dict[str, Any] = {}
        if way == "attach":
            attach(model, CONSTANT)
        else:
            given["compute_loss_func"] = compute_loss_func(CONSTANT)
        trainer = Trainer(
            model=model,
            args=arguments(tmp_path, per_device_train_batch_size=2, remove_unused_columns=False),
            train_dataset=features,
            data_collator=DataCollatorWithLossMask(word_tokenizer()),
            **given,
        )
        trainer.train()
        # Of the second tokens and later ones, one weighs 1 and one weighs 0.5.
        assert trainer.state.log_history[0]["loss"] == pytest.approx(100 * 1.5 / 2)


class Count(TrainerCallback):
    """Steps that a run really took."""

    steps = 0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps += 1


class TestHalfPrecisionOnACpu:
    def test_a_hold_under_fp16_trains(self, model, batch, tmp_path: Path):
        """There is no gradient scaler on a CPU, and so nothing that fails on a step without gradients."""
        count = Count()
        callback = TokenStatesCallback(HELD)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        attach(model, HELD, observer=callback.observe)
        trainer = Trainer(
            model=model,
            args=arguments(tmp_path, fp16=True, max_steps=2),
            train_dataset=rows(batch),
            callbacks=[callback, count],
        )
        trainer.train()
        assert count.steps == 2
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name])
