"""attach(fused=True): the loss and gradients of the unfused one, no logits, nothing left; and what is refused."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from datasets import Dataset
from largest_tensor import LargestTensor
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from overtone import OverToneConfig, linear
from overtone.huggingface import attach, detach

SIZES: dict[str, Any] = {
    "vocab_size": tiny_models.VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


@pytest.fixture
def process_group() -> Any:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def loss_and_gradients(model: Any, inputs: dict[str, Any], *, inside: Any = None, **options: Any) -> Any:
    """Of one training step with the loss attached to the model."""
    model.zero_grad()
    with attach(model, **options):
        loss = (model if inside is None else inside)(**inputs).loss
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_fused_is_unfused(model: Any, inputs: dict[str, Any], rtol: float = 1e-10, **options: Any) -> Any:
    loss, gradients = loss_and_gradients(model, inputs, **options)
    fused_loss, fused_gradients = loss_and_gradients(model, inputs, fused=True, **options)
    torch.testing.assert_close(fused_loss, loss, rtol=rtol, atol=rtol)
    assert set(fused_gradients) == set(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(fused_gradients[name], gradient, rtol=rtol, atol=rtol, msg=name)
    return fused_gradients


class TestLoss:
    @pytest.mark.parametrize("arch", tiny_models.ARCHITECTURES)
    def test_is_the_unfused_loss(self, arch):
        """Value and every gradient, tied heads and a mixture of experts' auxiliary loss included."""
        if arch == "gpt2" and Version(transformers.__version__) < Version("4.53"):
            pytest.skip(f"GPT-2 of transformers {transformers.__version__} makes no attention mask in float64")
        # torch multiplies experts' matrices in no higher precision than float32.
        dtype, rtol = (torch.float32, 1e-4) if arch == "mixtral" else (torch.float64, 1e-10)
        model = tiny_models.build(arch, dtype=dtype)
        inputs = tiny_models.ragged_batch(model)
        assert_fused_is_unfused(model, inputs, rtol)
        assert_fused_is_unfused(model, inputs, rtol, config=OverToneConfig(epsilon=0, lam=1))

    def test_bfloat16_is_as_exact_as_unfused(self):
        """The error against float64 is at most the unfused one's, and a rounding."""
        exact_model = tiny_models.build(dtype=torch.bfloat16).double()
        model = copy.deepcopy(exact_model).bfloat16()
        inputs = tiny_models.ragged_batch(exact_model)
        _, exact = loss_and_gradients(exact_model, inputs)
        exact = {name: gradient.clone() for name, gradient in exact.items()}
        _, unfused = loss_and_gradients(model, inputs)
        _, fused = loss_and_gradients(model, inputs, fused=True)
        for name, truth in exact.items():
            allowed = (unfused[name] - truth).abs().max() + torch.finfo(torch.bfloat16).eps * truth.abs().max()
            assert (fused[name] - truth).abs().max() <= allowed

    @pytest.mark.parametrize("given", ["num_items_in_batch", "shift_labels", "loss_mask", "all ignored"])
    def test_takes_what_the_unfused_loss_takes(self, given):
        """Through the forward, with padding, and when no token counts."""
        model = tiny_models.build(dtype=torch.float64)
        inputs: dict[str, Any] = dict(tiny_models.ragged_batch(model))
        if given == "num_items_in_batch":
            inputs[given] = torch.tensor(5)
        elif given == "shift_labels":
            inputs[given] = inputs["labels"].flip(0)
        elif given == "loss_mask":
            inputs[given] = torch.linspace(0, 2, inputs["labels"].numel()).reshape(inputs["labels"].shape).double()
        else:
            inputs["labels"] = torch.full_like(inputs["labels"], -100)
        assert_fused_is_unfused(model, inputs)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_gradient_checkpointing_and_a_lora_adapter(self, use_reentrant):
        """The frozen output layer gets no gradient; the adapter's are those of the unfused loss."""
        model = tiny_models.build(dtype=torch.float64)
        inputs = tiny_models.ragged_batch(model)
        lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        peft_model = get_peft_model(model, lora).double().train()
        peft_model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        peft_model.enable_input_require_grads()
        gradients = assert_fused_is_unfused(peft_model, inputs)
        assert gradients
        assert all("lora" in name for name in gradients)

    def test_autocast(self, model, batch):
        """The layer works in bfloat16, and float32 weights get float32 gradients, as unfused."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            gradients = assert_fused_is_unfused(model, batch, rtol=0.02)
        assert gradients["lm_head.weight"].dtype == torch.float32

    def test_hold(self, model, batch):
        """A held step leaves no gradient at all."""
        _, gradients = loss_and_gradients(model, batch, config=OverToneConfig(epsilon=50, hold="settled"), fused=True)
        assert not gradients

    def test_compiled(self):
        """The model inside torch.compile, whose graph breaks at the loss."""
        model = tiny_models.build(layers=1)
        batch = tiny_models.ragged_batch(model)
        expected, gradients = loss_and_gradients(model, batch)
        gradients = {name: gradient.clone() for name, gradient in gradients.items()}
        compiled = torch.compile(model, backend="aot_eager")
        loss, fused_gradients = loss_and_gradients(model, batch, fused=True, inside=compiled)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(fused_gradients, gradients)
        torch._dynamo.reset()


class TestLogits:
    def test_are_never_made_in_a_training_step(self, model, batch, monkeypatch):
        """Not the largest operation of the forward and backward is as large as they are; the unfused loss' is."""
        monkeypatch.setattr(linear, "CHUNK_ELEMENTS", 4 * tiny_models.VOCABULARY)
        size = batch["labels"].numel() * tiny_models.VOCABULARY
        largest = {}
        for fused in (False, True):
            with attach(model, fused=fused), LargestTensor() as seen:
                outputs = model(**batch)
                outputs.loss.backward()
            largest[fused] = seen.elements
        assert outputs.logits is None
        assert "logits" not in outputs
        assert largest[True] < size <= largest[False]

    def test_are_none_in_a_tuple(self, model, batch):
        """return_dict=False keeps the places."""
        with attach(model, fused=True):
            loss, logits = model(**batch, return_dict=False, use_cache=False)
        assert logits is None
        assert loss.requires_grad

    def test_are_there_without_labels_and_without_gradients(self, model, batch):
        """As ever, bit for bit: for generation, metrics and evaluation."""
        unlabelled = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            expected = model(**unlabelled).logits
            with attach(model):
                loss = model(**batch).loss
            with attach(model, fused=True):
                outputs = model(**batch)
        assert torch.equal(outputs.logits, expected)
        assert outputs.loss == loss
        prompt = batch["input_ids"][:1, :4]
        generated = model.generate(prompt, max_new_tokens=5, do_sample=False)
        with attach(model, fused=True):
            assert torch.equal(model(**unlabelled).logits, expected)
            assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False), generated)

    def test_labels_without_a_name_are_not_fused(self, model, batch):
        """Given by position they go the unfused way, to the same loss."""
        with attach(model, fused=True):
            named = model(**batch).loss
            outputs = model(batch["input_ids"], batch["attention_mask"], None, None, None, batch["labels"])
        assert outputs.logits is not None
        torch.testing.assert_close(outputs.loss, named)


class TestNothingIsLeft:
    def state(self, model: Any) -> Any:
        head = model.get_output_embeddings()
        return [
            {name: dict(value) if "hooks" in name else value for name, value in module.__dict__.items()}
            for module in (model, head)
        ]

    def test_detach_restores_exactly(self, model, batch):
        """The dictionaries and hooks of model and output layer are what they were; methods never change."""
        before = self.state(model)
        handle = attach(model, fused=True)
        model(**batch).loss.backward()
        assert "forward" not in model.__dict__
        assert "forward" not in model.lm_head.__dict__
        handle.detach()
        assert self.state(model) == before

    def test_an_error_in_the_forward_leaves_nothing(self, model, batch):
        """After a loss or a layer that raised, the next forward and the bare output layer are as ever."""
        hidden = torch.randn(1, 3, 16)
        expected = model.lm_head(hidden)
        before = self.state(model)
        handle = attach(model, fused=True)
        with pytest.raises(ValueError, match="labels must lie in"):
            model(**{**batch, "labels": torch.full_like(batch["labels"], 1000)})
        assert torch.equal(model.lm_head(hidden), expected)

        def fail(*_: Any) -> None:
            raise KeyError("inside")

        hook = model.model.norm.register_forward_hook(fail)
        with pytest.raises(KeyError):
            model(**batch)
        hook.remove()
        assert torch.equal(model.lm_head(hidden), expected)
        assert model(input_ids=batch["input_ids"]).logits.shape[1] == batch["input_ids"].shape[1]
        assert model(**batch).logits is None
        handle.detach()
        assert self.state(model) == before

    def test_an_interrupt_in_the_forward_is_forgotten(self, model, batch):
        """Ctrl-C ends a forward without its hooks; the next one is as ever all the same."""

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        with attach(model, fused=True):
            hook = model.model.norm.register_forward_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(**batch)
            hook.remove()
            assert model(input_ids=batch["input_ids"]).logits.shape[1] == batch["input_ids"].shape[1]

    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (2, 0, 1)])
    def test_among_other_attachments(self, model, batch, order):
        """The newest attachment that is left computes the loss, and the last fused one takes the hooks along."""
        before = self.state(model)
        kinds = (True, False, True)
        handles = [attach(model, OverToneConfig(epsilon=50.0 + n), fused=fused) for n, fused in enumerate(kinds)]
        left = {0, 1, 2}
        for which in order:
            outputs = model(**batch)
            assert outputs.loss.item() == pytest.approx(50 + max(left))
            assert (outputs.logits is None) == kinds[max(left)]
            handles[which].detach()
            left.remove(which)
            assert bool(model.lm_head._forward_pre_hooks) == any(kinds[number] for number in left)
        assert self.state(model) == before

    def test_a_deep_copy_is_independent(self, model, batch):
        """Both stay fused; detaching one leaves the other."""
        handle = attach(model, fused=True)
        expected = model(**batch).loss
        twin = copy.deepcopy(model)
        handle.detach()
        outputs = twin(**batch)
        assert outputs.logits is None
        assert outputs.loss == expected
        assert model(**batch).logits is not None
        detach(twin)
        assert set(twin.__dict__) == set(model.__dict__)
        for module in (twin, twin.lm_head):
            assert not module._forward_hooks
            assert not module._forward_pre_hooks

    def test_a_whole_model_can_be_saved(self, model, batch, tmp_path):
        """Pickled it stays fused, and comes off on the other side; save_pretrained writes nothing of it."""
        model.save_pretrained(tmp_path / "plain")
        attach(model, fused=True)
        model.save_pretrained(tmp_path / "attached")
        for written in (tmp_path / "plain").iterdir():
            assert written.read_bytes() == (tmp_path / "attached" / written.name).read_bytes()
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert loaded(**batch).logits is None
        detach(loaded)
        assert loaded(**batch).logits is not None
        for module in (loaded, loaded.lm_head):
            for name, hooks in module.__dict__.items():
                assert "hooks" not in name or not hooks

    def test_a_loss_assigned_on_top_gets_logits(self, model, batch):
        """The user's latest choice is called as ever, and may call the attached one."""
        handle = attach(model, fused=True)
        attached = model.loss_function
        model.loss_function = lambda logits, labels, **given: 2 * attached(logits, labels, **given)
        outputs = model(**batch)
        assert outputs.logits is not None
        model.loss_function = attached
        torch.testing.assert_close(outputs.loss, 2 * model(**batch).loss)
        handle.detach()


class Quantised(nn.Linear):
    """As bitsandbytes derives its layers from Linear."""


class QuantisedWeight(torch.Tensor):
    """As torchao puts one into a plain Linear."""


def change_logits(model: Any, change: Any) -> Any:
    """A model whose forward changes what its output layer returns."""

    class Changed(LlamaForCausalLM):
        def forward(self, input_ids: Any, labels: Any = None, **kwargs: Any) -> Any:
            outputs = super().forward(input_ids, **kwargs)
            logits = change(self, outputs)
            outputs.loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1])
            return outputs

    return Changed(model.config)


class TestRefusal:
    def refuse(self, model: Any, message: str, *, inside: Any = None) -> None:
        before = [(name, dict(m.__dict__), dict(m._forward_pre_hooks)) for name, m in model.named_modules()]
        with pytest.raises(ValueError, match=message):
            attach(inside or model, fused=True)
        assert [(name, dict(m.__dict__), dict(m._forward_pre_hooks)) for name, m in model.named_modules()] == before

    @pytest.mark.parametrize(
        "config",
        [
            Gemma2Config(**SIZES, head_dim=8),
            Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0**14),
            CohereConfig(**SIZES),
            GraniteConfig(**SIZES, logits_scaling=8.0),
        ],
        ids=["gemma2", "gemma2 with a high cap", "cohere", "granite"],
    )
    def test_logits_that_are_capped_or_scaled(self, config):
        """By the model's name; a cap far above its small random logits leaves them as they are, bit for bit."""
        model = AutoModelForCausalLM.from_config(config)
        self.refuse(model, rf"fused cannot be True for {type(model).__name__}, which changes its logits")
        attach(model).detach()

    def test_logits_that_are_cut(self, model):
        """What reaches the loss must be all that the layer returned."""
        changed = change_logits(model, lambda _, outputs: outputs.logits[..., :50])
        self.refuse(changed, r"Changed, which changes its logits .*slice")

    def test_an_output_layer_that_is_called_twice(self, model):
        """The loss would get one call's hidden states."""

        def call_again(changed: Any, outputs: Any) -> torch.Tensor:
            changed.lm_head(torch.zeros(1, 1, 16))
            return outputs.logits

        self.refuse(change_logits(model, call_again), "Changed, whose forward calls its output layer 2 times")

    def test_an_adapter_on_the_output_layer(self, model):
        """PEFT's, as an adapter or as a trained copy."""
        lora = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
        self.refuse(lora, r"output layer of type peft\.tuners\.lora.*, no plain torch.nn.Linear")
        copied = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
        self.refuse(copied, r"output layer of type peft.*ModulesToSaveWrapper")

    def test_an_output_layer_that_is_no_plain_linear(self, model):
        """Subclasses compute something else, and so do tensors of their own type, hooks and replaced forwards."""
        head = model.lm_head
        model.lm_head = Quantised(16, tiny_models.VOCABULARY)
        self.refuse(model, r"output layer of type .*Quantised")
        model.lm_head = nn.Linear(16, tiny_models.VOCABULARY)
        model.lm_head.weight = nn.Parameter(head.weight.detach().as_subclass(QuantisedWeight))
        self.refuse(model, "parameters are of type QuantisedWeight")
        model.lm_head = head
        hook = head.register_forward_hook(lambda *_: None)
        self.refuse(model, "forward hooks on its output layer")
        hook.remove()
        head.forward = head.forward
        self.refuse(model, r"forward is replaced .*device_map")

    def test_parameters_that_are_not_here(self, model):
        """DeepSpeed's, and those that are not loaded yet."""
        with torch.device("meta"):
            unloaded = AutoModelForCausalLM.from_config(tiny_models.CONFIGS["llama"]())
        self.refuse(unloaded, "parameters that are not all here: the meta device")
        model.lm_head.weight.ds_id = 0
        self.refuse(model, "parameters that are not all here: DeepSpeed ZeRO-3")

    def test_fsdp(self, model, process_group):
        """Either version; the second one also if it comes after attach."""
        twin, third = copy.deepcopy(model), copy.deepcopy(model)
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        self.refuse(fully_shard(twin, mesh=mesh), "not all here: DTensor parameters")
        attach(third, fused=True)
        for layer in third.model.layers:
            fully_shard(layer, mesh=mesh)
        with pytest.raises(RuntimeError, match=r"LlamaForCausalLM cannot be computed .* DTensor"):
            third(input_ids=torch.ones(1, 2, dtype=torch.long), labels=torch.ones(1, 2, dtype=torch.long))
        sharded = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match="not all here: FSDP's FullyShardedDataParallel"):
            attach(sharded, fused=True)

    def test_data_parallel(self, model, batch):
        """Its replicas share one model's attributes among threads; put around the model later, too."""
        self.refuse(model, r"torch\.nn\.DataParallel", inside=nn.DataParallel(model))
        with attach(model, fused=True):
            replica = model._replicate_for_data_parallel()
            with pytest.raises(RuntimeError, match=r"cannot be computed with torch\.nn\.DataParallel"):
                replica(**batch)

    def test_an_observer(self, model):
        """It could be shown nothing."""
        with pytest.raises(ValueError, match="observer must be None with fused=True"):
            attach(model, observer=print, fused=True)
        assert "_loss_function" not in model.__dict__
        assert not model._forward_hooks

    def test_an_output_layer_changed_after_attach(self, model, batch):
        """The next training step says so; forwards without labels work."""
        attach(model, fused=True)
        peft_model = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["lm_head"]))
        with pytest.raises(RuntimeError, match=r"cannot be computed with an output layer of type peft"):
            peft_model(**batch)
        assert peft_model(input_ids=batch["input_ids"]).logits is not None
        model.resize_token_embeddings(70)
        with pytest.raises(RuntimeError, match="another output layer than it was attached to"):
            model(**batch)


class TestTrainer:
    def test_trains_and_evaluates_as_unfused(self, batch, tmp_path):
        """Accumulated, with the evaluation's metrics, which need logits: the same history."""
        rows = [{name: value[row] for name, value in batch.items()} for row in range(3)]
        histories = []
        for fused in (False, True):
            model = tiny_models.build()
            trainer = Trainer(
                model=model,
                args=TrainingArguments(
                    str(tmp_path),
                    per_device_train_batch_size=1,
                    gradient_accumulation_steps=2,
                    max_steps=3,
                    logging_steps=1,
                    learning_rate=0.01,
                    label_names=["labels"],
                    report_to="none",
                    use_cpu=True,
                    save_strategy="no",
                ),
                train_dataset=Dataset.from_list(rows),
                eval_dataset=Dataset.from_list(rows),
                compute_metrics=lambda prediction: {"logits": float(prediction.predictions.shape[-1])},
            )
            with attach(model, fused=fused):
                trainer.train()
                metrics = trainer.evaluate()
                trainer.compute_metrics = None
                assert trainer.evaluate()["eval_loss"] == metrics["eval_loss"]
            assert metrics["eval_logits"] == tiny_models.VOCABULARY
            histories.append(
                [metrics["eval_loss"], *(log["loss"] for log in trainer.state.log_history if "loss" in log)]
            )
        assert histories[1] == pytest.approx(histories[0], rel=1e-4)

    def test_a_step_in_bfloat16_is_as_exact_as_cross_entropy(self, batch, tmp_path):
        """One step of SGD against float64, where the loss is cross-entropy: rounding is all that it adds."""

        def step(*, exact=False, **attached):
            model = tiny_models.build(sharpness=1.0).to(torch.float64 if exact else torch.float32)
            before = {name: parameter.detach().double().clone() for name, parameter in model.named_parameters()}
            if attached:
                attach(model, OverToneConfig(lam=1.0, epsilon=0.0), **attached)
            arguments = TrainingArguments(
                str(tmp_path),
                max_steps=1,
                learning_rate=0.5,
                max_grad_norm=0,
                optim="sgd",
                bf16=not exact,
                report_to="none",
                use_cpu=True,
                save_strategy="no",
            )
            Trainer(model, arguments, train_dataset=Dataset.from_list(rows)).train()
            return {name: parameter.detach().double() - before[name] for name, parameter in model.named_parameters()}

        rows = [{name: value[row] for name, value in batch.items()} for row in range(3)]
        truth, yardstick = step(exact=True), step()
        for fused in (False, True):
            moved = step(fused=fused)
            for name, exact in truth.items():
                error, allowed = ((steps[name] - exact).norm() for steps in (moved, yardstick))
                assert error <= 1.25 * allowed + 1e-3 * exact.norm(), (name, fused)
