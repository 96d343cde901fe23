"""attach and detach: found through every wrapper, really called, taken off exactly, refused where ignored."""

from __future__ import annotations

import copy
import io
import random
from typing import Any

import pytest
import tiny_models
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tiny_trainer import gradients_of
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
)
from transformers.loss.loss_utils import ForCausalLMLoss

import overtone
from overtone import OverToneConfig
from overtone.functional import reference_loss
from overtone.huggingface import attach, causal_lm_loss, detach

CONSTANT = OverToneConfig(epsilon=50.0)
"""Every token is settled at 50: no other loss gives this value."""
LORA = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}


def loss_of(model: Any, batch: dict[str, torch.Tensor], **inputs: Any) -> torch.Tensor:
    return model(**batch, **inputs).loss


class Seen:
    """Counts what it is shown."""

    steps = 0

    def observe(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        self.steps += 1


class TestLoss:
    @pytest.mark.parametrize("arch", tiny_models.ARCHITECTURES)
    def test_is_the_reference_on_the_same_tokens(self, arch):
        """Value and gradient, for every architecture; a mixture of experts adds its auxiliary loss as before."""
        model = tiny_models.build(arch)
        batch = tiny_models.ragged_batch(model)
        outputs = model(**batch)
        expected = reference_loss(outputs.logits[:, :-1], batch["labels"][:, 1:])
        if arch == "mixtral":
            assert outputs.aux_loss > 0
            expected = expected + model.router_aux_loss_coef * outputs.aux_loss
        expected.backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()
        with attach(model):
            loss = loss_of(model, batch)
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)

    def test_takes_the_arguments_of_the_models_own_loss(self, model, batch):
        """num_items_in_batch and shift_labels arrive through the forward, and so does loss_mask."""
        logits, labels = model(**batch).logits, batch["labels"]
        weights = torch.rand(labels.shape)
        shift_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        with attach(model):
            for given in ({"num_items_in_batch": 5}, {"shift_labels": shift_labels}, {"loss_mask": weights}):
                torch.testing.assert_close(loss_of(model, batch, **given), causal_lm_loss(logits, labels, **given))

    @pytest.mark.parametrize("arch", tiny_models.ARCHITECTURES)
    def test_every_architecture_takes_a_loss_mask(self, arch):
        """The mask passes through the forward to the loss and disturbs nothing on the way."""
        model = tiny_models.build(arch)
        batch = tiny_models.ragged_batch(model)
        kept = batch["labels"] != -100
        kept[1] = False
        with attach(model):
            masked = loss_of(model, batch, loss_mask=kept)
            ignored = loss_of(model, {**batch, "labels": batch["labels"].masked_fill(~kept, -100)})
        torch.testing.assert_close(masked, ignored)


class TestWrappers:
    def wrapped(self, kind: str, model: Any) -> Any:
        if kind == "peft":
            return get_peft_model(model, LoraConfig(**LORA))
        if kind == "nested peft":
            inner = get_peft_model(model, LoraConfig(**LORA))
            return PeftModel(inner, LoraConfig(r=2, target_modules=["v_proj"]), adapter_name="second")
        if kind == "two adapters":
            peft_model = get_peft_model(model, LoraConfig(**LORA))
            peft_model.add_adapter("other", LoraConfig(r=3, target_modules=["v_proj"]))
            peft_model.set_adapter("other")
            return peft_model
        if kind == "prompt tuning":
            return get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        if kind == "compiled peft":
            del model.model.layers[1:]  # half as much to trace
            return torch.compile(get_peft_model(model, LoraConfig(**LORA)), backend="eager")
        assert kind == "data parallel"
        return torch.nn.DataParallel(model)

    @pytest.mark.parametrize(
        "kind",
        ["peft", "nested peft", "two adapters", "prompt tuning", "compiled peft", "data parallel"],
    )
    def test_the_model_inside_is_found(self, model, batch, kind):
        """Attached through the wrapper, seen through the wrapper, and gone afterwards."""
        wrapped = self.wrapped(kind, model)
        before = loss_of(wrapped, batch)
        handle = attach(wrapped, CONSTANT)
        assert handle.model is model
        loss = loss_of(wrapped, batch)
        handle.detach()
        assert loss.item() == pytest.approx(50)
        assert loss_of(wrapped, batch) == before

    @pytest.mark.parametrize("kind", ["bare", "peft"])
    def test_an_attached_model_is_exported(self, model, batch, kind):
        """torch.export looks into the forward for its code; what comes out computes what went in."""
        wrapped = model if kind == "bare" else self.wrapped(kind, model)
        model.config.use_cache = False  # export knows no DynamicCache
        with attach(wrapped):
            expected = wrapped(**batch)
            outputs = torch.export.export(wrapped, (), batch, strict=False).module()(**batch)
        torch.testing.assert_close(outputs.logits, expected.logits)
        torch.testing.assert_close(outputs.loss, expected.loss)

    def test_assigning_on_the_wrapper_is_the_trap_that_attach_avoids(self, model, batch):
        """The same function put on the PeftModel is ignored by transformers, which is why attach never does that."""
        wrapped = self.wrapped("peft", model)
        before = loss_of(wrapped, batch)
        wrapped.loss_function = lambda *args, **kwargs: torch.tensor(50.0)
        assert loss_of(wrapped, batch) == before

    def test_what_is_assigned_is_no_module(self, model):
        """transformers ignores a module."""
        with attach(model):
            assert callable(model.loss_function)
            assert not isinstance(model.loss_function, torch.nn.Module)
            assert "loss_function" not in dict(model.named_modules())

    def test_a_module_without_a_hugging_face_model_is_refused(self):
        """The way out is the plain loss."""
        with pytest.raises(TypeError, match=r"PreTrainedModel, got Linear without one; call overtone.overtone_loss"):
            attach(torch.nn.Linear(2, 2))
        with pytest.raises(TypeError, match="got str"):
            attach("llama")


class TestVerification:
    def test_a_forward_with_its_own_cross_entropy_is_refused(self):
        """A real model of transformers that does it: Bart as a decoder. It is left as it was."""
        sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "decoder_attention_heads": 2}
        bart = BartForCausalLM(BartConfig(vocab_size=61, decoder_ffn_dim=16, max_position_embeddings=32, **sizes))
        before = dict(bart.__dict__)
        with pytest.raises(ValueError, match=r"BartForCausalLM computes it another way.*compute_loss_func"):
            attach(bart)
        assert bart.__dict__ == before
        assert not bart._forward_hooks

    def test_a_forward_that_calls_the_loss_indirectly_is_accepted(self, model, batch):
        """What counts is the call, not the text of the forward."""

        class Indirect(LlamaForCausalLM):
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return super().forward(*args, **kwargs)

        indirect = Indirect(model.config)
        with attach(indirect, CONSTANT):
            assert loss_of(indirect, batch).item() == pytest.approx(50)

    def test_another_kind_of_loss_is_refused(self):
        """A masked language model calls its loss_function, but does not shift its labels."""
        bert = BertForMaskedLM(
            BertConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        )
        with pytest.raises(ValueError, match="BertForMaskedLM, whose loss is ForMaskedLMLoss"):
            attach(bert)

    def test_a_model_that_fails_on_tokens_is_refused_and_restored(self, model):
        """The reason is passed on."""

        class Picky(LlamaForCausalLM):
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                raise KeyError("pixel_values")

        picky = Picky(model.config).train()
        with pytest.raises(ValueError, match=r"Picky failed on two tokens .KeyError: 'pixel_values'"):
            attach(picky)
        assert picky.training
        assert "_loss_function" not in picky.__dict__

    @pytest.mark.parametrize("arch", tiny_models.ARCHITECTURES)
    def test_the_check_leaves_no_trace(self, arch):
        """Weights, buffers, gradients, modes, random numbers, hooks: all as before, in training mode with dropout."""
        model = tiny_models.build(arch).train()
        model.get_input_embeddings().eval()
        before = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        modes = [module.training for module in model.modules()]
        random_states = (torch.get_rng_state(), random.getstate())
        attach(model).detach()
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), random_states[0])
        assert random.getstate() == random_states[1]
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            assert torch.equal(tensor, before[name])
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not model._forward_hooks
        assert not model._forward_hooks_with_kwargs

    def test_a_model_that_keeps_count_does_not_count_the_check(self, model):
        """Statistics of training mode stay as they are, and random numbers that even evaluation draws come again."""

        class Counting(LlamaForCausalLM):
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                self.draw = torch.rand(1)
                self.counted.add_(int(self.training))
                return super().forward(*args, **kwargs)

        counting = Counting(model.config).train()
        counting.register_buffer("counted", torch.zeros(1))
        state = torch.get_rng_state()
        attach(counting)
        assert hasattr(counting, "draw")
        assert counting.counted == 0
        assert torch.equal(torch.get_rng_state(), state)

    def test_parameters_on_the_meta_device_are_not_run(self):
        """A model that is not loaded yet is verified in its first training step."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(tiny_models.CONFIGS["llama"]())
        model.forward = lambda **inputs: pytest.fail("run without its parameters")
        attach(model).detach()

    def test_parameters_that_zero_has_spread_are_not_run(self, model):
        """DeepSpeed marks them so; a forward on one rank alone would wait for the others."""
        model.lm_head.weight.ds_id = 0
        model.forward = lambda **inputs: pytest.fail("run on one rank")
        attach(model).detach()

    def test_a_sharded_wrapper_is_not_run(self, model):
        """FSDP1 gathers its flat parameters from every rank."""
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            sharded = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
            model.forward = lambda **inputs: pytest.fail("run on one rank")
            attach(sharded).detach()
        finally:
            torch.distributed.destroy_process_group()


class TestLiger:
    """Its forward leaves the loss to the model when it is told not to skip the logits."""

    @staticmethod
    def put_on(model: Any) -> None:
        """As Liger does with its kernels, here with a loss of 7 for the fused one."""
        own = type(model).forward

        def forward(self: Any, labels: Any = None, skip_logits: bool | None = None, **inputs: Any) -> Any:
            if self.training and labels is not None if skip_logits is None else skip_logits:
                outputs = own(self, **inputs)
                outputs.loss, outputs.logits = outputs.logits.sum() * 0 + 7, None
                return outputs
            return own(self, labels=labels, **inputs)

        model.forward = forward.__get__(model)

    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("first", ["attach", "liger"])
    def test_beside_its_kernels_the_attached_loss_trains(self, model, batch, first, fused):
        """Whichever of the two was put on first, with the gradients of the attached loss alone."""
        model.train()
        with attach(model):
            expected = gradients_of(model(**batch).loss, model)
        if first == "liger":
            self.put_on(model)
        with attach(model, fused=fused):
            if first == "attach":
                self.put_on(model)
            outputs = model(**batch)
        assert (outputs.logits is None) == fused
        torch.testing.assert_close(gradients_of(outputs.loss, model), expected, rtol=1e-4, atol=1e-5)
        assert model(**batch).loss == 7

    def test_an_evaluation_that_skips_the_logits_computes_the_attached_loss(self, model, batch):
        """Trainer asks to skip them, and Liger knows neither eval_loss nor a loss_mask."""
        self.put_on(model)
        with torch.no_grad(), attach(model, OverToneConfig(epsilon=100.0), eval_loss="overtone"):
            assert model(**batch, skip_logits=True).loss == 100

    def test_a_compiled_model_asks_too(self):
        """In the graph, where nothing is there to be looked at."""
        model = tiny_models.build(layers=1)
        batch = tiny_models.ragged_batch(model)
        self.put_on(model.train())
        torch.compiler.reset()
        with attach(model, OverToneConfig(epsilon=100.0)):
            assert torch.compile(model, backend="eager")(**batch).loss == 100


class TestBypass:
    FUSED = (
        ("liger_kernel.transformers.model.llama", "Liger's fused_linear_cross_entropy"),
        ("trl.trainer.sft_trainer", "TRL's loss_type='chunked_nll'"),
    )
    """Where Liger, and TRL up to 1.6, write the forward that they put on a model."""

    def fused_forward(self, written_in: str) -> Any:
        namespace: dict[str, Any] = {"__name__": written_in}
        exec(
            "def fused_forward(self, input_ids=None, labels=None, **kwargs):\n"
            "    outputs = type(self).forward(self, input_ids=input_ids)\n"
            "    outputs.loss = outputs.logits.sum() * 0\n"
            "    return outputs\n",
            namespace,
        )
        return namespace["fused_forward"]

    @pytest.mark.parametrize(("written_in", "name"), FUSED)
    def test_a_fused_loss_is_refused_by_name(self, model, written_in, name):
        """It never builds the logits; Liger's only in training, so the check in evaluation mode cannot see it."""
        model.forward = self.fused_forward(written_in).__get__(model)
        with pytest.raises(ValueError, match=f"with {name}.*which bypasses it.*compute_loss_func"):
            attach(model)

    @pytest.mark.parametrize(("written_in", "name"), FUSED)
    def test_a_fused_loss_put_on_later_is_refused_by_name(self, model, batch, written_in, name):
        """Trainers put it on when training starts, after attach; evaluation without gradients is let through."""
        with attach(model):
            model.forward = self.fused_forward(written_in).__get__(model)
            with torch.no_grad():
                model(**batch)
            with pytest.raises(RuntimeError, match=f"bypassed by {name}.*compute_loss_func"):
                model(**batch)

    def test_trls_fused_head_is_refused_by_name(self, model, batch):
        """SFTTrainer computes its loss past the model's loss_function for every loss_type."""
        add_fused_lm_head = pytest.importorskip("trl.trainer.utils").add_fused_lm_head
        with attach(model):
            add_fused_lm_head(model)
            assert loss_of(model, batch) > 0
            with pytest.raises(RuntimeError, match=r"bypassed by TRL's fused LM head .*'chunked_nll'"):
                model(**batch, fused_lm_head=True)

    def test_a_replaced_forward_is_refused(self, model, batch):
        """Whatever else computes a loss of its own."""
        with attach(model):
            forward = model.forward

            def own_loss(labels: torch.Tensor, **kwargs: Any) -> Any:
                outputs = forward(**kwargs)
                outputs.loss = outputs.logits.sum()
                return outputs

            model.forward = own_loss
            with pytest.raises(RuntimeError, match=r"bypassed by a forward that does not call self.loss_function"):
                model(**batch)

    def test_a_loss_that_raises_does_not_vouch_for_the_next_step(self, model, batch):
        """The call that failed is forgotten, so that a bypass right after it is still seen."""
        with attach(model):
            with pytest.raises(ValueError, match="labels must lie in"):
                model(**{**batch, "labels": torch.full_like(batch["labels"], 1000)})
            model.forward = self.fused_forward("somewhere").__get__(model)
            with pytest.raises(RuntimeError, match="bypassed"):
                model(**batch)

    def test_a_bypass_that_returns_a_tuple_is_refused(self, model, batch):
        """return_dict=False gives the loss no name."""
        with attach(model):
            torch.testing.assert_close(model(**batch, return_dict=False)[0], loss_of(model, batch))
            forward = model.forward
            model.forward = lambda labels, **inputs: (torch.ones(()), *forward(**inputs))
            with pytest.raises(RuntimeError, match="bypassed"):
                model(**batch, return_dict=False)

    def test_dtensor_logits_are_the_tensor_that_they_stand_for(self):
        """As tensor parallelism may leave them; spread over ranks they are tested in test_distributed.py."""
        from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            mesh = init_device_mesh("cpu", (1,))
            logits, labels = torch.randn(1, 3, 5), torch.zeros(1, 3, dtype=torch.long)
            spread = DTensor.from_local(logits, mesh, [Replicate()])
            assert causal_lm_loss(spread, labels) == causal_lm_loss(logits, labels)
        finally:
            torch.distributed.destroy_process_group()


class TestDetach:
    def test_restores_exactly(self, model, batch):
        """The instance dictionary, the hooks and the loss are what they were."""
        before, names = loss_of(model, batch), set(model.__dict__)
        handle = attach(model, CONSTANT)
        handle.detach()
        handle.detach()
        assert set(model.__dict__) == names
        assert not model._forward_hooks
        assert not model._forward_hooks_with_kwargs
        assert not model._forward_hooks_always_called
        assert model.loss_function is ForCausalLMLoss
        assert loss_of(model, batch) == before

    def test_restores_a_loss_of_the_users_own(self, model):
        """The function that was assigned before comes back."""

        def own_loss(logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return logits.sum()

        model.loss_function = own_loss
        with attach(model, CONSTANT):
            assert model.loss_function is not own_loss
        assert model.loss_function is own_loss

    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0), (0, 2, 1), (2, 0, 1)])
    def test_any_order_of_nesting(self, model, batch, order):
        """The newest attachment that is left always computes the loss."""
        before = loss_of(model, batch)
        levels = [50.0, 60.0, 70.0]
        handles = [attach(model, OverToneConfig(epsilon=level)) for level in levels]
        left = {0, 1, 2}
        for which in order:
            assert loss_of(model, batch).item() == pytest.approx(levels[max(left)])
            handles[which].detach()
            left.remove(which)
        assert loss_of(model, batch) == before
        assert model.loss_function is ForCausalLMLoss

    def test_an_error_in_the_block_still_detaches(self, model):
        """The context manager cleans up."""
        with pytest.raises(KeyError), attach(model):
            raise KeyError
        assert model.loss_function is ForCausalLMLoss

    def test_a_loss_assigned_on_top_is_left_with_a_warning(self, model):
        """The user's latest choice wins, and is told apart from ours."""

        def own_loss(logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return logits.sum()

        only = attach(model)
        model.loss_function = own_loss
        with pytest.warns(UserWarning, match="assigned by something else"):
            only.detach()
        assert model.loss_function is own_loss

        first = attach(model)
        model.loss_function = own_loss
        second = attach(model, CONSTANT)
        with pytest.warns(UserWarning, match="assigned by something else"):
            first.detach()
        second.detach()
        assert model.loss_function is own_loss
        assert not model._forward_hooks

    def test_handle_says_what_it_is(self, model):
        """The repr names the model, the settings and the state."""
        handle = attach(model)
        assert "LlamaForCausalLM" in repr(handle)
        assert "attached=True" in repr(handle)
        handle.detach()
        assert "attached=False" in repr(handle)


class TestCopies:
    def test_a_deep_copy_stays_attached_and_is_independent(self, model, batch):
        """Detaching one leaves the other, and the copy's guard works."""
        before = loss_of(model, batch)
        handle = attach(model, CONSTANT)
        twin = copy.deepcopy(model)
        handle.detach()
        assert loss_of(model, batch) == before
        assert loss_of(twin, batch).item() == pytest.approx(50)
        detach(twin)
        detach(twin)
        assert loss_of(twin, batch) == before
        assert not twin._forward_hooks
        assert set(twin.__dict__) == set(model.__dict__)

    @pytest.mark.parametrize("fused", [False, True])
    def test_a_shallow_copy_is_detached_alone(self, model, batch, fused):
        """It shares the model's modules, and yet its attachment is its own."""
        before = loss_of(model, batch)
        handle = attach(model, CONSTANT, fused=fused)
        twin = copy.copy(model)
        assert loss_of(twin, batch).item() == pytest.approx(50)
        detach(twin)
        assert loss_of(twin, batch) == before
        assert "attached=True" in repr(handle)
        assert loss_of(model, batch).item() == pytest.approx(50)
        handle.detach()
        assert loss_of(model, batch) == before
        assert not model.get_output_embeddings()._forward_pre_hooks

    def test_a_shallow_copy_outlives_the_attachment_of_its_original(self, model, batch):
        """The hook on the output layer, which both have, is taken off by the last of them."""
        before = loss_of(model, batch)
        handle = attach(model, CONSTANT, fused=True)
        twin = copy.copy(model)
        handle.detach()
        assert loss_of(model, batch) == before
        assert loss_of(twin, batch).item() == pytest.approx(50)
        detach(twin)
        assert not model.get_output_embeddings()._forward_pre_hooks

    def test_a_shallow_copy_with_a_fused_loss_of_its_own_leaves_nothing(self, model, batch):
        handle = attach(model, CONSTANT, fused=False)
        twin = copy.copy(model)
        attach(twin, CONSTANT, fused=True)
        assert loss_of(twin, batch).item() == pytest.approx(50)
        detach(twin)
        handle.detach()
        assert not model.get_output_embeddings()._forward_pre_hooks

    def test_a_copy_reports_to_the_same_observer(self, model, batch):
        """As with a function: what the copy trains on is seen by the one that the user holds."""
        seen = Seen()
        attach(model, observer=seen.observe)
        loss_of(copy.deepcopy(model), batch)
        assert seen.steps == 1

    def test_a_whole_model_can_be_saved(self, model, batch):
        """Pickled with its attachment, which works and comes off on the other side."""
        before = loss_of(model, batch)
        attach(model, CONSTANT, observer=Seen().observe)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert loss_of(loaded, batch).item() == pytest.approx(50)
        detach(loaded)
        assert loss_of(loaded, batch) == before
        assert not loaded._forward_hooks
        assert not loaded._forward_hooks_always_called

    def test_save_and_load(self, model, batch, tmp_path):
        """Nothing of the attachment is written: the loaded model is a clean one with the same weights and config."""
        before = loss_of(model, batch)
        model.save_pretrained(tmp_path / "plain")
        with attach(model, CONSTANT):
            model.save_pretrained(tmp_path / "attached")
            assert loss_of(model, batch).item() == pytest.approx(50)
        for written in (tmp_path / "plain").iterdir():
            assert written.read_bytes() == (tmp_path / "attached" / written.name).read_bytes()
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "attached")
        assert loaded.loss_function is ForCausalLMLoss
        assert loss_of(loaded, batch) == before

    def test_adapters_load_onto_an_attached_model(self, model, batch, tmp_path):
        """PEFT's from_pretrained wraps the attached model, whose loss stays."""
        get_peft_model(copy.deepcopy(model), LoraConfig(**LORA)).save_pretrained(tmp_path)
        with attach(model, CONSTANT):
            loaded = PeftModel.from_pretrained(model, tmp_path)
            assert loss_of(loaded, batch).item() == pytest.approx(50)

    def test_state_dict_is_untouched(self, model):
        """No new keys."""
        keys = list(model.state_dict())
        with attach(model):
            assert list(model.state_dict()) == keys

    def test_generation_is_left_alone(self, model):
        """Greedy generation gives the same tokens, attached or not."""
        prompt = torch.tensor([[3, 4, 5]])
        expected = model.generate(prompt, max_new_tokens=5, do_sample=False)
        with attach(model):
            assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False), expected)

    def test_a_config_of_another_type_is_refused_before_anything_changes(self, model):
        """A preset's name is not a config."""
        with pytest.raises(TypeError, match="config must be an OverToneConfig or None, got str"):
            attach(model, "lora")
        assert "_loss_function" not in model.__dict__

    @pytest.mark.parametrize("name", ["observer", "hold_group"])
    def test_arguments_of_another_type_are_refused(self, model, name):
        with pytest.raises(TypeError, match=f"{name} must be .*, got 3"):
            attach(model, **{name: 3})
        assert "_loss_function" not in model.__dict__

    @pytest.mark.parametrize("fused", ["yes", 1, 0.0])
    def test_fused_is_a_bool_or_none(self, model, fused):
        """A word that is true would switch it on unasked."""
        with pytest.raises(TypeError, match=f"fused must be True, False or None, got {fused!r} of type"):
            attach(model, fused=fused)
        assert "_loss_function" not in model.__dict__


class TestPublicNames:
    def test_reached_from_the_package(self):
        """The names that users rely on."""
        assert overtone.huggingface.attach is attach


class TestCopiesWithoutTheirWrapper:
    @pytest.mark.parametrize("fused", [False, True])
    def test_a_merged_model_is_copied_and_loaded(self, fused, tmp_path):
        """The adapter that it was attached through is gone, with the hooks that were on it."""
        import copy
        import gc

        from peft import LoraConfig, get_peft_model

        wrapped = get_peft_model(tiny_models.build(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
        attach(wrapped, fused=fused)
        merged = wrapped.merge_and_unload()
        del wrapped
        gc.collect()
        torch.save(merged, tmp_path / "model.pt")
        ids = torch.arange(3, 9)[None]
        with torch.no_grad():
            expected = merged(input_ids=ids).logits
            for other in (copy.deepcopy(merged), torch.load(tmp_path / "model.pt", weights_only=False)):
                torch.testing.assert_close(other(input_ids=ids).logits, expected)
