"""Anchored models: what stays is measured against the unedited model, which nothing that is trained can change."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import peft
import pytest
import tiny_models
import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from test_huggingface_peft import TUNERS, wrapped
from tiny_trainer import Gradients, arguments, gradients_of, trained_gradients, word_tokenizer
from torch import Tensor
from transformers import Trainer

from overtone import Anchors, OverToneConfig, overtone_loss
from overtone.huggingface import TokenStatesCallback, attach, causal_lm_loss, compute_loss_func
from overtone.huggingface.forward import WatchedForward
from overtone.huggingface.reference import evaluating, positions_that_stay
from overtone.huggingface.wrappers import without_adapters

CONFIG = OverToneConfig(anchor=2.0, anchor_epsilon=0.01)
PROMPTS = (4, 2, 3, 5)
"""How many tokens of each row are no targets."""


def batch_of(model: Any) -> dict[str, Tensor]:
    """Ragged rows, right-padded, each with a prompt and targets."""
    batch = tiny_models.ragged_batch(model, lengths=(9, 5, 7, 6))
    for row, prompt in enumerate(PROMPTS):
        batch["labels"][row, :prompt] = -100
    return batch


def some_groups() -> Tensor:
    """Two groups of some of the positions of `batch_of` that may stay."""
    groups = torch.zeros(4, 9, dtype=torch.long)
    groups[0, :3], groups[2, 1], groups[3, 1:4], groups[3, 0] = 1, 4, 4, 1
    return groups


def lora(model: Any, **settings: Any) -> Any:
    """With an adapter that has moved the model away from where it was."""
    torch.manual_seed(1)
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **settings}
    return get_peft_model(model, LoraConfig(**settings))


def literal_loss(
    model: Any,
    unedited: Any,
    batch: dict[str, Tensor],
    config: OverToneConfig = CONFIG,
    prompts: tuple[int, ...] = PROMPTS,
) -> Tensor:
    """The core's loss with anchors at the prompts' own tokens, but the last, which predicts a target."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    at = torch.zeros_like(batch["labels"], dtype=torch.bool)
    for row, prompt in enumerate(prompts[: len(at)]):
        at[row, : prompt - 1] = True
    with torch.no_grad():
        before = unedited(**inputs).logits
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    anchors = Anchors.record(before, at) if config.anchor else None
    return overtone_loss(model(**inputs).logits, labels, anchors=anchors, **config.as_kwargs())


class TestPositions:
    def test_prompt_without_its_last_token(self):
        """Neither padding nor targets, nor the position whose prediction is the first target."""
        labels = torch.tensor([[-100, -100, -100, 7, 8, -100], [-100, -100, -100, -100, 7, 8]])
        mask = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]])
        expected = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0]]).bool()
        assert torch.equal(positions_that_stay({"attention_mask": mask}, labels, None, -100, None), expected)

    def test_a_later_turn_and_a_text_without_targets(self):
        labels = torch.tensor([[-100, -100, 7, -100, -100, -100], [-100] * 6])
        mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
        expected = torch.tensor([[1, 0, 0, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()
        assert torch.equal(positions_that_stay({"attention_mask": mask}, labels, None, -100, None), expected)

    def test_without_a_mask_padding_tokens_are_not_real(self):
        labels = torch.tensor([[-100, -100, 7, -100, -100]])
        tokens = torch.tensor([[5, 6, 7, tiny_models.PAD, tiny_models.PAD]])
        config = tiny_models.CONFIGS["llama"]()
        expected = torch.tensor([[1, 0, 0, 0, 0]]).bool()
        assert torch.equal(positions_that_stay({"input_ids": tokens}, labels, None, -100, config), expected)

    def test_labels_that_are_shifted_already(self):
        labels = torch.tensor([[-100, -100, -100, 7, 8, -100]])
        shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        found = positions_that_stay({}, None, shifted, -100, None)
        assert torch.equal(found, positions_that_stay({}, labels, None, -100, None))


class TestAttached:
    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("reference", ["adapter", "model", "logits"])
    def test_is_the_cores_loss_against_the_unedited_model(self, reference, fused):
        """Value and gradient, in training mode, where the adapter has dropout and the unedited model none."""
        unedited = tiny_models.build(sharpness=3)
        batch = batch_of(unedited)
        model = lora(copy.deepcopy(unedited), lora_dropout=0.5).train()
        given: dict[str, Any] = {}
        if reference == "logits":
            with torch.no_grad():
                given = {"reference_logits": unedited(batch["input_ids"], batch["attention_mask"]).logits}
        torch.manual_seed(0)
        expected = literal_loss(model, unedited, batch)
        with attach(model, CONFIG, reference=unedited if reference == "model" else reference, fused=fused):
            torch.manual_seed(0)
            loss = model(**batch, **given).loss
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients_of(loss, model), gradients_of(expected, model))
        targets_alone = literal_loss(model, unedited, batch, OverToneConfig())
        assert (loss - targets_alone).abs() > 0.1

    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("reference", ["adapter", "model", "logits"])
    def test_each_of_the_callers_groups_has_a_mean_of_its_own(self, reference, fused):
        unedited = tiny_models.build(sharpness=3)
        batch, groups = batch_of(unedited), some_groups()
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        model = lora(copy.deepcopy(unedited))
        with torch.no_grad():
            before = unedited(**inputs).logits
        labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        anchors = [Anchors.record(before, groups == group) for group in (1, 4)]
        expected = overtone_loss(model(**inputs).logits, labels, anchors=anchors, **CONFIG.as_kwargs())
        given = {"reference_logits": before} if reference == "logits" else {}
        with attach(model, CONFIG, reference=unedited if reference == "model" else reference, fused=fused):
            loss = model(**batch, **given, anchor_groups=groups).loss
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients_of(loss, model), gradients_of(expected, model))
        assert (loss - literal_loss(model, unedited, batch)).abs() > 0.01

    def test_one_group_of_all_that_may_stay_is_the_default(self):
        model = lora(tiny_models.build(sharpness=3))
        batch = batch_of(model)
        may_stay = positions_that_stay(batch, batch["labels"], None, -100, None)
        with attach(model, CONFIG, reference="adapter"):
            assert torch.equal(model(**batch, anchor_groups=2 * may_stay.long()).loss, model(**batch).loss)

    def test_groups_reach_a_forward_inside_another(self):
        """As PEFT's wrappers that keep the model's forward make them: the outer one has taken the argument."""
        model = lora(tiny_models.build(sharpness=3))
        batch, groups = batch_of(model), some_groups()
        with attach(model, CONFIG, reference="adapter"):
            causal_lm = model.get_base_model()
            inside = WatchedForward(causal_lm, causal_lm.forward)(**batch, anchor_groups=groups).loss
            assert torch.equal(inside, model(**batch, anchor_groups=groups).loss)
            assert not torch.equal(inside, model(**batch).loss)

    def test_groups_in_a_trainer(self, tmp_path):
        """As a column of a dataset whose rows are padded already."""
        model = lora(tiny_models.build(sharpness=3))
        batch = {**batch_of(model), "anchor_groups": some_groups()}
        args = arguments(tmp_path, per_device_train_batch_size=4, remove_unused_columns=False)
        with attach(model, CONFIG, reference="adapter"):
            expected = gradients_of(model(**batch).loss, model)
            found = trained_gradients(model, args, batch)
        torch.testing.assert_close(
            {name.removeprefix("module."): value for name, value in found.items()}, expected, rtol=1e-4, atol=1e-6
        )

    @pytest.mark.parametrize("fused", [False, True])
    def test_top_k(self, fused):
        unedited = tiny_models.build(sharpness=3)
        batch = batch_of(unedited)
        model = lora(copy.deepcopy(unedited))
        with attach(model, CONFIG, reference="adapter"):
            whole = model(**batch).loss
        losses = []
        for k in (1, 10, tiny_models.VOCABULARY - 1):
            with attach(model, CONFIG, reference="adapter", anchor_top_k=k, fused=fused):
                losses.append(model(**batch).loss)
        assert losses[0] < losses[1] < whole
        torch.testing.assert_close(losses[2], whole)

    def test_the_model_is_left_as_it_was(self):
        """Modes and what is trained, a frozen part of the adapter too, also when the reference's forward fails."""
        model = lora(tiny_models.build()).train()
        batch = batch_of(model)
        model.base_model.model.model.layers[0].eval()
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
        before = state_of(model)
        with attach(model, CONFIG, reference="adapter"):
            assert state_of(model) == before
            model(**batch).loss.backward()
            assert state_of(model) == before
            fails_in_evaluation(model)
            with pytest.raises(RuntimeError, match="in evaluation"):
                model(**batch)
            assert state_of(model) == before

    def test_gradient_checkpointing(self):
        unedited = tiny_models.build(sharpness=3)
        batch = batch_of(unedited)
        model = lora(copy.deepcopy(unedited)).train()
        expected = gradients_of(literal_loss(model, unedited, batch), model)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with attach(model, CONFIG, reference="adapter"):
            found = gradients_of(model(**batch).loss, model)
        torch.testing.assert_close(found, expected)

    def test_compiled(self):
        """The unedited model runs outside of the graph."""
        unedited = tiny_models.build(layers=1, sharpness=3)
        batch = batch_of(unedited)
        model = copy.deepcopy(unedited)
        torch.nn.init.normal_(model.model.layers[0].self_attn.q_proj.weight)
        with attach(model, CONFIG, reference=unedited):
            loss = torch.compile(model, backend="eager")(**batch).loss
        torch.testing.assert_close(loss, literal_loss(model, unedited, batch))

    def test_arguments_by_position(self):
        unedited = tiny_models.build(sharpness=3)
        batch = batch_of(unedited)
        model = copy.deepcopy(unedited)
        names = list(inspect.signature(model.forward).parameters)
        given = [batch.get(name) for name in names[: names.index("labels") + 1]]
        torch.nn.init.normal_(model.model.layers[0].self_attn.q_proj.weight)
        with attach(model, CONFIG, reference=unedited):
            torch.testing.assert_close(model(*given).loss, literal_loss(model, unedited, batch))

    def test_evaluation_is_cross_entropy(self):
        unedited = tiny_models.build()
        batch = batch_of(unedited)
        model = lora(copy.deepcopy(unedited))
        with torch.no_grad():
            expected = model(**batch).loss
            with attach(model, CONFIG, reference="adapter"):
                torch.testing.assert_close(model(**batch).loss, expected)
            with attach(model, CONFIG, reference="adapter", eval_loss="overtone"):
                torch.testing.assert_close(model(**batch).loss, literal_loss(model, unedited, batch))

    def test_a_copy_has_a_reference_of_its_own(self):
        model = lora(tiny_models.build(sharpness=3))
        batch = batch_of(model)
        with attach(model, CONFIG, reference="adapter"):
            twin = copy.deepcopy(model)
            loss = twin(**batch).loss
            assert loss == model(**batch).loss
            torch.nn.init.normal_(twin.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight)
            assert loss == model(**batch).loss
            assert loss != twin(**batch).loss

    def test_auxiliary_loss_of_a_mixture_of_experts_stays(self):
        unedited = tiny_models.build("mixtral", sharpness=3)
        batch = batch_of(unedited)
        model = lora(copy.deepcopy(unedited))
        expected = literal_loss(model, unedited, batch)
        with attach(model, CONFIG, reference="adapter"):
            outputs = model(**batch)
        torch.testing.assert_close(outputs.loss, expected + 0.5 * outputs.aux_loss)

    def test_a_batch_without_prompts_is_not_passed_over_in_silence(self):
        """Labels that are the inputs, as collators for language modelling give them, leave nothing to keep."""
        model = lora(tiny_models.build())
        batch = batch_of(model)
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        with attach(model):
            expected = model(**batch).loss
        with attach(model, CONFIG, reference="adapter"), pytest.warns(UserWarning, match="the anchor keeps nothing"):
            assert model(**batch).loss == expected

    def test_waits_with_a_hold(self):
        """Targets that are settled do not hold a step in which the prompt has moved away."""
        model = lora(tiny_models.build(sharpness=3))
        batch = batch_of(model)
        config = OverToneConfig(epsilon=50.0, hold="settled", anchor=1.0, anchor_epsilon=1e-3)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for settings, is_held in (({}, False), ({"anchor_epsilon": 50.0}, True)):
            changed = OverToneConfig(**{**config.as_kwargs(), **settings})
            model.zero_grad()
            with attach(model, changed, reference="adapter"):
                model(**batch).loss.backward()
            assert all(parameter.grad is None for parameter in trained) == is_held


class TestAdapterSwitchedOff:
    """It is the model from before, bit for bit, whatever the adapter has become; or there is a refusal."""

    REFUSED = (
        "ADAPTION_PROMPT",
        "CARTRIDGE",
        "CPT",
        "MULTITASK_PROMPT_TUNING",
        "POLY",
        "PREFIX_TUNING",
        "PROMPT_TUNING",
    )

    @pytest.mark.parametrize("kind", TUNERS)
    def test_in_every_tuner(self, kind, tmp_path):
        model, batch = wrapped(kind, tmp_path)
        # Before PEFT 0.21 X-LoRA's experts were trained beside its switch.
        is_old = Version(peft.__version__) < Version("0.21")
        if kind in (*self.REFUSED, "P_TUNING") or (is_old and kind == "XLORA"):
            with pytest.raises(ValueError, match=r"anchor|reference|model must"):
                attach(model, CONFIG, reference="adapter")
            return
        self.check(model, batch)

    @pytest.mark.parametrize("settings", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
    def test_in_lora_of_other_kinds(self, settings):
        model = lora(tiny_models.build(), **settings)
        self.check(model, tiny_models.ragged_batch(tiny_models.build()))

    def check(self, model: Any, batch: dict[str, Tensor]) -> None:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            before = tiny_models.build()(**inputs).logits
        with attach(model, CONFIG, reference="adapter") as handle, torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.5 * torch.randn_like(parameter)
            with evaluating(handle.model), without_adapters(handle.model):
                assert torch.equal(handle.model(**inputs).logits, before)


def state_of(model: Any) -> dict[str, Any]:
    flags = {name: (module.training, getattr(module, "_disable_adapters", None)) for name, module in named(model)}
    return {**flags, **{name: parameter.requires_grad for name, parameter in model.named_parameters()}}


def named(model: Any) -> Any:
    return ((f"module {name}", module) for name, module in model.named_modules())


def fails_in_evaluation(model: Any) -> None:
    def fail(module: Any, args: Any) -> None:
        if not module.training:
            raise RuntimeError("in evaluation")

    model.base_model.model.model.layers[1].register_forward_pre_hook(fail)


class TestNumItemsInBatch:
    def test_term_counts_with_the_share_of_the_targets(self):
        """So that over a step the shares make 1."""
        unedited = tiny_models.build(sharpness=3)
        batch = batch_of(unedited)
        model = lora(copy.deepcopy(unedited))
        targets = int((batch["labels"][:, 1:] != -100).sum())
        with attach(model, CONFIG, reference="adapter"):
            loss = model(**batch).loss
            torch.testing.assert_close(model(**batch, num_items_in_batch=4 * targets).loss, loss / 4)
            none = {**batch, "labels": torch.full_like(batch["labels"], -100)}
            assert model(**none, num_items_in_batch=targets).loss == 0

    def test_accumulated_micro_batches(self, tmp_path):
        """Each micro-batch's mean, weighted by its share of the label tokens."""
        unedited = tiny_models.build(sharpness=3)
        batch = batch_of(unedited)
        model = lora(copy.deepcopy(unedited))
        counts = (batch["labels"][:, 1:] != -100).sum(dim=1)
        expected_loss = torch.zeros(())
        for pair in (slice(0, 2), slice(2, 4)):
            part = {name: values[pair] for name, values in batch.items()}
            share = counts[pair].sum() / counts.sum()
            expected_loss = expected_loss + share * literal_loss(model, unedited, part, prompts=PROMPTS[pair])
        expected = gradients_of(expected_loss, model)
        args = arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
        with attach(model, CONFIG, reference="adapter"):
            found = trained_gradients(model, args, batch)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)

    def test_in_sft_trainer(self, tmp_path):
        """Which has to be told to take the model's own loss."""
        trl = pytest.importorskip("trl", reason="TRL is not in the environments of older versions")

        class OfTheModel(trl.SFTTrainer):
            compute_loss = Trainer.compute_loss

        unedited = tiny_models.build(sharpness=3)
        model = lora(copy.deepcopy(unedited))
        rows = [{"input_ids": list(range(3, 12)), "completion_mask": [0] * 4 + [1] * 5}]
        rows += [{"input_ids": list(range(20, 25)), "completion_mask": [0] * 2 + [1] * 3}]
        ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
        labels = torch.full((2, 9), -100)
        for row, text in enumerate(rows):
            length = len(text["input_ids"])
            ids[row, :length], mask[row, :length] = torch.tensor(text["input_ids"]), 1
            labels[row, PROMPTS[row] : length] = ids[row, PROMPTS[row] : length]
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        expected = gradients_of(literal_loss(model, unedited, batch), model)
        recorder = Gradients()
        with attach(model, CONFIG, reference="adapter"):
            OfTheModel(
                model=model,
                args=trl.SFTConfig(
                    output_dir=str(tmp_path),
                    completion_only_loss=True,
                    per_device_train_batch_size=2,
                    max_steps=1,
                    max_grad_norm=0,
                    report_to="none",
                    save_strategy="no",
                    use_cpu=True,
                    bf16=False,
                    gradient_checkpointing=False,
                    disable_tqdm=True,
                ),
                train_dataset=Dataset.from_list(rows),
                processing_class=word_tokenizer(),
                callbacks=[recorder],
            ).train()
        torch.testing.assert_close(recorder.values, expected, rtol=1e-4, atol=1e-6)


class TestRefused:
    @pytest.mark.parametrize(
        ("settings", "config", "error", "words"),
        [
            ({}, CONFIG, ValueError, "reference must be given"),
            ({"reference": "adapter"}, None, ValueError, "reference"),
            ({"anchor_top_k": 5}, None, ValueError, "anchor_top_k"),
            ({"reference": "adaptor"}, CONFIG, ValueError, "adaptor"),
            ({"reference": torch.zeros(2)}, CONFIG, ValueError, "reference"),
            ({"reference": "adapter", "anchor_top_k": 0}, CONFIG, ValueError, "anchor_top_k"),
            ({"reference": "adapter", "anchor_top_k": 2.5}, CONFIG, ValueError, "anchor_top_k"),
            ({"reference": "adapter", "anchor_top_k": tiny_models.VOCABULARY}, CONFIG, ValueError, "anchor_top_k"),
            ({"reference": torch.nn.Linear(2, 2)}, CONFIG, ValueError, "reference must be a model"),
        ],
    )
    def test_at_once(self, settings, config, error, words):
        model = lora(tiny_models.build())
        before = type(model.get_base_model())
        with pytest.raises(error, match=words):
            attach(model, config, **settings)
        assert type(model.get_base_model()) is before

    @pytest.mark.parametrize(
        ("arch", "settings"),
        [
            ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
            ("llama", {"init_lora_weights": "pissa"}),
            ("llama", {"init_lora_weights": "olora"}),
        ],
    )
    def test_adapters_that_change_what_is_below(self, arch, settings):
        model = lora(tiny_models.build(arch), **settings)
        with pytest.raises(ValueError, match="reference='adapter'"):
            attach(model, CONFIG, reference="adapter")

    def test_merged_adapters(self):
        """PEFT would take them out of the weights, in place, in the first pass without them."""
        model = lora(tiny_models.build())
        model.merge_adapter()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match="merged"):
            attach(model, CONFIG, reference="adapter")
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert any(getattr(module, "merged", False) for module in model.modules())

    @pytest.mark.parametrize(("change", "words"), [("merge_adapter", "unmerge"), ("merge_and_unload", "PEFT adapters")])
    def test_adapters_that_are_merged_later(self, change, words):
        """In the step, before a pass without them: the model would be compared with itself, or changed for good."""
        model = lora(tiny_models.build())
        batch = batch_of(model)
        attach(model, CONFIG, reference="adapter")
        model = getattr(model, change)() or model
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=words):
            model(**batch)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    def test_a_trained_weight_beside_the_adapter(self):
        model = lora(tiny_models.build())
        model.get_output_embeddings().weight.requires_grad_(True)
        with pytest.raises(ValueError, match=r"lm_head\.weight"):
            attach(model, CONFIG, reference="adapter")

    def test_a_model_without_adapters(self):
        with pytest.raises(ValueError, match="PEFT adapters"):
            attach(tiny_models.build(), CONFIG, reference="adapter")

    def test_prompt_learning(self):
        model = get_peft_model(tiny_models.build(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        for reference in ("adapter", "logits", tiny_models.build()):
            with pytest.raises(ValueError, match="prompt"):
                attach(model, CONFIG, reference=reference)

    def test_a_reference_that_is_trained(self):
        model = tiny_models.build()
        with pytest.raises(ValueError, match="deepcopy"):
            attach(model, CONFIG, reference=model)
        with pytest.raises(ValueError, match="deepcopy"):
            attach(model, CONFIG, reference=model.model)

    def test_a_reference_that_wants_a_mask(self):
        """It is asked with all that a batch has, as in a step."""

        class Masked(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = tiny_models.build()

            def forward(self, input_ids, attention_mask, **others):
                return self.inner(input_ids=input_ids, attention_mask=attention_mask, **others)

        model = tiny_models.build()
        with attach(model, CONFIG, reference=Masked().requires_grad_(False)):
            assert model(**batch_of(model)).loss.isfinite()

    @pytest.mark.parametrize(
        ("groups", "error", "said"),
        [
            (some_groups()[:, 1:], ValueError, r"shape of the labels \(4, 9\), got \(4, 8\)"),
            (some_groups() - 1, ValueError, "0 .none. or above, got -1"),
            (some_groups().float(), TypeError, "whole numbers, 0 for none, got torch.float32"),
            ([[1]], TypeError, "whole numbers, 0 for none, got list"),
            (torch.nn.functional.one_hot(torch.tensor([3] * 4), 9), ValueError, "got 1 at position 3 of row 0"),
            (torch.nn.functional.one_hot(torch.tensor([0, 6, 0, 0]), 9), ValueError, "got 1 at position 6 of row 1"),
        ],
    )
    def test_groups_that_do_not_fit(self, groups, error, said):
        """The last two stand where a target is predicted, and on padding."""
        model = lora(tiny_models.build())
        attached = attach(model, CONFIG, reference="adapter")
        with attached, pytest.raises(error, match=f"anchor_groups must .*{said}"):
            model(**batch_of(model), anchor_groups=groups)

    def test_a_micro_batch_without_targets(self):
        """Its share of the step's label tokens is 0, and with it its anchors' weight: somebody has to say so."""
        model = lora(tiny_models.build())
        batch = {**batch_of(model), "anchor_groups": some_groups()}
        batch["labels"] = torch.full_like(batch["labels"], -100)
        with attach(model, CONFIG, reference="adapter"):
            assert model(**batch).loss > 0
            with pytest.warns(UserWarning, match="without a target"):
                assert model(**batch, num_items_in_batch=9).loss == 0

    def test_another_attachment_on_top_that_has_no_anchor(self):
        model = lora(tiny_models.build())
        batch = batch_of(model)
        both = attach(model, CONFIG, reference="adapter"), attach(model)
        with both[0], both[1], pytest.raises(ValueError, match="anchor_groups must be None"):
            model(**batch, anchor_groups=some_groups())

    def test_no_groups_at_all(self):
        model = lora(tiny_models.build())
        batch = batch_of(model)
        attached = attach(model, CONFIG, reference="adapter")
        with attached, pytest.warns(UserWarning, match="anchor_groups are all 0"):
            loss = model(**batch, anchor_groups=torch.zeros_like(batch["labels"])).loss
        torch.testing.assert_close(loss, literal_loss(model, model, batch, OverToneConfig()))

    def test_another_vocabulary(self):
        """Whose ids are all in range, so that nothing else would tell."""
        model, smaller = tiny_models.build(), tiny_models.build()
        smaller.resize_token_embeddings(tiny_models.VOCABULARY - 1)
        with pytest.raises(ValueError, match="vocabulary"):
            attach(model, CONFIG, reference=smaller, anchor_top_k=2)
        batch = batch_of(model)
        logits = torch.zeros(*batch["labels"].shape, tiny_models.VOCABULARY - 1)
        for fused in (False, True):
            attached = attach(model, CONFIG, reference="logits", anchor_top_k=2, fused=fused)
            with attached, pytest.raises(ValueError, match="vocabulary"):
                model(**batch, reference_logits=logits)

    def test_in_a_step(self):
        model = lora(tiny_models.build())
        batch = batch_of(model)
        logits = torch.zeros(*batch["labels"].shape, tiny_models.VOCABULARY)
        with attach(model, CONFIG, reference="logits"):
            with pytest.raises(ValueError, match="reference_logits"):
                model(**batch)
            with pytest.raises(ValueError, match="reference"):
                model(**batch, reference_logits=logits[:, 1:])
            with pytest.raises(TypeError, match="reference_logits"):
                model(**batch, reference_logits="logits")
        for settings in ({}, {"config": CONFIG, "reference": "adapter"}):
            with attach(model, **settings), pytest.raises(ValueError, match="reference_logits"):
                model(**batch, reference_logits=logits)
        with attach(model), pytest.raises(ValueError, match="anchor_groups must be None"):
            model(**batch, anchor_groups=some_groups())
        with attach(model, CONFIG, reference="adapter"):
            with pytest.raises(ValueError, match="loss_mask"):
                model(**batch, loss_mask=torch.ones_like(batch["labels"]))
            with pytest.raises(ValueError, match="past_key_values"):
                model(**batch, past_key_values=transformers.DynamicCache())

    def test_where_no_model_can_be_asked(self):
        with pytest.raises(ValueError, match="attach"):
            compute_loss_func(CONFIG)
        with pytest.raises(ValueError, match="stop_after_held"):
            TokenStatesCallback(CONFIG, stop_after_held=2)
        with pytest.raises(ValueError, match="anchors"):
            causal_lm_loss(torch.zeros(1, 3, 5), torch.zeros(1, 3, dtype=torch.long), CONFIG)
