"""The adapters for training frameworks: TRL and transformers as they are, the others' parts by their signatures.

The stand-ins have the names and arguments that the frameworks call with, in the versions of docs/frameworks.md.
"""

import copy
import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import tiny_models
import torch
from datasets import Dataset
from tiny_trainer import Gradients, arguments, rows, word_tokenizer
from torch.nn.functional import cross_entropy
from transformers import Gemma2Config, Gemma2ForCausalLM, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from overtone import OverToneConfig, overtone_loss
from overtone.huggingface import compute_loss_func
from overtone.integrations.callback import OverToneCallback
from overtone.integrations.litgpt import loss_of
from overtone.integrations.module import loss_module
from overtone.integrations.ms_swift import register
from overtone.integrations.settings import read_settings
from overtone.integrations.trl import OverToneMixin

CROSS_ENTROPY = "overtone:epsilon=0+lam=1"
ALWAYS_HELD = {"epsilon": 99, "hold": "settled"}


@pytest.fixture
def batch():
    """Logits ``(2, 6, V)`` with labels of the same positions, the first two ignored, and the next tokens."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 11, generator=generator).mul(4).requires_grad_()
    labels = torch.randint(11, (2, 6), generator=generator)
    labels[:, :2] = -100
    return logits, labels


def literal(logits, labels, **settings):
    """The mean over the next tokens, by cutting as the definition does."""
    return overtone_loss(logits[:, :-1], labels[:, 1:], **settings)


class TestSettings:
    @pytest.mark.parametrize(
        ("value", "config"),
        [
            (None, OverToneConfig()),
            ("overtone", OverToneConfig()),
            ("overtone:lam=0.5+hold=settled", OverToneConfig(lam=0.5, hold="settled")),
            ({"lam": 0.5, "hold": ["correct", 0.2]}, OverToneConfig(lam=0.5, hold=("correct", 0.2))),
            ({}, OverToneConfig()),
            ("overtone_recommended", OverToneConfig.recommended("lora")),
            ({"name": "overtone_recommended", "epsilon": 0.1}, OverToneConfig.recommended("lora", epsilon=0.1)),
            (OverToneConfig(epsilon=1), OverToneConfig(epsilon=1)),
        ],
    )
    def test_every_form(self, value, config):
        """One grammar, and the fields."""
        assert read_settings(value) == config

    @pytest.mark.parametrize(
        ("value", "error", "message"),
        [
            (True, TypeError, "settings must be"),
            (0.1, TypeError, "settings must be"),
            ("dft", ValueError, "dft"),
            ({"name": "gem"}, ValueError, "gem"),
            ("overtone:dynamic=false", ValueError, "dynamic"),
            ({"lambda": 0.1}, ValueError, "lambda"),
            ("overtone:lam=2", ValueError, "lam"),
            ("overtone:anchor=1", ValueError, "anchor 0, got 1"),
            (OverToneConfig(anchor=0.5), ValueError, "anchor 0, got 0.5"),
        ],
    )
    def test_what_cannot_be(self, value, error, message):
        """Named, before anything runs."""
        with pytest.raises(error, match=message):
            read_settings(value)


class OverToneSFTTrainer(OverToneMixin, SFTTrainer):
    pass


def sft_trainer(folder, trainer_class, arch="llama", *, model=None, given=None, **changes):
    settings = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "max_grad_norm": 0,
        "train_sampling_strategy": "sequential",
        **changes,
    }
    lengths = [6, 9, 7, 8, 5, 9, 6, 7]
    texts = [[3 + (row * 7 + place * 3) % 50 for place in range(length)] for row, length in enumerate(lengths)]
    data = Dataset.from_list([{"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for ids in texts])
    return trainer_class(
        model=model or tiny_models.build(arch),
        args=SFTConfig(**settings),
        train_dataset=data,
        eval_dataset=data,
        processing_class=word_tokenizer(),
        **(given or {}),
    )


def trained(trainer):
    """What is logged of each step, the gradients of the first, and the forward passes."""
    recorder, passes = Gradients(), []
    trainer.add_callback(recorder)
    handle = trainer.model.base_model.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    trainer.train()
    handle.remove()
    names = {"loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "aux_loss"}
    logs = [{name: log[name] for name in names & set(log)} for log in trainer.state.log_history if "loss" in log]
    return logs, recorder.values, passes


@pytest.mark.filterwarnings("ignore::FutureWarning")
class TestTrl:
    @pytest.mark.parametrize(
        ("arch", "changes"),
        [
            ("llama", {}),
            ("llama", {"gradient_accumulation_steps": 2}),
            ("llama", {"packing": True, "packing_strategy": "wrapped", "max_length": 16}),
            ("llama", {"bf16": True}),
            ("mixtral", {"gradient_accumulation_steps": 2}),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
    )
    def test_cross_entropy_is_trl_s_own(self, tmp_path, arch, changes):
        """Losses, metrics, router loss and gradients, with as many forward passes."""
        expected = trained(sft_trainer(tmp_path, SFTTrainer, arch, **changes))
        seen = trained(sft_trainer(tmp_path, OverToneSFTTrainer, arch, given={"overtone": CROSS_ENTROPY}, **changes))
        tolerance = 2e-2 if "bf16" in changes else 1e-5
        torch.testing.assert_close(seen[0], expected[0], rtol=tolerance, atol=tolerance)
        for name, gradient in expected[1].items():
            assert torch.dist(seen[1][name], gradient) <= tolerance * gradient.norm(), name
        assert seen[2] == expected[2]
        assert all(seen[2])

    def test_loss_is_that_of_the_logits(self, tmp_path):
        """The first step's loss and gradients are those of compute_loss_func, which runs the model twice."""
        config = OverToneConfig(lam=0.5)
        function = {"compute_loss_func": compute_loss_func(config)}
        expected = trained(sft_trainer(tmp_path, SFTTrainer, given=function))
        seen = trained(sft_trainer(tmp_path, OverToneSFTTrainer, given={"overtone": config}))
        torch.testing.assert_close(seen[:2], expected[:2], rtol=1e-4, atol=1e-5)
        assert seen[2] == [True, True]
        assert len(expected[2]) >= 4

    def test_evaluation_is_cross_entropy(self, tmp_path):
        """As SFTTrainer's own, unless asked for otherwise."""
        expected, plain, other = (
            sft_trainer(tmp_path, kind, given=given).evaluate()["eval_loss"]
            for kind, given in (
                (SFTTrainer, {}),
                (OverToneSFTTrainer, {}),
                (OverToneSFTTrainer, {"overtone": {"epsilon": 99}, "eval_loss": "overtone"}),
            )
        )
        assert plain == expected
        assert other == pytest.approx(99)

    @pytest.mark.parametrize("arch", ["llama", "mixtral"])
    def test_held_step_is_held_as_a_whole(self, tmp_path, arch):
        """No gradient at all, the router's among them; the metrics go on."""
        logs, gradients, _ = trained(sft_trainer(tmp_path, OverToneSFTTrainer, arch, given={"overtone": ALWAYS_HELD}))
        assert set(gradients.values()) == {None}
        assert logs[0]["mean_token_accuracy"] >= 0
        assert logs[0]["loss"] == pytest.approx(99 + 0.5 * logs[0].get("aux_loss", 0), abs=1e-3)

    def test_prompt_tuning_and_lora(self, tmp_path):
        """Adapters train; virtual tokens lengthen the hidden states, not the labels."""
        from peft import LoraConfig, PromptTuningConfig

        for adapter in (LoraConfig(task_type="CAUSAL_LM"), PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=3)):
            losses = [
                trained(sft_trainer(tmp_path, kind, given={"peft_config": adapter, **given}))[0][0]["loss"]
                for kind, given in ((SFTTrainer, {}), (OverToneSFTTrainer, {"overtone": CROSS_ENTROPY}))
            ]
            assert losses[1] == pytest.approx(losses[0], rel=1e-5)

    @pytest.mark.parametrize(
        ("changes", "given", "message"),
        [
            ({"loss_type": "dft"}, {}, "loss_type must be 'nll'"),
            ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor must be 0"),
            ({"torch_compile": True}, {}, "torch_compile must be False"),
            ({}, {"compute_loss_func": compute_loss_func()}, "compute_loss_func must be None"),
            ({}, {"overtone": "dft"}, "dft"),
            ({}, {"eval_loss": "ppl"}, "eval_loss must be one of"),
        ],
    )
    def test_another_loss_is_refused(self, tmp_path, changes, given, message):
        """By the constructor."""
        with pytest.raises(ValueError, match=message):
            sft_trainer(tmp_path, OverToneSFTTrainer, given=given, **changes)

    def test_soft_capped_logits_are_refused(self, tmp_path):
        """They are not those of a plain output layer."""
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = Gemma2ForCausalLM(Gemma2Config(vocab_size=61, num_key_value_heads=2, head_dim=8, **sizes))
        with pytest.raises(ValueError, match="Gemma2ForCausalLM"):
            sft_trainer(tmp_path, OverToneSFTTrainer, model=model)

    def test_a_parent_that_does_without_the_fused_head_is_refused(self, tmp_path):
        """It would train on a loss of its own."""

        class OfTheModel(SFTTrainer):
            compute_loss = Trainer.compute_loss

        class Mixed(OverToneMixin, OfTheModel):
            pass

        with pytest.raises(ValueError, match="fused_lm_head must be True"):
            sft_trainer(tmp_path, Mixed).train()

    def test_weights_of_tokens_are_refused(self, tmp_path):
        """SFTTrainer's forward would drop them without a word."""
        trainer = sft_trainer(tmp_path, OverToneSFTTrainer)
        ids = torch.tensor([[3, 4, 5]])
        with pytest.raises(ValueError, match="loss_mask must be None"):
            trainer.compute_loss(trainer.model, {"input_ids": ids, "labels": ids, "loss_mask": torch.ones(1, 3)})

    def test_sharded_model_is_refused(self, tmp_path):
        """Its output layer is not all here; DeepSpeed's ZeRO-3 marks parameters so when training begins."""
        trainer = sft_trainer(tmp_path, OverToneSFTTrainer)
        trainer.model.lm_head.weight.ds_id = 0
        with pytest.raises(ValueError, match="model must not be sharded, got one with DeepSpeed"):
            trainer.compute_loss(trainer.model, {})


class TestCallback:
    def test_attached_while_it_trains(self, tmp_path):
        """The step's gradients are those of the loss on the model's logits; afterwards the loss is the model's own."""
        model = tiny_models.build()
        inputs = tiny_models.ragged_batch(model, (7,))
        before = model(**inputs).loss
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        expected = literal(logits, inputs["labels"], lam=0.5)
        recorder = Gradients()
        settings = OverToneCallback("overtone:lam=0.5")
        wanted = torch.autograd.grad(expected, list(model.parameters()))
        args = arguments(tmp_path, learning_rate=0.0)
        trainer = Trainer(model, args, train_dataset=rows(inputs), callbacks=[settings, recorder])
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
        torch.testing.assert_close(list(recorder.values.values()), list(wanted), rtol=1e-4, atol=1e-5)
        assert torch.equal(model(**inputs).loss, before)
        assert type(model).forward is type(tiny_models.build()).forward

    def test_anchor_is_measured_against_the_reference(self, tmp_path):
        """At the unedited model nothing has moved: the anchored term is its clip."""
        model = tiny_models.build()
        inputs = tiny_models.ragged_batch(model, (7,))
        inputs["labels"][:, :3] = -100
        settings = OverToneCallback({"anchor": 2, "anchor_epsilon": 0.25}, reference=copy.deepcopy(model))
        trainer = Trainer(model, arguments(tmp_path), train_dataset=rows(inputs), callbacks=[settings])
        trainer.train()
        logits = settings.arguments["reference"](inputs["input_ids"]).logits
        expected = literal(logits, inputs["labels"]).item() + 2 * 0.25
        assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)

    def test_training_again_after_an_error(self, tmp_path):
        """The model has its own loss afterwards."""
        model = tiny_models.build()
        inputs = tiny_models.ragged_batch(model, (7,))

        class FailsOnce(TrainerCallback):
            has_failed = False

            def on_step_end(self, *_, **__):
                if not self.has_failed:
                    self.has_failed = True
                    raise ZeroDivisionError

        callbacks = [OverToneCallback({"epsilon": 99}), FailsOnce()]
        trainer = Trainer(model, arguments(tmp_path), train_dataset=rows(inputs), callbacks=callbacks)
        with pytest.raises(ZeroDivisionError):
            trainer.train()
        trainer.train()
        assert model(**inputs).loss < 99
        assert type(model).forward is type(tiny_models.build()).forward

    def test_another_loss_in_the_trainer_is_refused(self, tmp_path):
        """As LLaMA-Factory's use_dft_loss sets one after its constructor."""
        model = tiny_models.build()
        inputs = tiny_models.ragged_batch(model, (7,))
        trainer = Trainer(model, arguments(tmp_path), train_dataset=rows(inputs), callbacks=[OverToneCallback()])
        trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum()
        with pytest.raises(ValueError, match="compute_loss_func"):
            trainer.train()

    def test_bad_settings_are_refused_at_once(self):
        """Not when training begins."""
        with pytest.raises(ValueError, match="lam"):
            OverToneCallback("overtone:lam=2")


@pytest.fixture
def loss_map(monkeypatch):
    """ms-swift's, of `swift.loss`."""
    module = ModuleType("swift.loss")
    module.loss_map = {"cross_entropy": object}
    monkeypatch.setitem(sys.modules, "swift", ModuleType("swift"))
    monkeypatch.setitem(sys.modules, "swift.loss", module)
    return module.loss_map


def swift_loss(loss_map, settings=None, *, template=None, **args):
    register(settings)
    template = {"sequence_parallel_size": 1, "task_type": "causal_lm", **(template or {})}
    args = SimpleNamespace(**{"label_smoothing_factor": 0.0, "enable_dft_loss": False, **args})
    return loss_map["overtone"](args, SimpleNamespace(template=SimpleNamespace(**template)))


class TestMsSwift:
    def test_loss(self, loss_map, batch):
        """That of the next tokens, divided by the number that the trainer has counted, or by this batch's."""
        logits, labels = batch
        loss = swift_loss(loss_map, "overtone:lam=0.5")
        outputs = Outputs(logits=logits)
        expected = literal(logits, labels, lam=0.5, reduction="sum")
        torch.testing.assert_close(loss(outputs, labels, num_items_in_batch=20, trainer=None), expected / 20)
        torch.testing.assert_close(loss(outputs, labels, num_items_in_batch=None, loss_scale=None), expected / 8)

    def test_loss_scale_weighs_the_tokens(self, loss_map, batch):
        """ms-swift hands it over rolled by one and flat; the sum is divided by the number of tokens, as its own."""
        logits, labels = batch
        scale = torch.arange(12.0).view(2, 6)
        tokens = literal(logits, labels, reduction="none")
        rolled = torch.roll(scale, shifts=-1, dims=-1).view(-1)
        seen = swift_loss(loss_map)(Outputs(logits=logits), labels, num_items_in_batch=8, loss_scale=rolled)
        torch.testing.assert_close(seen, (tokens * scale[:, 1:]).sum() / 8)

    def test_evaluation_is_cross_entropy(self, loss_map, batch):
        """While gradients are disabled."""
        logits, labels = batch
        with torch.no_grad():
            seen = swift_loss(loss_map)(Outputs(logits=logits), labels)
        torch.testing.assert_close(seen, cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))

    def test_held_step_holds_the_router_loss(self, loss_map, batch):
        """Which the trainer adds afterwards, from the outputs."""
        logits, labels = batch
        router = torch.ones((), requires_grad=True)
        outputs = Outputs(logits=logits, aux_loss=router * 2)
        loss = swift_loss(loss_map, ALWAYS_HELD)(outputs, labels) + 0.1 * outputs.get("aux_loss")
        loss.backward()
        assert logits.grad is None
        assert router.grad is None
        assert loss.item() == pytest.approx(99.2)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0"),
            ({"enable_dft_loss": True}, "enable_dft_loss must be False"),
            ({"template": {"sequence_parallel_size": 2}}, "sequence_parallel_size must be 1"),
            ({"template": {"task_type": "seq_cls"}}, "task_type must be 'causal_lm'"),
        ],
    )
    def test_what_would_be_another_loss_is_refused(self, loss_map, changes, message):
        """When the trainer is made."""
        with pytest.raises(ValueError, match=message):
            swift_loss(loss_map, **changes)


class Outputs(dict):
    """As transformers' ModelOutput: by name and by attribute."""

    __getattr__ = dict.__getitem__


@pytest.fixture
def script():
    """A module of `litgpt.finetune`: it calls its loss by name."""

    def chunked_cross_entropy(logits, targets, chunk_size=128, ignore_index=-100):
        logits = torch.cat(logits, dim=1) if isinstance(logits, list) else logits
        return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=ignore_index)

    module = ModuleType("litgpt.finetune.lora")
    module.chunked_cross_entropy = chunked_cross_entropy
    return module


class TestLitgpt:
    def test_training_and_validation(self, script, batch):
        """Training has this loss, of a list of chunks or of whole logits; validation stays what it was."""
        logits, labels = batch
        targets = labels[:, 1:]
        expected = literal(logits, labels, lam=0.5)
        with loss_of(script, "overtone:lam=0.5"):
            chunks = list(logits[:, :-1].split(2, dim=1))
            torch.testing.assert_close(script.chunked_cross_entropy(chunks, targets), expected)
            torch.testing.assert_close(script.chunked_cross_entropy(logits[:, :-1], targets), expected)
            with torch.no_grad():
                seen = script.chunked_cross_entropy(logits[:, :-1], targets, chunk_size=0)
        torch.testing.assert_close(seen, cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten()))

    def test_script_is_as_before_after_an_error(self, script):
        """Whatever happens in the block."""
        original = script.chunked_cross_entropy
        with pytest.raises(ZeroDivisionError), loss_of(script):
            original(1 / 0)
        assert script.chunked_cross_entropy is original

    def test_another_module_is_refused(self):
        """One without that loss."""
        with (
            pytest.raises(ValueError, match="got 'json', which has another loss"),
            loss_of(importlib.import_module("json")),
        ):
            pass
        with pytest.raises(ValueError, match=r"script must be a module of litgpt.finetune, got 'x'"), loss_of("x"):
            pass


class GradDiff:
    """open-unlearning's, as far as the class below it goes."""

    def __init__(self, gamma=1.0, alpha=1.0, retain_loss_type="NLL", *args, **kwargs):
        self.gamma, self.alpha, self.model_accepts_loss_kwargs = gamma, alpha, True

    def compute_retain_loss(self, model, retain_inputs):
        return model(**retain_inputs).loss


@pytest.fixture
def open_unlearning(monkeypatch):
    names = ("trainer", "trainer.unlearn", "trainer.unlearn.grad_diff")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[names[-1]].GradDiff = GradDiff
    monkeypatch.delitem(sys.modules, "overtone.integrations.open_unlearning", raising=False)
    yield importlib.import_module("overtone.integrations.open_unlearning")
    sys.modules.pop("overtone.integrations.open_unlearning")


class TestOpenUnlearning:
    def test_refusals_beside_what_is_retained(self, open_unlearning):
        """The loss on the alternate answers, the model's own on the retain set."""
        model = tiny_models.build()
        alternate, retain = (tiny_models.ragged_batch(model, (7, 5), seed=seed) for seed in (1, 2))
        trainer = open_unlearning.OverTone("overtone:lam=0.5", gamma=2.0, alpha=3.0)
        batch = {"forget": {"original": None, "alternate": {**alternate, "index": None}}, "retain": retain}
        loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
        expected = 2 * literal(outputs.logits, alternate["labels"], lam=0.5) + 3 * model(**retain).loss
        torch.testing.assert_close(loss, expected)
        assert trainer.model_accepts_loss_kwargs is False

    def test_what_is_to_be_forgotten_is_not_taught(self, open_unlearning):
        """A forget set without alternate answers is refused."""
        with pytest.raises(ValueError, match="alternate"):
            open_unlearning.OverTone().compute_loss(None, {"forget": {"input_ids": None}, "retain": {}})

    def test_hold_is_refused(self, open_unlearning):
        """The retain loss would go on."""
        with pytest.raises(ValueError, match="hold must be None"):
            open_unlearning.OverTone("overtone:hold=settled")


class AxolotlTrainer:
    """axolotl's, as far as its own loss goes."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        raise NotImplementedError


@pytest.fixture
def plugin(monkeypatch):
    for name in ("", ".core", ".core.trainers", ".integrations", ".integrations.base"):
        monkeypatch.setitem(sys.modules, "axolotl" + name, ModuleType("axolotl" + name))
    sys.modules["axolotl.core.trainers"].AxolotlTrainer = AxolotlTrainer
    sys.modules["axolotl.integrations.base"].BasePlugin = object
    monkeypatch.delitem(sys.modules, "overtone.integrations.axolotl", raising=False)
    yield importlib.import_module("overtone.integrations.axolotl").OverTonePlugin()
    sys.modules.pop("overtone.integrations.axolotl")


class TestAxolotl:
    def test_key_switches_it_on(self, plugin):
        """Without it nothing is added; with it the callback, with these settings."""
        path, name = plugin.get_input_args().rsplit(".", 1)
        keys = getattr(importlib.import_module(path), name)
        assert plugin.add_callbacks_post_trainer(keys(), None) == []
        plugin.register({"overtone": None, "cut_cross_entropy": True})
        settings = keys(overtone={"lam": 0.5, "hold": "settled"})
        (callback,) = plugin.add_callbacks_post_trainer(settings, AxolotlTrainer())
        assert callback.config == OverToneConfig(lam=0.5, hold="settled")

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("cut_cross_entropy", True),
            ("chunked_cross_entropy", True),
            ("flash_attn_cross_entropy", True),
            ("liger_cross_entropy", True),
            ("liger_fused_linear_cross_entropy", True),
            ("use_dft", True),
            ("use_eaft", True),
            ("kd_trainer", True),
            ("reward_model", True),
            ("process_reward_model", True),
            ("context_parallel_size", 2),
            ("sequence_parallel_degree", 2),
            ("rl", "dpo"),
            ("overtone", "overtone:lam=2"),
        ],
    )
    def test_other_losses_are_refused(self, plugin, name, value):
        """Before a model is loaded, as given and as filled with defaults; keys that are off or not set are let pass."""
        allowed = {"overtone": "overtone", "cut_cross_entropy": False, "context_parallel_size": 1, "rl": None}
        for check in (plugin.register, plugin.pre_model_load):
            check(allowed)
            check({"cut_cross_entropy": True})
            with pytest.raises(ValueError, match=name):
                check({"overtone": "overtone", name: value})

    def test_trainer_with_a_loss_of_its_own_is_refused(self, plugin):
        """A plugin's or that of trainer_cls, which may take the model's logits and leave its loss."""

        class Diffusion(AxolotlTrainer):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                raise NotImplementedError

        class Renamed(AxolotlTrainer):
            pass

        on, off = SimpleNamespace(overtone="overtone"), SimpleNamespace(overtone=None)
        with pytest.raises(ValueError, match="compute_loss, got Diffusion"):
            plugin.add_callbacks_post_trainer(on, Diffusion())
        assert plugin.add_callbacks_post_trainer(off, Diffusion()) == []
        assert len(plugin.add_callbacks_post_trainer(on, Renamed())) == 1


class TestLoops:
    def test_held_step_ends_a_loop_under_accelerate(self):
        """Its gradients are None, the weights stay."""
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        model = torch.nn.Linear(4, 5)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
        before = model.weight.detach().clone()
        loss = overtone_loss(model(torch.ones(2, 4)), torch.tensor([1, 2]), **ALWAYS_HELD)
        accelerator.backward(loss)
        assert [parameter.grad for parameter in model.parameters()] == [None, None]
        optimizer.step()
        assert torch.equal(model.weight, before)

    @pytest.mark.parametrize("is_left_out", [True, False])
    def test_gradient_scaler_wants_a_held_step_left_out(self, is_left_out):
        """As the page says: torch raises in a step without gradients; one that is left out disturbs nothing."""
        model = torch.nn.Linear(4, 5)
        optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
        inputs, labels = torch.ones(2, 4), torch.tensor([1, 2])
        scaler.scale(overtone_loss(model(inputs), labels, **ALWAYS_HELD)).backward()
        if not is_left_out:
            with pytest.raises(AssertionError):
                scaler.step(optimizer)
            return
        before = model.weight.detach().clone()
        scaler.scale(overtone_loss(model(inputs), labels)).backward()
        scaler.step(optimizer)
        assert not torch.equal(model.weight, before)


class TestModule:
    def test_settings_of_a_file(self, batch):
        """torchtune builds it from plain values, reads ignore_index and calls it with flat logits."""
        logits, labels = batch
        module = loss_module(settings={"lam": 0.5})
        flat = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=module.ignore_index).flatten()
        torch.testing.assert_close(module(logits.flatten(0, 1), flat), literal(logits, labels, lam=0.5))
        assert loss_module("overtone:hold=settled", reduction="sum").reduction == "sum"
