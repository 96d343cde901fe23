"""Trainer and SFTTrainer: accumulation gives the gradient of the whole batch, the callback logs and stops."""

from __future__ import annotations

import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_trainer import Gradients, arguments, gradients_of, rows, trained_gradients, word_tokenizer
from transformers import Trainer, TrainerCallback

from overtone import OverToneConfig, token_states
from overtone.functional import reference_loss
from overtone.huggingface import TokenStatesCallback, attach, causal_lm_loss, compute_loss_func

trl = pytest.importorskip("trl", reason="TRL is not in EasyEdit's environment, where other tests are collected")
SFTConfig, SFTTrainer = trl.SFTConfig, trl.SFTTrainer

HELD = OverToneConfig(epsilon=50.0, hold="settled")


def batch_with_an_ignored_row(model: Any) -> dict[str, torch.Tensor]:
    batch = tiny_models.ragged_batch(model, lengths=(9, 5, 7, 3))
    batch["labels"][1] = -100
    return batch


class TestAccumulation:
    @pytest.mark.parametrize("way", ["attach", "compute_loss_func", "attach to peft"])
    @pytest.mark.parametrize("micro_batch", [1, 2, 4])
    def test_micro_batches_give_the_gradient_of_one_batch(self, way, micro_batch, tmp_path):
        """Ragged rows, one of them all ignored, split in every way: the gradient of the literal loss to 1e-6."""
        model = tiny_models.build(sharpness=3)
        batch = batch_with_an_ignored_row(model)
        if way == "attach to peft":
            model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        expected = gradients_of(reference_loss(outputs.logits[:, :-1], batch["labels"][:, 1:]), model)

        args = arguments(
            tmp_path, per_device_train_batch_size=micro_batch, gradient_accumulation_steps=4 // micro_batch
        )
        if way == "compute_loss_func":
            gradients = trained_gradients(model, args, batch, compute_loss_func=compute_loss_func())
        else:
            with attach(model):
                gradients = trained_gradients(model, args, batch)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            scale = expected[name].abs().max().clamp(min=1)
            torch.testing.assert_close(gradient / scale, expected[name] / scale, rtol=0, atol=1e-6)

    def test_auxiliary_loss_of_a_mixture_of_experts_stays(self, tmp_path):
        """Both ways of using the loss train with the model's own auxiliary loss."""
        gradients = {}
        for way in ("attach", "compute_loss_func"):
            model = tiny_models.build("mixtral", sharpness=3)
            batch = batch_with_an_ignored_row(model)
            args = arguments(tmp_path, per_device_train_batch_size=4)
            if way == "attach":
                with attach(model):
                    gradients[way] = trained_gradients(model, args, batch)
            else:
                compute = compute_loss_func(router_aux_loss_coef=model.config.router_aux_loss_coef)
                gradients[way] = trained_gradients(model, args, batch, compute_loss_func=compute)
        outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        for name, gradient in gradients["attach"].items():
            torch.testing.assert_close(gradient, gradients["compute_loss_func"][name], rtol=1e-5, atol=1e-6)
        assert outputs.aux_loss > 0

    def test_mixture_of_experts_without_its_weight_is_refused(self, tmp_path):
        """Trainer leaves the auxiliary loss to the function, which does not drop it."""
        model = tiny_models.build("mixtral")
        with pytest.raises(ValueError, match="router_aux_loss_coef must be given"):
            trained_gradients(
                model, arguments(tmp_path), tiny_models.ragged_batch(model), compute_loss_func=compute_loss_func()
            )

    def test_held_steps_leave_the_model_bit_for_bit(self, tmp_path):
        """AdamW with weight decay moves nothing, since no parameter has a gradient."""
        model = tiny_models.build()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        args = arguments(tmp_path, max_steps=3, weight_decay=0.1, gradient_accumulation_steps=2, max_grad_norm=1.0)
        gradients = trained_gradients(
            model, args, tiny_models.ragged_batch(model), compute_loss_func=compute_loss_func(HELD)
        )
        assert set(gradients.values()) == {None}
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name])

    def test_without_the_hold_the_same_steps_move_it(self, tmp_path):
        """The control: zeros are gradients to AdamW."""
        model = tiny_models.build()
        before = model.lm_head.weight.clone()
        config = OverToneConfig(epsilon=50.0)
        args = arguments(tmp_path, max_steps=1, weight_decay=0.1)
        trained_gradients(model, args, tiny_models.ragged_batch(model), compute_loss_func=compute_loss_func(config))
        assert not torch.equal(model.lm_head.weight, before)


class Recorder(TrainerCallback):
    """What a reporter such as TensorBoard would be given."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs or {}))


class TestTokenStatesCallback:
    NAMES = ("share_settled", "share_mixed", "mean_kl", "accuracy")

    @pytest.mark.parametrize("way", ["attach", "compute_loss_func"])
    def test_logs_the_states_where_trainer_logs_its_loss(self, way, tmp_path):
        """Averages over the tokens of all micro-batches of the step, in the history and for later reporters."""
        config = OverToneConfig(epsilon=0.5)
        model = tiny_models.build()
        batch = batch_with_an_ignored_row(model)
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        states = token_states(logits[:, :-1], batch["labels"][:, 1:], config)
        tokens = states.counted.sum()
        expected = [field.sum() / tokens for field in (states.settled, states.mixed, states.kl, states.correct)]
        assert 0 < expected[0] < 1
        assert 0 < expected[1] < 1

        callback, recorder = TokenStatesCallback(config), Recorder()
        given: dict[str, Any] = {}
        if way == "attach":
            attach(model, config, observer=callback.observe)
        else:
            given["compute_loss_func"] = compute_loss_func(config, observer=callback.observe)
        args = arguments(tmp_path, gradient_accumulation_steps=4)
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=rows(batch),
            eval_dataset=rows(batch),
            callbacks=[callback, recorder],
            **given,
        )
        trainer.train()
        trainer.evaluate()
        for logs in (trainer.state.log_history[0], recorder.logs[0]):
            assert "loss" in logs
            assert [logs[name] for name in self.NAMES] == pytest.approx([value.item() for value in expected])
        for logs in recorder.logs[1:]:
            assert not set(self.NAMES) & set(logs)

    def test_each_log_covers_its_own_steps(self):
        """Nothing is carried over from the last log, and evaluation's logs, which come between, take nothing."""
        callback = TokenStatesCallback()
        args = types.SimpleNamespace(fp16=False, device=torch.device("cpu"))
        state, control = types.SimpleNamespace(log_history=[{}]), types.SimpleNamespace()
        labels = torch.tensor([1, 1, 1, -100])
        wrong, right = torch.tensor([[9.0, 0.0]]).repeat(4, 1), torch.tensor([[0.0, 9.0]]).repeat(4, 1)
        logged = []
        callback.on_train_begin(args, state, control)
        for logits in (wrong, right, wrong):
            callback.observe(logits, labels)
            callback.on_step_end(args, state, control)
            evaluation: dict[str, float] = {"eval_loss": 1.0}
            callback.on_log(args, state, control, logs=evaluation)
            assert set(evaluation) == {"eval_loss"}
            training: dict[str, float] = {"loss": 1.0}
            callback.on_log(args, state, control, logs=training)
            logged.append(training["accuracy"])
        assert logged == [0, 1, 0]

    def test_averages_over_the_steps_between_logs(self, tmp_path):
        """As Trainer's loss does."""
        model = tiny_models.build()
        batch = tiny_models.ragged_batch(model)
        config = OverToneConfig(epsilon=0.5)
        callback = TokenStatesCallback(config)
        args = arguments(tmp_path, max_steps=3, logging_steps=3, learning_rate=0.0)
        compute = compute_loss_func(config, observer=callback.observe)
        trainer = Trainer(
            model=model, args=args, train_dataset=rows(batch), compute_loss_func=compute, callbacks=[callback]
        )
        trainer.train()
        states = token_states(model(input_ids=batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:], config)
        logged = trainer.state.log_history[0]
        assert logged["accuracy"] == pytest.approx((states.correct.sum() / states.counted.sum()).item())

    @pytest.mark.parametrize(("hold", "epsilon"), [(None, 50.0), ("settled", 50.0), (100.0, 1e-6)])
    def test_stops_when_the_batch_has_been_held(self, hold, epsilon, tmp_path):
        """After the given number of held steps in a row, with or without the hold in the loss itself."""
        config = OverToneConfig(epsilon=epsilon, hold=hold)
        model = tiny_models.build()
        batch = tiny_models.ragged_batch(model)
        callback = TokenStatesCallback(config, stop_after_held=3)
        compute = compute_loss_func(config, observer=callback.observe)
        args = arguments(tmp_path, max_steps=9)
        trainer = Trainer(
            model=model, args=args, train_dataset=rows(batch), compute_loss_func=compute, callbacks=[callback]
        )
        trainer.train()
        assert trainer.state.global_step == 3
        trainer.train()
        assert trainer.state.global_step == 3

    @pytest.mark.parametrize(
        ("hold", "epsilon"),
        [("settled", 1e-6), (1e-6, 50.0), (("correct", 100.0), 50.0), ("correct", 0.0)],
    )
    def test_does_not_stop_while_there_is_something_to_learn(self, hold, epsilon, tmp_path):
        """One token that is not settled is enough, a mean KL above the number, or a token that is not said yet."""
        config = OverToneConfig(epsilon=epsilon, hold=hold)
        model = tiny_models.build()
        callback = TokenStatesCallback(config, stop_after_held=1)
        compute = compute_loss_func(config, observer=callback.observe)
        args = arguments(tmp_path, max_steps=4, learning_rate=0.0)
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=rows(tiny_models.ragged_batch(model)),
            compute_loss_func=compute,
            callbacks=[callback],
        )
        trainer.train()
        assert trainer.state.global_step == 4

    @pytest.mark.parametrize(("hold", "epsilon"), [("settled", 0.1), (0.3, 0.1)])
    def test_a_step_is_held_when_each_micro_batch_is(self, hold, epsilon):
        """As the loss decides: one micro-batch that sends a gradient is enough, though the step's mean KL is small."""
        config = OverToneConfig(epsilon=epsilon, hold=hold)
        callback = TokenStatesCallback(config, stop_after_held=1)
        control = types.SimpleNamespace(should_training_stop=False)
        labels = torch.ones(1, 8, dtype=torch.long)
        unsure, sure = torch.tensor([[[0.0, 1.0]]]).repeat(1, 8, 1), torch.tensor([[[0.0, 20.0]]]).repeat(1, 8, 1)
        for micro_batches, is_held in (([unsure, sure, sure], False), ([sure, sure], True)):
            losses = []
            for logits in micro_batches:
                logits = logits.clone().requires_grad_()
                causal_lm_loss(logits, labels, config, observer=callback.observe).backward()
                losses.append(logits.grad)
            assert all(gradient is None for gradient in losses) == is_held
            callback.on_step_end(None, None, control)
            assert control.should_training_stop == is_held

    def test_a_step_without_tokens_is_not_held(self):
        """Nothing to learn from is not the same as learned."""
        callback = TokenStatesCallback(HELD, stop_after_held=1)
        args = types.SimpleNamespace(device=torch.device("cpu"))
        control = types.SimpleNamespace(should_training_stop=False)
        callback.on_step_end(args, None, control)
        callback.observe(torch.randn(1, 2, 5), torch.full((1, 2), -100))
        callback.on_step_end(args, None, control)
        assert not control.should_training_stop

    def test_says_so_when_the_loss_does_not_show_it_its_tokens(self, tmp_path):
        """Once, with the argument that was forgotten."""
        model = tiny_models.build()
        trainer = Trainer(
            model=model,
            args=arguments(tmp_path, max_steps=3),
            train_dataset=rows(tiny_models.ragged_batch(model)),
            compute_loss_func=compute_loss_func(),
            callbacks=[TokenStatesCallback()],
        )
        with pytest.warns(UserWarning, match=r"observer=callback\.observe") as caught:
            trainer.train()
        assert sum("TokenStatesCallback" in str(warning.message) for warning in caught) == 1
        assert "accuracy" not in trainer.state.log_history[0]

    def test_a_hold_under_fp16_is_refused(self):
        """torch's gradient scaler fails on a held step, as the control shows."""
        model = tiny_models.build()
        optimizer = torch.optim.AdamW(model.parameters())
        scaler = torch.amp.GradScaler("cpu")
        with attach(model, HELD):
            scaler.scale(model(**tiny_models.ragged_batch(model)).loss).backward()
        with pytest.raises(AssertionError, match="No inf checks were recorded"):
            scaler.step(optimizer)
        callback, fp16 = TokenStatesCallback(HELD), types.SimpleNamespace(fp16=True, device=torch.device("cuda"))
        with pytest.raises(ValueError, match="hold='settled' cannot be used with fp16=True"):
            callback.on_train_begin(fp16, None, None)
        TokenStatesCallback().on_train_begin(fp16, None, None)

    @pytest.mark.parametrize(
        ("value", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)]
    )
    def test_a_number_of_steps_that_is_none_is_refused(self, value, error):
        """By name."""
        with pytest.raises(error, match="stop_after_held"):
            TokenStatesCallback(stop_after_held=value)


class TestSFTTrainer:
    TEXTS = (
        {"prompt": "w3 w4 w5", "completion": " w6 w7"},
        {"prompt": "w8", "completion": " w9 w10 w11 w12"},
        {"prompt": "w13 w14", "completion": " w15"},
    )

    def config(self, folder: Path, **changes: Any) -> SFTConfig:
        settings = {
            "output_dir": str(folder),
            "per_device_train_batch_size": 3,
            "max_steps": 1,
            "max_grad_norm": 0,
            "learning_rate": 0.05,
            "report_to": "none",
            "save_strategy": "no",
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
        }
        return SFTConfig(**{**settings, **changes})

    def gradients(self, model: Any, config: SFTConfig, **given: Any) -> tuple[Any, Any]:
        recorder = Gradients()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            trainer = SFTTrainer(
                model=model,
                args=config,
                train_dataset=Dataset.from_list(list(self.TEXTS)),
                processing_class=word_tokenizer(),
                callbacks=[recorder],
                **given,
            )
            trainer.train()
        return recorder.values, trainer

    @pytest.mark.parametrize("accumulation", [1, 3])
    def test_the_recipe_gives_the_literal_gradient(self, accumulation, tmp_path):
        """compute_loss_func on the completion tokens, whole batch or one row at a time, to 1e-6."""
        model = tiny_models.build(sharpness=3)
        tokenizer = word_tokenizer()
        loss_tokens = 0
        total = torch.zeros(())
        for text in self.TEXTS:
            prompt, completion = (tokenizer(text[part])["input_ids"] for part in ("prompt", "completion"))
            ids = torch.tensor([prompt + completion + [tokenizer.eos_token_id]])
            labels = ids.clone()
            labels[:, : len(prompt)] = -100
            total = total + reference_loss(model(input_ids=ids).logits[:, :-1], labels[:, 1:], reduction="sum")
            loss_tokens += int(labels[:, 1:].ne(-100).sum())
        expected = gradients_of(total / loss_tokens, model)
        config = self.config(
            tmp_path, per_device_train_batch_size=3 // accumulation, gradient_accumulation_steps=accumulation
        )
        gradients, _ = self.gradients(model, config, compute_loss_func=compute_loss_func())
        for name, gradient in gradients.items():
            scale = expected[name].abs().max().clamp(min=1)
            torch.testing.assert_close(gradient / scale, expected[name] / scale, rtol=0, atol=1e-6)

    def test_an_attached_model_alone_is_refused_by_name(self, tmp_path):
        """SFTTrainer's fused head would bypass it without a word."""
        model = tiny_models.build()
        attach(model)
        with pytest.raises(RuntimeError, match=r"bypassed by TRL's fused LM head.*compute_loss_func"):
            self.gradients(model, self.config(tmp_path))

    def test_chunked_nll_with_the_function_still_trains_on_it(self, tmp_path):
        """Where TRL gives the logits all the same, the loss is the function's, and never a silent other one."""
        model = tiny_models.build()
        _, trainer = self.gradients(
            model,
            self.config(tmp_path, loss_type="chunked_nll", logging_steps=1),
            compute_loss_func=compute_loss_func(OverToneConfig(epsilon=50.0)),
        )
        assert trainer.state.log_history[0]["loss"] == pytest.approx(50)

    def test_the_callback_logs_here_as_well(self, tmp_path):
        """The metrics forward without gradients is not counted twice."""
        model = tiny_models.build()
        callback = TokenStatesCallback(OverToneConfig(epsilon=50.0), stop_after_held=2)
        compute = compute_loss_func(callback.config, observer=callback.observe)
        trainer = SFTTrainer(
            model=model,
            args=self.config(tmp_path, max_steps=5, logging_steps=1),
            train_dataset=Dataset.from_list(list(self.TEXTS)),
            processing_class=word_tokenizer(),
            compute_loss_func=compute,
            callbacks=[callback],
        )
        trainer.train()
        assert trainer.state.global_step == 2
        assert trainer.state.log_history[0]["share_settled"] == 1

    def test_aux_loss_of_a_mixture_of_experts(self, tmp_path):
        """With SFTTrainer too, the function is the one that adds it."""
        model = tiny_models.build("mixtral")
        with pytest.raises(ValueError, match="router_aux_loss_coef must be given"):
            self.gradients(model, self.config(tmp_path), compute_loss_func=compute_loss_func())


class TestLossMaskInTraining:
    def test_a_mask_column_reaches_an_attached_model(self, tmp_path):
        """With remove_unused_columns=False the Trainer passes loss_mask on to the forward."""
        model = tiny_models.build(sharpness=3)
        batch = tiny_models.ragged_batch(model)
        mask = (torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(0)) > 0.4).float()
        outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        loss = causal_lm_loss(outputs.logits, batch["labels"], loss_mask=mask)
        expected = gradients_of(loss, model)
        with attach(model):
            args = arguments(tmp_path, gradient_accumulation_steps=3, remove_unused_columns=False)
            gradients = trained_gradients(model, args, {**batch, "loss_mask": mask})
        for name, gradient in gradients.items():
            scale = expected[name].abs().max().clamp(min=1)
            torch.testing.assert_close(gradient / scale, expected[name] / scale, rtol=0, atol=1e-6)
