"""A held step holds everything: the terms that a model or a tuner adds to the tokens' loss give no gradient either."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
import transformers
from peft import AdaLoraConfig, get_peft_model
from tiny_trainer import arguments, trained_gradients

from overtone import OverToneConfig
from overtone.huggingface import attach, compute_loss_func

HELD = OverToneConfig(epsilon=50.0, hold="settled")
FREE = OverToneConfig(epsilon=50.0)
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
}
MIXTURES = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen3": ("Qwen3Moe", {"num_experts": 4, "decoder_sparse_step": 1}),
    "gpt-oss": ("GptOss", {"num_local_experts": 4}),
}
mixtures = pytest.mark.parametrize("kind", sorted(MIXTURES))


def mixture(kind: str) -> tuple[Any, dict[str, torch.Tensor]]:
    name, sizes = MIXTURES[kind]
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **sizes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    return model, tiny_models.ragged_batch(model)


def adalora(model: Any) -> Any:
    config = AdaLoraConfig(
        target_modules=["q_proj"], task_type="CAUSAL_LM", total_step=10, init_r=2, orth_reg_weight=5.0
    )
    return get_peft_model(model, config)


def gradients(model: Any) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@mixtures
class TestRouterLoss:
    @pytest.mark.parametrize("fused", [False, True])
    def test_is_held_by_an_attached_loss(self, kind, fused):
        """The value stays that of the free step, which does send gradients to the routers."""
        model, batch = mixture(kind)
        with attach(model, FREE, fused=fused):
            free = model(**batch).loss
            free.backward()
        assert any(gradient.abs().sum() > 0 for gradient in gradients(model))
        model.zero_grad()
        with attach(model, HELD, fused=fused):
            held = model(**batch).loss
            held.backward()
        assert held == free
        assert not gradients(model)

    def test_is_held_in_a_tuple(self, kind):
        """return_dict=False gives the loss no name."""
        model, batch = mixture(kind)
        with attach(model, HELD):
            model(**batch, return_dict=False)[0].backward()
        assert not gradients(model)

    def test_is_held_by_compute_loss_func(self, kind):
        """Which adds the router loss itself."""
        model, batch = mixture(kind)
        labels = batch.pop("labels")
        weight = model.config.router_aux_loss_coef
        free = compute_loss_func(FREE, router_aux_loss_coef=weight)(model(**batch), labels)
        held = compute_loss_func(HELD, router_aux_loss_coef=weight)(model(**batch), labels)
        assert held == free
        assert free > 50
        held.backward()
        assert not gradients(model)

    @pytest.mark.parametrize("way", ["attach", "compute_loss_func"])
    def test_held_steps_move_nothing(self, kind, way, tmp_path):
        """AdamW with weight decay in a Trainer, five steps."""
        model, batch = mixture(kind)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        args = arguments(tmp_path, max_steps=5, weight_decay=0.1)
        if way == "attach":
            attach(model, HELD)
            held = trained_gradients(model, args, batch)
        else:
            compute = compute_loss_func(HELD, router_aux_loss_coef=0.5)
            held = trained_gradients(model, args, batch, compute_loss_func=compute)
        assert set(held.values()) == {None}
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name

    def test_trains_as_before_while_it_is_not_held(self, kind):
        """One token that is not settled is enough for the whole loss."""
        model, batch = mixture(kind)
        config = OverToneConfig(epsilon=1e-9, hold="settled")
        with attach(model, OverToneConfig(epsilon=1e-9)):
            model(**batch).loss.backward()
        expected = [gradient.clone() for gradient in gradients(model)]
        model.zero_grad()
        with attach(model, config):
            model(**batch).loss.backward()
        torch.testing.assert_close(gradients(model), expected)


class TestTunersTerms:
    def test_adaloras_orthogonality_is_held(self):
        """It is added around the model, with the same value and no gradient."""
        wrapped = adalora(tiny_models.build())
        batch = tiny_models.ragged_batch(wrapped)
        with attach(wrapped, FREE):
            free = wrapped(**batch).loss
            free.backward()
        assert free > 51
        assert any(gradient.abs().sum() > 0 for gradient in gradients(wrapped))
        wrapped.zero_grad()
        with attach(wrapped, HELD):
            held = wrapped(**batch).loss
            held.backward()
        assert held == free
        assert not gradients(wrapped)
        assert not any(module._forward_hooks for module in wrapped.modules())

    def test_a_hold_on_the_model_inside_is_refused(self):
        """Attached before AdaLoRA came around it, nobody could hold the term."""
        model = tiny_models.build()
        batch = tiny_models.ragged_batch(model)
        attach(model, HELD)
        wrapped = adalora(model)
        said = "would not hold AdaLoRA's orthogonality term.*attach to the PeftModelForCausalLM, not to the Llama"
        with pytest.raises(ValueError, match=said):
            wrapped(**batch)
        with attach(model, FREE):
            assert wrapped(**batch).loss > 51

    def test_compute_loss_func_refuses_it(self, tmp_path):
        """PEFT adds the term only to a loss that the model computes: the function would drop it."""
        wrapped = adalora(tiny_models.build())
        batch = tiny_models.ragged_batch(wrapped)
        with pytest.raises(ValueError, match=r"cannot train with AdaLoRA's orthogonality term .*attach\(model"):
            trained_gradients(wrapped, arguments(tmp_path), batch, compute_loss_func=compute_loss_func())
