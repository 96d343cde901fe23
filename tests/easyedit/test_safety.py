"""What the adapters leave behind, whom they disturb, and what they refuse, in the real EasyEdit."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
import yaml
from conftest import METHODS, edit_with
from hparams import build

import overtone.easyedit
from overtone.easyedit import SeamError
from overtone.easyedit.installation import installed
from overtone.easyedit.methods import TRAINERS

pytestmark = pytest.mark.easyedit


def snapshot(framework):
    """Every attribute of every module and class of EasyEdit, and every table of its algorithms, by identity."""
    seen = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != "easyeditor":
            continue
        for attribute, value in list(vars(module).items()):
            seen[name, attribute] = value
            if isinstance(value, type) and value.__module__.startswith("easyeditor"):
                seen.update({(name, attribute, member): raw for member, raw in vars(value).items()})
            if isinstance(value, dict) and attribute.endswith("_DICT"):
                seen.update({(name, attribute, key): entry for key, entry in value.items()})
    return seen


VOLATILE = {"edit_history", "merge_group_edit_history", "CONTEXT_TEMPLATES_CACHE", "LORA_BLOCK_MAPPING"}
"""State that EasyEdit itself keeps in its modules; Python caches __slotnames__ in classes whose objects are copied."""


def changed(before, after):
    return {
        key
        for key in before.keys() | after.keys()
        if key[1] not in VOLATILE and key[-1] != "__slotnames__" and before.get(key) is not after.get(key)
    }


class TestRestore:
    """Uninstall puts back the very objects; an exception leaves no edit half hooked."""

    def test_uninstall_leaves_every_attribute_identical(self, framework):
        before = snapshot(framework)
        overtone.easyedit.install(framework.methods)
        assert changed(before, snapshot(framework))
        overtone.easyedit.uninstall()
        assert not changed(before, snapshot(framework))

    def test_installing_twice_is_harmless(self, framework):
        before = snapshot(framework)
        overtone.easyedit.install(framework.methods)
        once = snapshot(framework)
        overtone.easyedit.install(framework.methods)
        assert not changed(once, snapshot(framework))
        overtone.easyedit.uninstall()
        overtone.easyedit.uninstall()
        assert not changed(before, snapshot(framework))

    def test_methods_can_be_installed_one_by_one(self, framework):
        before = snapshot(framework)
        for method in framework.methods:
            overtone.easyedit.install([method])
        assert installed() == framework.methods
        overtone.easyedit.uninstall()
        assert not changed(before, snapshot(framework))

    @pytest.mark.parametrize("method", METHODS)
    def test_an_edit_changes_no_attribute_of_the_framework(self, framework, edit, method):
        overtone.easyedit.install(framework.methods)
        before = snapshot(framework)
        run = edit(method, token_loss="overtone")
        assert not changed(before, snapshot(framework))
        assert "_loss_function" not in vars(run.editor.model)

    @pytest.mark.parametrize("method", METHODS)
    def test_an_exception_in_an_edit_leaves_nothing_hooked(self, framework, edit, models, method):
        stock = edit(method).weights()
        overtone.easyedit.install(framework.methods)

        def broken(logits, labels):
            raise ZeroDivisionError("broken loss")

        hparams = build(framework, method, models["llama"])
        editor = framework.editor_class.from_hparams(hparams)
        hparams.token_loss = broken
        with pytest.raises(ZeroDivisionError, match="broken loss"):
            edit_with(framework, hparams, editor=editor)
        assert all("forward" not in vars(module) for module in editor.model.modules() if hasattr(module, "generate"))
        assert "_loss_function" not in vars(editor.model)
        after = edit(method).weights()
        assert all(torch.equal(value, after[name]) for name, value in stock.items())

    def test_a_missing_seam_is_loud_and_patches_nothing(self, framework, monkeypatch):
        module = framework.module("models.ft.ft_main")
        monkeypatch.delattr(module, "CrossEntropyLoss")
        before = snapshot(framework)
        with pytest.raises(SeamError, match=r"FT: easyeditor.models.ft.ft_main has no CrossEntropyLoss"):
            overtone.easyedit.install(framework.methods)
        assert not changed(before, snapshot(framework))
        overtone.easyedit.install([method for method in framework.methods if method != "FT"])

    def test_a_changed_trainer_is_loud(self, framework, monkeypatch):
        def execute_lora(model, tok, requests, hparams):
            raise NotImplementedError

        monkeypatch.setattr(framework.module("models.lora.lora_main"), "execute_lora", execute_lora)
        with pytest.raises(SeamError, match=r"LoRA: .*execute_lora does not use loss"):
            overtone.easyedit.install(["LoRA"])


class TestLoraLeavesTheModel:
    """Stock LoRA leaves every weight frozen and the cache off; with our loss an edit that is taken back does not."""

    @pytest.mark.parametrize(("token_loss", "comes_back"), [("overtone", True), (None, False)])
    def test_as_it_was(self, framework, edit, token_loss, comes_back):
        overtone.easyedit.install(["LoRA"])
        model = edit("LoRA", token_loss=token_loss, requests=2, sequential=False).editor.model
        assert all(parameter.requires_grad is comes_back for parameter in model.parameters())
        assert bool(model.config.use_cache) is comes_back


class TestIsolation:
    """Each edit has its own loss, in one thread or in several."""

    def test_two_editors_take_turns(self, framework, models):
        overtone.easyedit.install(framework.methods)
        for method in framework.methods:
            flagged, plain, stock = (build(framework, method, models["llama"]) for _ in range(3))
            calls = []

            def counted(logits, labels, calls=calls):
                calls.append(len(labels))
                return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

            flagged.token_loss = counted
            editors = [framework.editor_class.from_hparams(hparams) for hparams in (flagged, plain, stock)]
            torch.manual_seed(0)
            alone = edit_with(framework, stock, editor=editors[2], sequential=False)
            edit_with(framework, flagged, editor=editors[0], sequential=False)
            assert len(calls) == 3
            torch.manual_seed(0)
            beside = edit_with(framework, plain, editor=editors[1], sequential=False)
            assert len(calls) == 3
            assert beside.printed() == alone.printed()

    @pytest.mark.parametrize("method", ["FT", "LoRA"])
    def test_threads_do_not_see_each_others_loss(self, framework, models, method):
        if method not in framework.methods:
            pytest.skip(f"{method} is not in this EasyEdit")
        overtone.easyedit.install(framework.methods)
        barrier = threading.Barrier(2, timeout=60)
        seen = {}

        def work(name, value):
            def constant(logits, labels):
                barrier.wait()  # both threads are inside their edits at every step
                seen.setdefault(name, set()).add(threading.current_thread().name)
                return logits.sum(dim=1) * 0 + value

            hparams = build(framework, method, models["llama"])
            hparams.token_loss = constant
            module = framework.module(f"models.{'ft.ft_main' if method == 'FT' else 'lora.lora_main'}")
            editor = editors[name]
            request = {"prompt": "The capital of Ardan is", "target_new": "Corin", "subject": "Ardan"}
            execute = module.execute_ft if method == "FT" else module.execute_lora
            execute(editor.model, editor.tok, [request], hparams)

        hparams = build(framework, method, models["llama"])
        editors = {name: framework.editor_class.from_hparams(hparams) for name in ("one", "two")}
        threads = [
            threading.Thread(target=work, args=(name, value), name=name) for name, value in (("one", 1.0), ("two", 2.0))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == {"one": {"one"}, "two": {"two"}}

    def test_editors_made_before_install_use_the_flag(self, framework, models):
        hparams = build(framework, "LoRA", models["llama"])
        editor = framework.editor_class.from_hparams(hparams)
        overtone.easyedit.install(framework.methods)
        calls = []

        def counted(logits, labels):
            calls.append(len(labels))
            return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

        hparams.token_loss = counted
        edit_with(framework, hparams, editor=editor)
        assert len(calls) == 3


class TestRefusals:
    """Where the loss would silently not be used, an error says so before anything is edited."""

    def test_prompt_last(self, framework, edit):
        overtone.easyedit.install(framework.methods)
        with pytest.raises(ValueError, match=r"prompt_last.*target_new"):
            edit("FT", token_loss="overtone", objective_optimization="prompt_last")

    @pytest.mark.parametrize("method", ["FT", "LoRA"])
    def test_t5(self, framework, models, method):
        if method not in framework.methods:
            pytest.skip(f"{method} is not in this EasyEdit")
        overtone.easyedit.install(framework.methods)
        hparams = build(framework, method, models["llama"])
        editor = framework.editor_class.from_hparams(hparams)
        hparams.model_name, hparams.token_loss = "t5-3b", "overtone"
        before = {name: value.clone() for name, value in editor.model.state_dict().items()}
        with pytest.raises(ValueError, match="encoder-decoder"):
            edit_with(framework, hparams, editor=editor)
        assert all(torch.equal(value, before[name]) for name, value in editor.model.state_dict().items())

    def test_other_algorithms(self, framework):
        overtone.easyedit.install(framework.methods)
        tables = framework.module("util.alg_dict")

        class Hparams:
            token_loss = "overtone"

        for name in ("KN", "MEND", "DPO"):
            with pytest.raises(ValueError, match=f"token_loss is not used by {name}"):
                tables.ALG_DICT[name](None, None, [], Hparams())

    def test_multimodal_editors(self, framework):
        overtone.easyedit.install(framework.methods)
        tables = framework.module("util.alg_dict")

        class Hparams:
            token_loss = "overtone"

        for name, apply in getattr(tables, "ALG_MULTIMODAL_DICT", {}).items():
            with pytest.raises(ValueError, match=f"token_loss is not used by {name}"):
                apply(None, None, [], Hparams())

    def test_a_bad_value_is_named_before_the_edit(self, framework, edit):
        overtone.easyedit.install(framework.methods)
        for value, message in (
            ("overtune", "overtune"),
            ({"name": "overtone", "epsilon": -1}, "epsilon.*-1"),
            ({"name": "overtone", "sigma": 1}, "unknown field 'sigma'"),
            ({"name": "overtone", "activation_scale": 0.5}, "activation_scale is an option of WISE alone"),
        ):
            with pytest.raises(ValueError, match=message):
                edit("LoRA", token_loss=value)

    def test_a_callable_of_the_wrong_shape(self, framework, edit):
        overtone.easyedit.install(framework.methods)
        with pytest.raises(ValueError, match="one loss a token"):
            edit("LoRA", token_loss=lambda logits, labels: logits.sum())


class TestFiles:
    """The key in a yaml file."""

    def _write(self, folder, hparams, **changes):
        from dataclasses import asdict

        config = {**asdict(hparams), **changes}
        if hparams.alg_name == "WISE":
            config["act_margin"] = [config.pop(name) for name in ("alpha", "beta", "gamma")]
        file = folder / "hparams.yaml"
        file.write_text(yaml.safe_dump(config))
        return file

    @pytest.mark.parametrize("method", METHODS)
    def test_the_key_becomes_an_attribute(self, framework, models, tmp_path, method):
        if method not in framework.methods:
            pytest.skip(f"{method} is not in this EasyEdit")
        overtone.easyedit.install(framework.methods)
        hparams = build(framework, method, models["llama"])
        wanted = {"name": "overtone", "epsilon": "5e-2", "hold": ["correct", 0.2]}
        for path in (file := self._write(tmp_path, hparams, token_loss=wanted), file.with_suffix("")):
            loaded = type(hparams).from_hparams(str(path))
            assert loaded.token_loss == wanted
            assert loaded == hparams

    @pytest.mark.parametrize("method", METHODS)
    def test_no_key_no_attribute(self, framework, models, tmp_path, method):
        if method not in framework.methods:
            pytest.skip(f"{method} is not in this EasyEdit")
        hparams = build(framework, method, models["llama"])
        file = self._write(tmp_path, hparams)
        stock = type(hparams).from_hparams(str(file))
        overtone.easyedit.install(framework.methods)
        loaded = type(hparams).from_hparams(str(file))
        assert vars(loaded) == vars(stock)

    def test_a_bad_value_is_refused_at_loading(self, framework, models, tmp_path):
        overtone.easyedit.install(framework.methods)
        hparams = build(framework, "LoRA", models["llama"])
        file = self._write(tmp_path, hparams, token_loss={"name": "overtone", "lam": 2})
        with pytest.raises(ValueError, match=r"lam.*2"):
            type(hparams).from_hparams(str(file))

    def test_a_class_without_adapter_refuses_the_key(self, framework, tmp_path):
        overtone.easyedit.install(framework.methods)
        kn = framework.module("models.kn.kn_hparams").KNHyperParams
        file = tmp_path / "kn.yaml"
        file.write_text("alg_name: KN\ntoken_loss: overtone\n")
        with pytest.raises(ValueError, match="token_loss is not used by KN"):
            kn.from_hparams(str(file))

    def test_traps_of_a_flagged_file_are_logged(self, framework, models, tmp_path, caplog):
        overtone.easyedit.install(framework.methods)
        hparams = build(framework, "LoRA", models["llama"], lora_dropout=0.1)
        with caplog.at_level("WARNING", logger="overtone.easyedit"):
            type(hparams).from_hparams(str(self._write(tmp_path, hparams, token_loss="overtone")))
        assert "dropout is on while the edit is evaluated" in caplog.text


def test_every_seam_is_found(framework):
    from overtone.easyedit.doctor import seams

    rows = {row.name: row for row in seams()}
    assert {name for name in METHODS if rows[name].found} == set(framework.methods)
    assert len(rows) == len(TRAINERS)
