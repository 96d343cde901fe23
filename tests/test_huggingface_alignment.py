"""compute_loss_func on models whose labels are not shifted, against their own losses; the unknown is refused."""

from __future__ import annotations

import types
from typing import Any

import pytest
import tiny_models
import torch
from tiny_trainer import arguments, gradients_of, trained_gradients
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    MBartConfig,
    MBartForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)
from transformers.modeling_outputs import CausalLMOutput, CausalLMOutputWithCrossAttentions, TokenClassifierOutput

from overtone import OverToneConfig, overtone_loss
from overtone.huggingface import causal_lm_loss, compute_loss_func

CROSS_ENTROPY = OverToneConfig(lam=1.0, epsilon=0.0)
BERT: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.5,
}
BART: dict[str, Any] = {
    "vocab_size": 61,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "max_position_embeddings": 32,
    "dropout": 0.0,
    "init_std": 0.5,
}
LLAMA: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "num_labels": 4,
    "initializer_range": 0.5,
}
T5: dict[str, Any] = {
    "vocab_size": 61,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 16,
    "num_layers": 1,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}


class TupleT5(T5ForConditionalGeneration):
    """Returns tuples unless it is asked not to."""

    def forward(self, *args: Any, return_dict: bool | None = None, **kwargs: Any) -> Any:
        # A Trainer passes it to every forward that takes any argument.
        kwargs.pop("num_items_in_batch", None)
        outputs = super().forward(*args, return_dict=True, **kwargs)
        return outputs if return_dict else outputs.to_tuple()


MODELS: dict[str, Any] = {
    "bert, sequences": lambda: BertForSequenceClassification(BertConfig(**BERT, num_labels=4)),
    "llama, sequences": lambda: LlamaForSequenceClassification(LlamaConfig(**LLAMA)),
    "bert, tokens": lambda: BertForTokenClassification(BertConfig(**BERT, num_labels=4)),
    "llama, tokens": lambda: LlamaForTokenClassification(LlamaConfig(**LLAMA)),
    "bert, masked": lambda: BertForMaskedLM(BertConfig(**BERT)),
    "bert, choices": lambda: BertForMultipleChoice(BertConfig(**BERT)),
    "bert, causal": lambda: BertLMHeadModel(BertConfig(**BERT, is_decoder=True)),
    "bart, causal": lambda: BartForCausalLM(BartConfig(**BART)),
    "mbart, causal": lambda: MBartForCausalLM(MBartConfig(**BART)),
    "gpt2": lambda: tiny_models.build("gpt2"),
    "llama": lambda: tiny_models.build("llama"),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**BART)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5)),
    "t5, tuples": lambda: TupleT5(T5Config(**T5)),
}


def build(kind: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def batch_for(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (3, 2, 9) if "choices" in kind else (3, 9)
    ids = torch.randint(3, 61, shape, generator=generator)
    if "sequences" in kind:
        return {"input_ids": ids, "labels": torch.tensor([3, 0, 2])}
    if "choices" in kind:
        return {"input_ids": ids, "labels": torch.tensor([1, 0, 1])}
    labels = torch.randint(0, 4 if "tokens" in kind else 61, (3, 9), generator=generator)
    labels[0, :3] = -100
    batch = {"input_ids": ids, "labels": labels}
    if kind in ("bart", "t5", "t5, tuples"):
        batch["decoder_input_ids"] = torch.nn.functional.pad(labels.clamp(min=0)[:, :-1], (1, 0), value=0)
    return batch


class TestInATrainer:
    @pytest.mark.parametrize("kind", sorted(MODELS))
    def test_cross_entropy_is_the_models_own_loss(self, kind, tmp_path):
        """With lam 1 and epsilon 0 every gradient is that of the model's own loss, without a word about the model."""
        model, batch = build(kind), batch_for(kind)
        loss = model(**batch, return_dict=True).loss
        own = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        expected = dict(zip(dict(model.named_parameters()), own, strict=True))
        args = arguments(tmp_path, per_device_train_batch_size=3, remove_unused_columns=False)
        compute = compute_loss_func(CROSS_ENTROPY)

        def mean(outputs: Any, labels: Any, num_items_in_batch: Any) -> Any:
            # Trainer counts the tokens of some of these models as if they were shifted, or not.
            return compute(outputs, labels)

        gradients = trained_gradients(model, args, batch, compute_loss_func=mean)
        for name, gradient in expected.items():
            if gradient is not None:
                torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)

    def test_a_classifier_learns_its_own_label(self, tmp_path):
        """Also with the paper's loss: the gradient is the plain function's on the classes."""
        model, batch = build("bert, sequences"), batch_for("bert, sequences")
        expected = gradients_of(overtone_loss(model(input_ids=batch["input_ids"]).logits, batch["labels"]), model)
        args = arguments(tmp_path, per_device_train_batch_size=3)
        gradients = trained_gradients(model, args, batch, compute_loss_func=compute_loss_func())
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)

    def test_a_model_that_does_neither_is_refused(self, tmp_path):
        """By name: labels that count backwards, say."""

        class Backwards(GPT2LMHeadModel):
            def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
                outputs = super().forward(input_ids, **kwargs)
                if labels is not None:
                    outputs.loss = torch.nn.functional.cross_entropy(
                        outputs.logits.flatten(0, 1), labels.flip(1).flatten()
                    )
                return outputs

        model = Backwards(tiny_models.CONFIGS["gpt2"]())
        with pytest.raises(ValueError, match="the loss of Backwards on a few tokens is the cross-entropy of neither"):
            trained_gradients(
                model, arguments(tmp_path), tiny_models.ragged_batch(model), compute_loss_func=compute_loss_func()
            )

    def test_a_regression_is_refused(self, tmp_path):
        """Its one number has no classes to tell apart."""
        model = BertForSequenceClassification(BertConfig(**BERT, num_labels=1))
        batch = {"input_ids": torch.randint(3, 61, (3, 9)), "labels": torch.zeros(3, dtype=torch.long)}
        with pytest.raises(ValueError, match="logits must be of two classes or more"):
            trained_gradients(model, arguments(tmp_path), batch, compute_loss_func=compute_loss_func())

    def test_asking_the_model_disturbs_nothing(self, tmp_path):
        """Modes, weights and random numbers are as before, with dropout on."""
        model = tiny_models.build("gpt2").train()
        state = torch.get_rng_state()
        before = dict(model.__dict__)
        compute = compute_loss_func(model=model)
        batch = tiny_models.ragged_batch(model)
        outputs = CausalLMOutput(logits=torch.randn(3, 9, 61, requires_grad=True))
        torch.set_rng_state(state)
        compute(outputs, batch["labels"])
        assert torch.equal(torch.get_rng_state(), state)
        assert model.__dict__ == before
        assert model.training


class TestWithoutATrainer:
    @pytest.mark.parametrize("kind", ["bart, causal", "t5, tuples", "bert, tokens", "gpt2"])
    def test_the_model_can_be_given(self, kind):
        """For loops of one's own."""
        model, batch = build(kind), batch_for(kind)
        compute = compute_loss_func(CROSS_ENTROPY, model=model)
        outputs = model(**{name: values for name, values in batch.items() if name != "labels"})
        torch.testing.assert_close(compute(outputs, batch["labels"]), model(**batch, return_dict=True).loss)

    @pytest.mark.parametrize("kind", ["bert, masked", "bert, tokens", "bart", "t5", "llama", "bert, sequences"])
    def test_some_outputs_say_it_themselves(self, kind):
        """By a class that one kind of models alone returns, or a shape."""
        model, batch = build(kind), batch_for(kind)
        outputs = model(**{name: values for name, values in batch.items() if name != "labels"})
        loss = compute_loss_func(CROSS_ENTROPY)(outputs, batch["labels"])
        torch.testing.assert_close(loss, model(**batch).loss)

    def test_outputs_that_do_not_say_are_refused(self):
        """GPT-2 and Bart's decoder return one class, tuples and dictionaries are anybody's."""
        logits, labels = torch.randn(2, 5, 7, requires_grad=True), torch.zeros(2, 5, dtype=torch.long)
        for outputs in (CausalLMOutputWithCrossAttentions(logits=logits), {"logits": logits}, (logits,)):
            with pytest.raises(ValueError, match=r"outputs must say whether the labels are shifted.*model=model"):
                compute_loss_func()(outputs, labels)

    def test_the_mask_is_aligned_as_the_labels(self):
        """Neither is shifted for a classifier of tokens, both are for a causal model."""
        logits, labels = torch.randn(2, 5, 7, requires_grad=True), torch.randint(0, 7, (2, 5))
        mask = torch.rand(2, 5)
        trainer = Trainer.__new__(Trainer)
        trainer.label_smoother, trainer.model = None, torch.nn.Linear(1, 1)

        def compute_loss(self: Any, inputs: Any, outputs: Any) -> Any:
            return compute_loss_func()(outputs, labels)

        call = types.MethodType(compute_loss, trainer)
        torch.testing.assert_close(
            call({"loss_mask": mask}, TokenClassifierOutput(logits=logits)),
            causal_lm_loss(logits, None, shift_labels=labels, loss_mask=mask),
        )
        torch.testing.assert_close(
            call({"loss_mask": mask}, CausalLMOutput(logits=logits)), causal_lm_loss(logits, labels, loss_mask=mask)
        )
