"""An attached loss is the one that trains, or there is an error: however a forward is called, and in any thread."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from typing import Any

import pytest
import tiny_models
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from overtone import OverToneConfig
from overtone.huggingface import attach, detach

CONSTANT = OverToneConfig(epsilon=50.0)
"""Every token is settled at 50: no other loss gives this value."""


def own_loss(**inputs: Any) -> Any:
    return CausalLMOutput(loss=torch.ones((), requires_grad=True))


def adalora(model: Any, orth_reg_weight: float = 0.0) -> Any:
    """A tuner that calls ``model.forward``, past everything that hangs on a call of the model."""
    return get_peft_model(
        model,
        AdaLoraConfig(
            target_modules=["q_proj"],
            task_type="CAUSAL_LM",
            total_step=10,
            init_r=2,
            orth_reg_weight=orth_reg_weight,
        ),
    )


class TestDirectForward:
    def test_is_fused(self, model, batch):
        """Called past the hooks, the training step makes no logits all the same."""
        with attach(model, CONSTANT, fused=True):
            outputs = model.forward(**batch)
        assert outputs.loss.item() == pytest.approx(50)
        assert outputs.logits is None

    def test_is_fused_in_a_tuner_that_calls_it(self, model, batch):
        """PEFT's AdaLoRA."""
        wrapped = adalora(model, orth_reg_weight=0.5)
        with attach(wrapped, CONSTANT, fused=True):
            assert wrapped(**batch).logits is None
        assert wrapped(**batch).logits is not None

    def test_of_another_loss_is_refused(self, model, batch):
        """A forward assigned after attach, called directly or by a tuner."""
        with attach(model):
            model.forward = own_loss
            with pytest.raises(RuntimeError, match="bypassed by a forward that does not call"):
                model.forward(**batch)

    @pytest.mark.parametrize("attach_first", [True, False])
    def test_of_another_loss_in_a_tuner_is_refused(self, model, batch, attach_first):
        """AdaLoRA around a model whose forward is replaced, attached before or after it was wrapped."""
        if attach_first:
            attach(model)
        wrapped = adalora(model)
        if not attach_first:
            attach(wrapped)
        model.forward = own_loss
        with pytest.raises(RuntimeError, match="bypassed by a forward that does not call"):
            wrapped(**batch)

    def test_positional_labels_are_seen(self, model, batch):
        """Labels need no name to be there."""
        with attach(model):
            model.forward = lambda *args: own_loss()
            with pytest.raises(RuntimeError, match="bypassed"):
                model(batch["input_ids"], batch["attention_mask"], None, None, None, batch["labels"])

    def test_a_direct_call_of_the_loss_vouches_for_no_forward(self, model, batch):
        """Neither before a bypassed step nor while nothing runs."""
        logits = model(input_ids=batch["input_ids"]).logits
        with attach(model, CONSTANT):
            assert model.loss_function(logits, batch["labels"], vocab_size=61).item() == pytest.approx(50)
            model.forward = own_loss
            with pytest.raises(RuntimeError, match="bypassed"):
                model(**batch)

    def test_a_replica_is_watched(self, model, batch):
        """DataParallel's replicas run in threads of their own, and so have calls of their own."""
        with attach(model, CONSTANT):
            replica = model._replicate_for_data_parallel()
            assert replica(**batch).loss.item() == pytest.approx(50)
            replica.forward = own_loss
            with pytest.raises(RuntimeError, match="bypassed"):
                replica(**batch)


class TestForwardAttribute:
    def test_what_is_assigned_stays_after_detach(self, model, batch):
        """As without an attachment; and deleting it brings the model's own forward back."""
        forward = model.forward
        with attach(model, CONSTANT):
            calls = []
            model.forward = lambda **inputs: calls.append(1) or forward(**inputs)
            assert model(**batch).loss.item() == pytest.approx(50)
        model(**batch)
        assert len(calls) == 2
        with attach(model, CONSTANT):
            del model.forward
            assert model(**batch).loss.item() == pytest.approx(50)
            with pytest.raises(AttributeError):
                del model.forward
        assert len(calls) == 2 + 1  # attach tries two tokens
        assert "forward" not in model.__dict__

    def test_putting_the_same_forward_back_leaves_nothing(self, model):
        """As tools do that replace it for a while."""
        with attach(model):
            kept = model.forward
            model.forward = own_loss
            model.forward = kept
            assert "forward" not in model.__dict__

    def test_a_forward_that_was_kept_is_inert_after_detach(self, model, batch):
        """Wrappers keep it (Accelerate's mixed precision): it is then the model's own again."""
        before = model(**batch).loss
        handle = attach(model, CONSTANT)
        kept = model.forward
        handle.detach()
        assert kept(**batch).loss == before

    def test_the_class_is_what_it_was(self, model):
        """In name always, and in fact after detach; a model attached twice has one class between."""
        kind = type(model)
        with attach(model):
            attached = type(model)
            assert isinstance(model, LlamaForCausalLM)
            assert (attached.__name__, attached.__module__) == (kind.__name__, kind.__module__)
            assert str(attached) == str(kind)
            with attach(model):
                assert type(model) is attached
        assert type(model) is kind

    def test_copies_are_attached_and_detached(self, model, batch):
        """Through deepcopy and pickle."""
        attach(model, CONSTANT)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert twin.forward(**batch).loss.item() == pytest.approx(50)
            twin.forward = own_loss
            with pytest.raises(RuntimeError, match="bypassed"):
                twin.forward(**batch)
            del twin.forward
            detach(twin)
            assert type(twin) is LlamaForCausalLM

    def test_is_one_graph_with_the_loss(self):
        """torch.compile(fullgraph=True) takes the watched forward."""
        model = tiny_models.build(layers=1)
        batch = tiny_models.ragged_batch(model)
        torch.compiler.reset()
        expected = model(**batch).loss
        with attach(model, OverToneConfig(lam=1.0, epsilon=0.0)):
            loss = torch.compile(model, backend="aot_eager", fullgraph=True)(**batch).loss
        torch.testing.assert_close(loss, expected)


class TestThreads:
    def train(self, steps: int, failures: list[BaseException], barrier: threading.Barrier) -> None:
        try:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(tiny_models.CONFIGS["llama"]())
            batch = {"input_ids": torch.randint(3, 61, (3, 9))}
            attach(model, CONSTANT)
            barrier.wait(timeout=60)
            for _ in range(steps):
                loss = model(**batch, labels=batch["input_ids"]).loss
                loss.backward()
                assert loss.item() == pytest.approx(50)
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    def test_three_models_in_three_threads(self):
        """None is told that it was bypassed because another's forward ended."""
        failures: list[BaseException] = []
        barrier = threading.Barrier(3)
        threads = [threading.Thread(target=self.train, args=(20, failures, barrier)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures

    @pytest.mark.parametrize("in_a_thread", [True, False])
    def test_an_observer_that_runs_another_attached_model(self, model, batch, in_a_thread):
        """In the middle of a step, in its own thread or another."""
        other = tiny_models.build()
        attach(other, OverToneConfig(epsilon=60.0))
        seen = []

        def observe(logits: torch.Tensor, labels: torch.Tensor) -> None:
            def run() -> None:
                seen.append(other(**batch).loss.item())

            if in_a_thread:
                thread = threading.Thread(target=run)
                thread.start()
                thread.join()
            else:
                run()

        with attach(model, CONSTANT, observer=observe):
            assert model(**batch).loss.item() == pytest.approx(50)
        assert seen == [pytest.approx(60)]

    @pytest.mark.parametrize("fused", [True, False])
    def test_one_model_in_two_threads(self, model, batch, fused):
        """A step that runs within another step of the same model, elsewhere, takes nothing from it."""
        seen: list[Any] = []

        def meanwhile(*_: Any) -> None:
            if not seen:
                seen.append(None)
                thread = threading.Thread(target=lambda: seen.append(model(**batch).loss.item()))
                thread.start()
                thread.join()

        with attach(model, CONSTANT, fused=fused):
            hook = model.model.norm.register_forward_hook(meanwhile)
            outputs = model(**batch)
            hook.remove()
        assert seen == [None, pytest.approx(50)]
        assert outputs.loss.item() == pytest.approx(50)
        assert (outputs.logits is None) == fused


class TestWrappersAddedLater:
    def test_lora_around_an_attached_model(self, model, batch):
        """The usual order of things the other way round."""
        attach(model, CONSTANT, fused=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        outputs = wrapped(**batch)
        assert outputs.loss.item() == pytest.approx(50)
        assert outputs.logits is None
