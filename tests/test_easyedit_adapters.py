"""The adapters' own logic, on small stand-ins of EasyEdit's seams (tests/standin); tests/easyedit has the real one."""

from __future__ import annotations

import copy
import functools
import importlib
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import tiny_models
import torch
import yaml

import overtone.easyedit
from overtone import Anchors, OverToneConfig
from overtone.easyedit import SeamError
from overtone.easyedit.held_steps import held_steps
from overtone.easyedit.innermost import innermost
from overtone.easyedit.model_loss import model_loss, takes_loss_function
from overtone.easyedit.patching import Patches
from overtone.functional import reference_loss
from overtone.token_loss import EditLoss
from overtone.token_loss.cross_entropy import cross_entropy

REQUEST = ([5, 6, 7], [8, 9])
METHODS = ("FT", "LoRA", "MELO", "WISE")


@pytest.fixture
def easyeditor(monkeypatch):
    """The stand-in in the place of easyeditor; nothing installed before or after."""
    real = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "easyeditor"}
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "standin"))
    overtone.easyedit.uninstall()
    yield importlib.import_module("easyeditor")
    overtone.easyedit.uninstall()
    for name in [name for name in sys.modules if name.split(".")[0] == "easyeditor"]:
        del sys.modules[name]
    sys.modules.update(real)


def module(name):
    return importlib.import_module(f"easyeditor.{name}")


def hparams_of(method, token_loss=None, **changes):
    values = {
        "FT": {"num_steps": 3, "lr": 1e-2, "objective_optimization": "target_new"},
        "LoRA": {"num_steps": 3, "lr": 1e-2},
        "MELO": {"num_iter": 3, "lr": 1e-2},
        "WISE": {"n_iter": 3, "edit_lr": 1e-1, "act_ratio": 0.5},
    }[method]
    names = {"FT": "ft.ft_main", "LoRA": "lora.lora_main", "MELO": "melo.melo", "WISE": "wise.wise_main"}
    hparams_class = getattr(module(f"models.{names[method]}"), f"{method}HyperParams")
    hparams = hparams_class(alg_name=method, model_name="llama", **{**values, **changes})
    if token_loss is not None:
        hparams.token_loss = token_loss
    return hparams


def edit(method, token_loss=None, model=None, **changes):
    """Edit a fresh model; the result carries the trainer's losses."""
    model = model or tiny_models.build()
    apply = module("util.alg_dict").ALG_DICT[method]
    result = apply(model, None, [REQUEST], hparams_of(method, token_loss, **changes))
    return SimpleNamespace(model=model, result=result, losses=result.losses)


def same(first, second):
    second = second.state_dict()
    return all(torch.equal(value, second[name]) for name, value in first.state_dict().items())


class TestFlag:
    """The key chooses the loss of one edit, and of that edit alone."""

    @pytest.mark.parametrize("method", METHODS)
    def test_without_it_nothing_changes(self, easyeditor, method):
        before = edit(method)
        overtone.easyedit.install()
        during = edit(method)
        edit(method, "overtone")
        after = edit(method)
        assert before.losses == during.losses == after.losses
        assert same(before.model, during.model)
        assert same(before.model, after.model)

    @pytest.mark.parametrize("method", METHODS)
    def test_minimises_overtone(self, easyeditor, method):
        overtone.easyedit.install()
        model = tiny_models.build()
        prompt, target = REQUEST
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        config = OverToneConfig.preset({"FT": "ft-m"}.get(method, method.lower()))
        expected = reference_loss(logits, torch.tensor(target), **config.as_kwargs())
        run = edit(method, "overtone:context_templates=false" if method == "WISE" else "overtone", model)
        assert run.losses[0] == pytest.approx(expected.item(), rel=1e-5)

    @pytest.mark.parametrize("method", METHODS)
    def test_a_string_says_what_a_mapping_says(self, easyeditor, method):
        overtone.easyedit.install()
        mapping = edit(method, {"name": "overtone", "lam": 0.5, "hold": ["correct", 0.2]})
        assert edit(method, "overtone:lam=0.5+hold=correct,0.2").losses == mapping.losses

    @pytest.mark.parametrize("method", METHODS)
    def test_a_callable(self, easyeditor, method):
        overtone.easyedit.install()
        run = edit(method, lambda logits, labels: logits.sum(dim=1) * 0 + 7)
        assert run.losses == [7, 7, 7]

    @pytest.mark.parametrize("method", METHODS)
    def test_label_smoothing(self, easyeditor, method):
        overtone.easyedit.install()
        smoothed = edit(method, {"name": "label_smoothing", "smoothing": 0.5})
        assert smoothed.losses[0] != edit(method).losses[0]

    @pytest.mark.parametrize("method", METHODS)
    def test_direct_calls_are_hooked_too(self, easyeditor, method):
        apply = module("util.alg_dict").ALG_DICT[method]
        overtone.easyedit.install()
        hparams = hparams_of(method, lambda logits, labels: logits.sum(dim=1) * 0 + 7)
        assert apply(tiny_models.build(), None, [REQUEST], hparams).losses == [7, 7, 7]

    def test_wise_thresholds_and_templates(self, easyeditor):
        overtone.easyedit.install()
        run = edit("WISE", "overtone").result
        assert run.config.act_ratio == pytest.approx(0.3)
        assert run.edited_with is run.config
        assert run.rows == 2
        as_in_the_paper = edit("WISE", "overtone:context_templates=false").result
        assert (as_in_the_paper.config.act_ratio, as_in_the_paper.rows) == (pytest.approx(0.3), 1)
        unscaled = edit("WISE", {"name": "overtone", "activation_scale": 1}).result
        assert (unscaled.config.act_ratio, unscaled.rows) == (0.5, 2)
        stock = edit("WISE").result
        assert (stock.config.act_ratio, stock.rows) == (0.5, 2)

    def test_the_users_hparams_stay(self, easyeditor):
        overtone.easyedit.install()
        hparams = hparams_of("WISE", "overtone")
        for _ in range(2):
            module("util.alg_dict").ALG_DICT["WISE"](tiny_models.build(), None, [REQUEST], hparams)
        assert hparams.act_ratio == 0.5

    @pytest.mark.parametrize("method", METHODS)
    def test_an_edit_without_its_loss_is_loud(self, easyeditor, method):
        overtone.easyedit.install()
        steps = {"FT": "num_steps", "LoRA": "num_steps", "MELO": "num_iter", "WISE": "n_iter"}[method]
        with pytest.raises((RuntimeError, IndexError), match=r"without computing|list index"):
            edit(method, "overtone", **{steps: 0})


class TestHold:
    """An edit that needs nothing more ends, or stands still, and says 0."""

    LOSS: ClassVar = {"name": "overtone", "epsilon": 0.5}

    def test_ft_ends(self, easyeditor):
        overtone.easyedit.install()
        held = edit("FT", {**self.LOSS, "hold": "settled"}, num_steps=300)
        assert len(held.losses) < 300
        assert held.losses[-1] == 0
        literal = edit("FT", {**self.LOSS, "hold": False}, num_steps=len(held.losses) + 5)
        assert len(literal.losses) == len(held.losses) + 5
        assert min(literal.losses) >= 0.5

    def test_ft_ignores_prompt_tokens(self, easyeditor):
        """Prompt tokens never settle, and the trainer masks them; they must not keep the step from being held."""
        overtone.easyedit.install()
        seen = []

        def recorded(logits, labels):
            seen.append(labels.tolist())
            return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

        edit("FT", recorded)
        assert seen == [[6, 7, 8, 9], [8, 9], [8, 9]]

    def test_wise_ends(self, easyeditor):
        overtone.easyedit.install()
        held = edit("WISE", {**self.LOSS, "hold": "settled"}, n_iter=500, edit_lr=0.5)
        assert len(held.losses) < 500
        assert held.losses[-2:] == [0, 0]

    @pytest.mark.parametrize("method", ["LoRA", "MELO"])
    def test_adam_stands_still(self, easyeditor, method):
        overtone.easyedit.install()
        steps = {"LoRA": "num_steps", "MELO": "num_iter"}[method]
        short, long = (edit(method, {**self.LOSS, "hold": "settled"}, **{steps: count}) for count in (10, 15))
        assert short.losses[-1] == 0
        assert same(short.model, long.model)
        drifting = [edit(method, {**self.LOSS, "hold": False}, **{steps: count}) for count in (10, 15)]
        assert not same(drifting[0].model, drifting[1].model)

    def test_a_mean(self, easyeditor):
        overtone.easyedit.install()
        by_mean = edit("FT", {**self.LOSS, "hold": 2.0}, num_steps=300)
        settled = edit("FT", {**self.LOSS, "hold": "settled"}, num_steps=300)
        assert len(by_mean.losses) < len(settled.losses)

    def test_early_stopped_cross_entropy(self, easyeditor):
        overtone.easyedit.install()
        run = edit("LoRA", {"name": "cross_entropy", "hold": 0.3}, num_steps=30)
        assert run.losses[-1] == 0
        assert min(loss for loss in run.losses if loss > 0) > 0.3


class Regularised(torch.nn.Module):
    """A wrapper that adds a term to the model's loss, as AdaLoRA does."""

    def __init__(self, model):
        super().__init__()
        self.wrapped, self.config = model, model.config

    def get_base_model(self):
        return self.wrapped

    def forward(self, **inputs):
        outputs = self.wrapped(**inputs)
        outputs.loss += sum(parameter.square().sum() for parameter in self.parameters())
        return outputs


class TestAnchor:
    """The prompt's own tokens stay as the model had them before the edit."""

    REQUEST = ([1, 5, 6, 7], [8, 9])
    """BOS, and a prompt."""

    KEPT = (1, 2)
    """The positions of 5 and 6; that of 7 predicts the target."""

    STEPS: ClassVar = {"FT": "num_steps", "LoRA": "num_steps", "MELO": "num_iter", "WISE": "n_iter"}

    def edit(self, method, token_loss, model, steps=4, **changes):
        options = {"context_templates": False} if method == "WISE" else {}
        hparams = hparams_of(method, {**token_loss, **options}, **{self.STEPS[method]: steps}, **changes)
        return module("util.alg_dict").ALG_DICT[method](model, None, [self.REQUEST], hparams)

    def literally(self, method, model, steps=4, lr=1e-2, **settings):
        """The same edit, written out: the trainer's optimiser on the definition of the loss."""
        prompt, target = self.REQUEST
        ids = torch.tensor([prompt + target])
        labels = torch.full((1, 5), -100)
        labels[0, len(prompt) - 1 :] = torch.tensor(target)
        at = torch.zeros(1, 5, dtype=torch.bool)
        at[0, list(self.KEPT)] = True
        anchors = Anchors.record(model(input_ids=ids).logits[:, :-1], at)
        optimiser = (torch.optim.SGD if method == "WISE" else torch.optim.Adam)(model.parameters(), lr=lr)
        losses = []
        for _ in range(steps):
            optimiser.zero_grad()
            loss = reference_loss(model(input_ids=ids).logits[:, :-1], labels, anchors=anchors, **settings)
            losses.append(loss.item())
            loss.backward()
            optimiser.step()
        return losses

    @pytest.mark.parametrize("old", [False, True])
    @pytest.mark.parametrize("loss", ["overtone", "cross_entropy"])
    @pytest.mark.parametrize("method", METHODS)
    def test_is_the_definition(self, easyeditor, monkeypatch, method, loss, old):
        """Step by step; with models of before `loss_function`, too."""
        if old:
            monkeypatch.setattr("overtone.easyedit.model_loss.takes_loss_function", lambda model_class: False)
        overtone.easyedit.install()
        model, copied = tiny_models.build(), tiny_models.build()
        run = self.edit(method, {"name": loss, "hold": False, "anchor": 2, "anchor_epsilon": 1e-3}, model)
        preset = OverToneConfig.preset({"FT": "ft-m"}.get(method, method.lower())).as_kwargs()
        own = preset if loss == "overtone" else {"epsilon": 0.0, "lam": 1.0}
        settings = {**own, "anchor": 2.0, "anchor_epsilon": 1e-3, "hold": None}
        expected = self.literally(method, copied, lr=0.1 if method == "WISE" else 1e-2, **settings)
        assert run.losses == pytest.approx(expected, rel=1e-4)
        alone = self.edit(method, {"name": loss, "hold": False}, tiny_models.build()).losses
        assert run.losses[-1] != pytest.approx(alone[-1] + 2e-3, rel=1e-2)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, copied.state_dict()[name], rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("method", METHODS)
    def test_is_of_the_model_before_this_edit(self, easyeditor, method):
        """In a row of edits, what the earlier ones have changed is kept, too: at first nothing has moved."""
        overtone.easyedit.install()
        model = tiny_models.build()
        anchored = {"name": "overtone", "hold": False, "anchor": 2, "anchor_epsilon": 0.25}
        for _ in range(2):
            alone = self.edit(method, {"name": "overtone", "hold": False}, copy.deepcopy(model), steps=1).losses
            first, *_ = self.edit(method, anchored, model).losses
            assert first == pytest.approx(alone[0] + 0.5, rel=1e-5)

    @pytest.mark.parametrize("method", METHODS)
    def test_the_models_forward_is_watched_while_it_is_asked_for_alone(self, easyeditor, monkeypatch, method):
        overtone.easyedit.install()
        watched = []

        def look(*args, **arguments):
            watched.append("forward" in vars(model))
            return original(*args, **arguments)

        original = EditLoss.__call__
        monkeypatch.setattr(EditLoss, "__call__", look)
        for token_loss in ({"name": "overtone", "hold": False}, {"name": "overtone", "hold": False, "anchor": 1}):
            model = tiny_models.build()
            self.edit(method, token_loss, model)
            assert "forward" not in vars(model)
        assert watched == [False] * 4 + [True] * 4

    def test_of_padded_texts_are_the_real_tokens_before_each_target(self, monkeypatch):
        """Padded left, not, right, and with words after the target; the mask says which tokens are real."""
        model = tiny_models.build()
        ids = torch.tensor([[0, 0, 5, 6, 8], [1, 5, 6, 8, 9], [5, 6, 8, 0, 0], [5, 6, 8, 7, 4]])
        mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
        labels = torch.tensor([[-100] * 4 + [8], [-100] * 3 + [8, 9], *[[-100, -100, 8, -100, -100]] * 2])
        loss = EditLoss("test", cross_entropy, anchor=1.0)
        seen = []
        original = EditLoss.anchored
        monkeypatch.setattr(EditLoss, "anchored", lambda *args: seen.append(args[2][0]) or original(*args))
        with model_loss(model, loss):
            model(input_ids=ids, attention_mask=mask, labels=labels)
        (group,) = seen
        assert group.at.view(4, 5).nonzero().tolist() == [[0, 2], [1, 1], [2, 0], [3, 0]]
        logits = model(input_ids=ids, attention_mask=mask).logits.detach()
        torch.testing.assert_close(group.log_probs, logits.log_softmax(-1)[[0, 1, 2, 3], [2, 1, 0, 0]])

    def test_a_hold_waits_for_it(self, easyeditor):
        overtone.easyedit.install()
        held = {"name": "cross_entropy", "hold": 0.5}
        alone = self.edit("FT", held, tiny_models.build(), steps=60).losses
        waiting = self.edit("FT", {**held, "anchor": 1, "anchor_epsilon": 1e-4}, tiny_models.build(), steps=60).losses
        assert alone[-1] == 0
        assert len(waiting) > len(alone)

    def test_comes_off_after_an_exception(self, easyeditor, monkeypatch):
        overtone.easyedit.install()
        for method in METHODS:
            model = tiny_models.build()
            monkeypatch.setattr(EditLoss, "anchored", lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                self.edit(method, {"name": "overtone", "anchor": 1}, model)
            assert not {"forward", "_loss_function"} & set(vars(model))

    @pytest.mark.parametrize("inputs", ["inputs_embeds", "half"])
    def test_needs_whole_texts(self, inputs):
        model = tiny_models.build()
        ids = torch.tensor([[5, 6, 7, 8]])
        call = {"inputs_embeds": model.get_input_embeddings()(ids)} if inputs == "inputs_embeds" else {"input_ids": ids}
        kept = {"logits_to_keep": 2} if inputs == "half" else {}
        with (
            pytest.raises(ValueError, match="anchor needs the"),
            model_loss(model, EditLoss("test", cross_entropy, anchor=1.0)),
        ):
            model(**call, **kept, labels=ids[:, -2:] if kept else ids)


class TestHeldSteps:
    """Where the tokens need nothing more, what others add to their loss moves no weight either."""

    LOSS: ClassVar = {"name": "overtone", "epsilon": 100}

    @pytest.mark.parametrize("method", ["LoRA", "MELO"])
    def test_move_nothing(self, easyeditor, method):
        overtone.easyedit.install()
        run = edit(method, self.LOSS, Regularised(tiny_models.build()))
        assert min(run.losses) > 1
        assert same(run.model.wrapped, tiny_models.build())

    def test_other_steps_move_by_both_terms(self, easyeditor):
        overtone.easyedit.install()
        loss = {**self.LOSS, "hold": False}
        alone, beside = edit("LoRA", loss), edit("LoRA", loss, Regularised(tiny_models.build()))
        assert not same(beside.model.wrapped, alone.model)

    def test_of_another_thread_are_steps(self, easyeditor):
        """The optimiser that steps may be anybody's; only this thread's are ours to skip."""
        with held_steps() as since_last_step:
            since_last_step.append(True)
            weight = torch.nn.Parameter(torch.ones(1))
            weight.grad = torch.ones(1)
            thread = threading.Thread(target=torch.optim.SGD([weight], lr=1.0).step)
            thread.start()
            thread.join()
        assert weight.item() == 0

    def test_a_step_over_several_losses_is_taken_unless_all_are_held(self):
        weight = torch.nn.Parameter(torch.ones(1))
        optimiser = torch.optim.SGD([weight], lr=1.0)
        with held_steps() as since_last_step:
            since_last_step.extend([True, False])
            weight.grad = torch.ones(1)
            optimiser.step()
            assert weight.item() == 0
            since_last_step.append(True)
            weight.grad = torch.ones(1)
            optimiser.step()
            assert weight.item() == 0
        weight.grad = torch.ones(1)
        optimiser.step()
        assert weight.item() == -1


class TestRestore:
    """What was replaced comes back as the same object."""

    def _state(self):
        modules = {name: vars(found).copy() for name, found in sys.modules.items() if name.startswith("easyeditor")}
        classes = {
            (name, attribute): dict(vars(value))
            for name, members in modules.items()
            for attribute, value in members.items()
            if isinstance(value, type)
        }
        tables = {name: dict(getattr(module("util.alg_dict"), name)) for name in ("ALG_DICT", "ALG_MULTIMODAL_DICT")}
        return {**modules, **classes, **tables}

    def _same(self, before, after):
        return all(
            before[key].keys() == after[key].keys()
            and all(before[key][name] is after[key][name] for name in before[key])
            for key in before.keys() | after.keys()
        )

    def test_uninstall(self, easyeditor):
        module("util.alg_dict")
        before = self._state()
        overtone.easyedit.install()
        assert not self._same(before, self._state())
        overtone.easyedit.install()
        overtone.easyedit.uninstall()
        overtone.easyedit.uninstall()
        assert self._same(before, self._state())

    @pytest.mark.parametrize("method", METHODS)
    def test_an_exception(self, easyeditor, method):
        before = edit(method)
        overtone.easyedit.install()
        model = tiny_models.build()

        def broken(logits, labels):
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            edit(method, broken, model)
        assert not {"forward", "_loss_function"} & set(vars(model))
        assert same(before.model, edit(method).model)

    @pytest.mark.parametrize("use_cache", [True, False])
    def test_what_lora_switches_off_comes_back_with_unload(self, easyeditor, monkeypatch, use_cache):
        """As in EasyEdit the trainer wraps the model, freezes it and switches its cache off; the stand-in does not."""
        from peft import LoraConfig, get_peft_model

        lora = module("models.lora.lora_main")
        plain = lora.execute_lora

        @functools.wraps(plain)
        def execute_lora(model, tok, requests, hparams):
            model.config.use_cache = False
            return plain(get_peft_model(model, LoraConfig(target_modules=["q_proj"])), tok, requests, hparams)

        monkeypatch.setattr(lora, "execute_lora", execute_lora)
        overtone.easyedit.install(["LoRA"])
        for token_loss, comes_back in (("overtone", True), (None, False)):
            model = tiny_models.build()
            frozen = model.get_input_embeddings().weight.requires_grad_(False)
            model.config.use_cache = use_cache
            edited = lora.apply_lora_to_model(model, None, [REQUEST], hparams_of("LoRA", token_loss))
            assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
            assert copy.deepcopy(edited).unload() is not model
            assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
            assert edited.unload() is model
            assert model.model.layers[0].mlp.up_proj.weight.requires_grad is comes_back
            assert not frozen.requires_grad
            assert model.config.use_cache is (use_cache and comes_back)

    def test_a_missing_seam(self, easyeditor, monkeypatch):
        module("util.alg_dict")
        monkeypatch.delattr(module("models.ft.ft_main"), "CrossEntropyLoss")
        before = self._state()
        with pytest.raises(SeamError, match=r"FT: .* has no CrossEntropyLoss.*Nothing was changed"):
            overtone.easyedit.install()
        assert self._same(before, self._state())
        overtone.easyedit.install(["LoRA", "MELO", "WISE"])

    def test_a_failing_hook(self, easyeditor, monkeypatch):
        module("util.alg_dict")
        before = self._state()
        monkeypatch.setattr("overtone.easyedit.installation._hook_loaders", lambda patches: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            overtone.easyedit.install()
        assert self._same(before, self._state())

    def test_unknown_methods(self, easyeditor):
        with pytest.raises(ValueError, match="KN"):
            overtone.easyedit.install(["KN"])
        with pytest.raises(TypeError, match="list of names"):
            overtone.easyedit.install("FT")
        with pytest.raises(TypeError, match="methods must be a list of names or None, got 3"):
            overtone.easyedit.install(3)

    def test_without_easyedit(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "easyeditor", None)
        with pytest.raises(ImportError, match="PYTHONPATH"):
            overtone.easyedit.install()

    def test_the_old_package_of_the_index(self, easyeditor, monkeypatch):
        """It has a version, as clones have not, and no MELO."""
        versions = {"easyeditor": "0.0.1.dev0"}
        monkeypatch.setattr("overtone.easyedit.installation.version", versions.__getitem__)
        overtone.easyedit.install()
        overtone.easyedit.uninstall()
        monkeypatch.setattr("overtone.easyedit.installation.find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r"0\.0\.1\.dev0.*no MELO.*pip uninstall easyeditor"):
            overtone.easyedit.install()


class TestRefusals:
    """Where the loss would silently not be used."""

    def test_prompt_last(self, easyeditor):
        overtone.easyedit.install()
        with pytest.raises(ValueError, match="target_new"):
            edit("FT", "overtone", objective_optimization="prompt_last")

    @pytest.mark.parametrize("method", METHODS)
    def test_encoder_decoders(self, easyeditor, method):
        overtone.easyedit.install()
        model = tiny_models.build()
        model.config.is_encoder_decoder = True
        with pytest.raises(ValueError, match="encoder-decoder"):
            edit(method, "overtone", model)

    def test_other_algorithms(self, easyeditor):
        overtone.easyedit.install()
        tables = module("util.alg_dict")
        hparams = module("models.rome").ROMEHyperParams("ROME")
        assert tables.ALG_DICT["ROME"]("model", None, [], hparams) == "model"
        hparams.token_loss = "overtone"
        with pytest.raises(ValueError, match="not used by ROME"):
            tables.ALG_DICT["ROME"]("model", None, [], hparams)
        with pytest.raises(ValueError, match=r"not used by LoRA .ALG_MULTIMODAL_DICT"):
            tables.ALG_MULTIMODAL_DICT["LoRA"]("model", None, [], hparams=hparams)

    def test_methods_that_were_left_out(self, easyeditor):
        overtone.easyedit.install(["FT"])
        with pytest.raises(ValueError, match=r"not used by LoRA: .* one of FT$"):
            edit("LoRA", "overtone")
        overtone.easyedit.install(["LoRA"])
        assert edit("LoRA", lambda logits, labels: logits.sum(dim=1) * 0 + 7).losses == [7, 7, 7]

    def test_multimodal_wise(self, easyeditor):
        overtone.easyedit.install()
        multimodal = module("models.wise.WISE").WISEMultimodal
        multimodal(config=hparams_of("WISE"), model=tiny_models.build(), device="cpu")
        with pytest.raises(ValueError, match="WISEMultimodal"):
            multimodal(config=hparams_of("WISE", "overtone"), model=tiny_models.build(), device="cpu")

    def test_a_class_without_adapter(self, easyeditor, tmp_path):
        overtone.easyedit.install()
        file = tmp_path / "rome.yaml"
        file.write_text("alg_name: ROME\ntoken_loss: overtone\n")
        with pytest.raises(ValueError, match="not used by ROME"):
            module("models.rome").ROMEHyperParams.from_hparams(str(file))


class TestLoaders:
    """The key in a file."""

    def _file(self, folder, **config):
        file = folder / "lora.yaml"
        file.write_text(
            yaml.safe_dump({"alg_name": "LoRA", "model_name": "llama", "num_steps": 3, "lr": 1e-2, **config})
        )
        return file

    def test_becomes_an_attribute(self, easyeditor, tmp_path):
        overtone.easyedit.install()
        loader = module("models.lora").LoRAHyperParams.from_hparams
        file = self._file(tmp_path, token_loss={"name": "overtone", "epsilon": "1e-1"})
        for path in (file, file.with_suffix("")):
            assert loader(str(path)).token_loss == {"name": "overtone", "epsilon": "1e-1"}
        assert not hasattr(loader(str(self._file(tmp_path))), "token_loss")

    def test_is_checked_at_once(self, easyeditor, tmp_path):
        overtone.easyedit.install()
        with pytest.raises(ValueError, match=r"lam.*3"):
            module("models.lora").LoRAHyperParams.from_hparams(
                str(self._file(tmp_path, token_loss={"name": "overtone", "lam": 3}))
            )

    def test_uninstalled_loaders_refuse_it_again(self, easyeditor, tmp_path):
        overtone.easyedit.install()
        overtone.easyedit.uninstall()
        with pytest.raises(TypeError, match="token_loss"):
            module("models.lora").LoRAHyperParams.from_hparams(str(self._file(tmp_path, token_loss="overtone")))


class TestThreads:
    """Edits of different models at the same time."""

    @pytest.mark.parametrize("method", METHODS)
    def test_do_not_see_each_others_loss(self, easyeditor, method):
        overtone.easyedit.install()
        barrier = threading.Barrier(2, timeout=30)
        losses = {}
        models = {1.0: tiny_models.build(), 2.0: tiny_models.build()}

        def work(value):
            def constant(logits, labels):
                barrier.wait()
                return logits.sum(dim=1) * 0 + value

            losses[value] = edit(method, constant, models[value]).losses

        threads = [threading.Thread(target=work, args=(value,)) for value in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert losses == {1.0: [1, 1, 1], 2.0: [2, 2, 2]}


class TestModelLoss:
    """The two ways to a model's own loss."""

    @contextmanager
    def _old(self, monkeypatch, model):
        """A model of before `loss_function`: it computes cross-entropy inside forward."""
        monkeypatch.setattr("overtone.easyedit.model_loss.takes_loss_function", lambda model_class: False)
        yield

    @pytest.mark.parametrize("return_dict", [True, False])
    def test_both_give_the_same(self, monkeypatch, return_dict):
        model = tiny_models.build()
        ids = torch.tensor([[5, 6, 7, 8]])
        loss = EditLoss("test", cross_entropy)
        plain = model(input_ids=ids, labels=ids, return_dict=return_dict)[0]
        assert takes_loss_function(type(model))
        with model_loss(model, loss):
            new = model(input_ids=ids, labels=ids, return_dict=return_dict)[0]
        with self._old(monkeypatch, model), model_loss(model, loss):
            assert "forward" in vars(model)
            old = model(input_ids=ids, labels=ids, return_dict=return_dict)[0]
            model(input_ids=ids)
        assert not {"forward", "_loss_function"} & set(vars(model))
        torch.testing.assert_close(new, plain)
        torch.testing.assert_close(old, plain)

    def test_finds_the_innermost_model(self):
        from peft import LoraConfig, get_peft_model

        model = tiny_models.build()
        assert innermost(get_peft_model(model, LoraConfig(target_modules=["q_proj"]))) is model
        assert innermost(model) is model


class TestPatches:
    """Undoing."""

    def test_puts_back_missing_and_class_attributes(self):
        class Owner:
            @classmethod
            def method(cls):
                return 1

        table = {"key": "value"}
        raw = vars(Owner)["method"]
        patches = Patches()
        patches.attribute(Owner, "method", 1)
        patches.attribute(Owner, "method", 2)
        patches.attribute(Owner, "new", 3)
        patches.item(table, "key", "other")
        patches.undo()
        patches.undo()
        assert vars(Owner)["method"] is raw
        assert not hasattr(Owner, "new")
        assert table == {"key": "value"}
