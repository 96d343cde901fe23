"""Every tuner of PEFT: attached cross-entropy is the un-attached loss, or there is a refusal that says why."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_models
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, OFTConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from tiny_trainer import arguments, trained_gradients
from transformers import PreTrainedModel

from overtone import OverToneConfig
from overtone.huggingface import attach, compute_loss_func

CROSS_ENTROPY = OverToneConfig(lam=1.0, epsilon=0.0)
HELD = OverToneConfig(epsilon=50.0, hold="settled")
SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10, "init_r": 2, "orth_reg_weight": 5.0},
    "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 1, "target_modules": "self_attn"},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "CARTRIDGE": {"num_virtual_tokens": 3},
    "CPT": {"cpt_token_ids": [3, 4], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]},
    "FOURIERFT": {"n_frequency": 10},
    "LN_TUNING": {"target_modules": ["norm"]},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 3, "num_tasks": 2},
    "OFT": {"oft_block_size": 4, "r": 0} if "oft_block_size" in OFTConfig.__dataclass_fields__ else {"r": 2},
    "POLY": {"r": 2, "n_tasks": 1, "n_skills": 2, "n_splits": 1},
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "P_TUNING": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "ROAD": {"group_size": 8},
    "SHADOW": {"target_modules": None, "shadow_num_hidden_layers": 1, "auxiliary_loss_weight": 0.5},
    "TRAINABLE_TOKENS": {"token_indices": [3, 4], "target_modules": ["embed_tokens"]},
    "VBLORA": {"vector_length": 4, "num_vectors": 8, "r": 2},
    "WAVEFT": {"n_frequency": 10},
}
TUNERS = sorted({str(getattr(kind, "value", kind)) for kind in PEFT_TYPE_TO_CONFIG_MAPPING})
CONFIGS = {str(getattr(kind, "value", kind)): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
REFUSED = {"CPT": "PEFT's CPT around it, which replaces the loss"}
ADDING = ("ADALORA", "SHADOW")
NEEDING = {"ADAMSS": "sklearn"}


def wrapped(kind: str, folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """A tiny model in a tuner, and a batch for it."""
    for package in (NEEDING[kind],) if kind in NEEDING else ():
        pytest.importorskip(package)
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    known = inspect.signature(CONFIGS[kind]).parameters
    if "target_modules" in known:
        settings["target_modules"] = ["q_proj"]
    if "r" in known:
        settings["r"] = 2
    model = tiny_models.build()
    batch = tiny_models.ragged_batch(model)
    if kind in ("MULTITASK_PROMPT_TUNING", "POLY"):
        batch["task_ids"] = torch.zeros(3, dtype=torch.long)
    if kind == "XLORA":
        get_peft_model(tiny_models.build(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
        settings = {"task_type": "CAUSAL_LM", "hidden_size": 16, "adapters": {"0": str(folder)}, "xlora_dropout_p": 0.0}
        # X-LoRA's classifier reads the shape of the tokens.
        model.config.use_cache = False
    settings.update({name: value for name, value in SETTINGS.get(kind, {}).items() if name in known})
    torch.manual_seed(0)
    return in_tuner(model, CONFIGS[kind](**settings), batch), batch


def in_tuner(model: Any, config: Any, batch: dict[str, torch.Tensor]) -> Any:
    """The model in a tuner; two of PEFT 0.13 ask transformers 4.48 for attributes that are no longer there."""
    if Version(peft.__version__) >= Version("0.18"):
        return get_peft_model(model, config).eval()
    try:
        model = get_peft_model(model, config).eval()
        step(model, batch)
    except AttributeError as error:
        pytest.skip(f"PEFT {peft.__version__} cannot train it with transformers {transformers.__version__}: {error}")
    return model


def step(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", TUNERS)
class TestTuners:
    @pytest.mark.parametrize("fused", [False, True])
    def test_attached(self, kind, fused, tmp_path):
        """Value and every gradient, a tuner's own terms included; a held step leaves no gradient; nothing is left."""
        model, batch = wrapped(kind, tmp_path)
        if kind in REFUSED:
            with pytest.raises(ValueError, match=REFUSED[kind]):
                attach(model, CROSS_ENTROPY, fused=fused)
            return
        loss, gradients = step(model, batch)
        assert gradients
        if kind == "POLY":
            # Its layers ask for task_ids, which the trial of two tokens cannot know.
            with pytest.raises(ValueError, match=r"failed on two tokens .*task_ids"):
                attach(model, CROSS_ENTROPY, fused=fused)
            return
        with attach(model, CROSS_ENTROPY, fused=fused):
            assert (model(**batch).logits is None) == fused
            attached_loss, attached_gradients = step(model, batch)
        with attach(model, HELD, fused=fused):
            held_loss, held_gradients = step(model, batch)
        torch.testing.assert_close(attached_loss, loss)
        torch.testing.assert_close(attached_gradients, gradients, rtol=1e-4, atol=1e-5)
        assert not held_gradients
        assert held_loss >= 50
        again, _ = step(model, batch)
        assert again == loss
        assert not any("overtone" in str(hook) for module in model.modules() for hook in module._forward_hooks.values())

    def test_attached_to_the_model_inside(self, kind, tmp_path):
        """As if attached before it was wrapped: the same, or a refusal at the latest in the first step."""
        model, batch = wrapped(kind, tmp_path)
        loss, gradients = step(model, batch)
        inner = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
        if kind == "POLY":
            with pytest.raises(ValueError, match=r"failed on two tokens .*task_ids"):
                attach(inner, CROSS_ENTROPY)
            return
        attach(inner, CROSS_ENTROPY)
        if kind in REFUSED:
            with pytest.raises(ValueError, match=REFUSED[kind]):
                step(model, batch)
            return
        attached_loss, attached_gradients = step(model, batch)
        torch.testing.assert_close(attached_loss, loss)
        torch.testing.assert_close(attached_gradients, gradients, rtol=1e-4, atol=1e-5)

    def test_compute_loss_func(self, kind, tmp_path):
        """The same, or a refusal where PEFT adds a term to the model's own loss alone."""
        model, batch = wrapped(kind, tmp_path)
        compute = compute_loss_func(CROSS_ENTROPY, model=model)
        inputs = {name: values for name, values in batch.items() if name != "labels"}
        if kind in REFUSED or kind in ADDING:
            with pytest.raises(ValueError, match=REFUSED.get(kind, "compute_loss_func cannot train with")):
                compute(model(**inputs), batch["labels"])
            return
        torch.testing.assert_close(compute(model(**inputs), batch["labels"]), model(**batch).loss)


VIRTUAL: dict[str, Any] = {
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p": lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8),
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


class TestVirtualTokens:
    def build(self, kind: str) -> tuple[Any, dict[str, torch.Tensor]]:
        model = tiny_models.build(sharpness=3)
        batch = tiny_models.ragged_batch(model)
        torch.manual_seed(0)
        return in_tuner(model, VIRTUAL[kind](), batch), batch

    @pytest.mark.parametrize("kind", sorted(VIRTUAL))
    @pytest.mark.parametrize("fused", [False, True])
    def test_a_mask_of_the_users_tokens(self, kind, fused):
        """As long as the user's labels; weight 0 is the label -100."""
        model, batch = self.build(kind)
        mask = (torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(0)) > 0.4).float()
        with attach(model, fused=fused):
            loss = model(**batch, loss_mask=mask).loss
            masked = {**batch, "labels": batch["labels"].masked_fill(mask == 0, -100)}
            torch.testing.assert_close(loss, model(**masked).loss)
            torch.testing.assert_close(model(**batch, loss_mask=2 * mask).loss, loss)

    def test_a_mask_of_another_length_is_refused_still(self):
        """Without virtual tokens, or with too few weights for them."""
        model, batch = self.build("prompt")
        with attach(model), pytest.raises(ValueError, match="loss_mask must have the shape of the labels"):
            model(**batch, loss_mask=torch.ones(3, 8))
        plain = tiny_models.build()
        with attach(plain), pytest.raises(ValueError, match="loss_mask must have the shape of the labels"):
            plain(**batch, loss_mask=torch.ones(3, 8))

    @pytest.mark.parametrize("kind", sorted(VIRTUAL))
    def test_trainer_with_compute_loss_func(self, kind, tmp_path):
        """The gradient of the attached loss, with a mask as well."""
        model, batch = self.build(kind)
        batch["loss_mask"] = (torch.rand(3, 9, generator=torch.Generator().manual_seed(0)) > 0.4).float()
        args = arguments(tmp_path, gradient_accumulation_steps=3, remove_unused_columns=False)
        expected = trained_gradients(self.attached(model), args, batch)
        model, _ = self.build(kind)
        gradients = trained_gradients(model, args, batch, compute_loss_func=compute_loss_func())
        assert gradients
        torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)

    def attached(self, model: Any) -> Any:
        attach(model)
        return model

    def test_logits_of_another_length_are_refused_where_nobody_knows(self):
        """Without the model, four more logits than labels could be anything."""
        model, batch = self.build("prompt")
        inputs = {name: values for name, values in batch.items() if name != "labels"}
        with pytest.raises(ValueError, match=r"virtual tokens.*model=model"):
            compute_loss_func()(model(**inputs), batch["labels"])
