"""Every trap's warning and its mend, and the command's tables and exit codes."""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from overtone.easyedit import doctor
from overtone.easyedit.loading import read_yaml
from overtone.easyedit.traps import traps
from overtone.easyedit.traps.vstar import NORM_AFTER_MLP

HPARAMS = Path(__file__).parent.parent / "examples" / "easyedit" / "hparams"


def config_of(name, **changes):
    """One of the shipped files, changed; for MELO a change may name a section."""
    config = read_yaml(str(HPARAMS / f"{name}-llama-2-7b-chat.yaml"))
    for key, value in changes.items():
        config[key] = (
            {**config[key], **value} if isinstance(config.get(key), dict) and isinstance(value, dict) else value
        )
    return config


def found(config, **arguments):
    return [str(trap) for trap in traps(config, **arguments)]


def fatal(config):
    return [str(trap) for trap in traps(config) if trap.fatal]


def save_tokenizer(folder, bos, pad):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "<pad>": 1, "a": 2}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, pad_token=pad).save_pretrained(folder)


class TestTraps:
    """A file that falls into a trap is told, and the shipped files fall into none that the framework does not set."""

    @pytest.mark.parametrize("file", sorted(HPARAMS.glob("*.yaml")), ids=lambda file: file.stem)
    def test_shipped_files(self, file, monkeypatch, tmp_path):
        config = read_yaml(str(file))
        if config["alg_name"] == "MELO":
            config["lora"]["cls_name"] = str(tmp_path)
        assert [str(trap) for trap in traps(config) if not trap.always] == []

    @pytest.mark.parametrize(
        ("name", "changes", "message"),
        [
            ("lora", {"lora_dropout": 0.1}, "dropout is on while the edit is evaluated"),
            ("lora", {"token_loss": None}, "stays frozen, its cache off"),
            ("ft-m", {"token_loss": "dft"}, "FT-M takes no step below a mean loss of 1e-2"),
            ("lora", {"batch_size": 4}, "batch_size is 4"),
            ("lora", {"model_name": "./opt-1.3b"}, "no family name"),
            ("lora", {"token_loss": {"name": "overtone", "hold": False}}, "Adam goes on moving"),
            ("lora", {"token_loss": None}, "token_loss is empty"),
            ("lora", {"token_loss": {"name": "overtone", "lam": 2}}, "lam"),
            ("lora", {"evaluation_type": "generate-text"}, "evaluation_type is no field"),
            ("lora", {}, "teacher-forced"),
            ("lora", {}, "forgetting is not measured"),
            ("ft-m", {"objective_optimization": "prompt_last"}, "FT-L"),
            ("ft-m", {"model_name": "./t5-3b"}, "T5"),
            ("ft-m", {"token_loss": {"name": "overtone", "hold": False}}, "stops below a mean loss of 1e-2"),
            ("wise", {"token_loss": {"name": "overtone", "hold": False}}, "stops at a total loss of 0.02"),
            ("wise", {"sequential_edit": True}, "no field of WISE's hparams, so the file does not load"),
            ("wise", {}, "sequential runs drop earlier edits"),
            ("wise", {}, "label mask starts one position early"),
            ("wise", {}, "never reset"),
            ("melo", {}, "they accumulate"),
            ("melo", {"lora": {"cls_name": "./nowhere"}}, "lora.cls_name"),
            ("melo", {"lora": {"cls_name": None}}, "lora.cls_name"),
            ("melo", {"model": {"grace_layer": None}}, "grace_layer is missing"),
            ("melo", {"model": {"target_modules": []}}, "target_modules or model.grace_layer is missing"),
            ("melo", {"model": {"grace_layer": "model.layers.30.mlp.down_proj"}}, "does not come before"),
            ("melo", {"grace": {"edit_lr": "1e-3"}}, "grace.edit_lr '1e-3' stays a string"),
            ("melo", {"grace": {"init_radius": 0.1}}, "too small to find the edit"),
        ],
        ids=lambda value: value if isinstance(value, str) else None,
    )
    def test_warns(self, name, changes, message):
        assert any(message in line for line in found(config_of(name, **changes)))

    def test_a_loss_that_settles_no_token_sends_no_zero_gradients(self):
        config = config_of("lora", token_loss={"name": "overtone_recommended", "hold": False})
        assert not any("Adam goes on moving" in line for line in found(config))

    @pytest.mark.parametrize(("bos", "pad"), [("<s>", "<pad>"), ("<s>", "<s>"), (None, "<pad>")])
    def test_a_tokenizer_that_begins_every_text(self, tmp_path, bos, pad):
        save_tokenizer(tmp_path, bos, pad)
        ft_l = found(config_of("ft-m", model_name=str(tmp_path), objective_optimization="prompt_last"))
        assert any("FT-L trains it as the first target token" in line for line in ft_l) is (bos is not None)
        assert not any("FT-L" in line for line in found(config_of("ft-m", model_name=str(tmp_path))))
        melo = found(config_of("melo", model_name=str(tmp_path)))
        assert any("MELO trains the last prompt token" in line for line in melo) is (bos == pad)

    def test_adalora_with_this_peft(self):
        from peft import AdaLoraConfig

        try:
            AdaLoraConfig()
        except ValueError:
            assert any("total_step" in line for line in fatal(config_of("lora", lora_type="adalora")))
        else:
            assert not any("total_step" in line for line in found(config_of("lora", lora_type="adalora")))

    def test_an_anchors_floor_keeps_a_trainer_from_stopping(self):
        for name, message in (("ft-m", "FT-M stops below a mean loss"), ("wise", "WISE stops at a total loss")):
            unheld = found(config_of(name, token_loss="cross_entropy:anchor=1"))
            assert any(message in line and "floor of 0.05" in line for line in unheld)
            held = config_of(name, token_loss="cross_entropy:anchor=1+hold=1")
            low = config_of(name, token_loss="cross_entropy:anchor=1+anchor_epsilon=0.001")
            assert not any(message in line for line in found(held) + found(low))

    def test_an_anchor_where_no_prompt_leads_to_the_target(self):
        config = {"alg_name": "ROME", "model_name": "llama", "token_loss": "overtone:anchor=1"}
        assert any("anchor=1 is for trainers" in line for line in fatal(config))

    def test_qlora(self):
        config = {"alg_name": "QLoRA", "model_name": "llama", "token_loss": "overtone"}
        assert any("labels do not follow the prompt" in line for line in found(config))
        assert any("dropout" in line for line in found(config))

    def test_other_methods(self):
        assert fatal({"alg_name": "KN", "token_loss": "overtone"})
        assert not fatal({"alg_name": "KN"})

    def test_methods_that_stop_at_a_total(self):
        config = {"alg_name": "ROME", "model_name": "llama", "token_loss": "overtone:hold=none"}
        assert any("ROME stops below a total of 0.05" in line for line in found(config))
        assert not any("0.05" in line for line in found({**config, "token_loss": "overtone"}))

    @pytest.mark.parametrize("method", ["MEMIT", "AlphaEdit"])
    def test_a_loss_that_reads_a_model_cut_short(self, tmp_path, method):
        (folder := tmp_path / "llama").mkdir()
        (folder / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 6}')
        config = {"alg_name": method, "model_name": str(folder), "v_loss_layer": 5}
        assert not any("cut short" in line for line in found(config))
        assert any("not the last of the model's 6 layers" in line for line in found({**config, "v_loss_layer": 4}))
        assert not any("cut short" in line for line in found({**config, "model_name": "llama", "v_loss_layer": 4}))

    @pytest.mark.parametrize("model_type", ["llama", *NORM_AFTER_MLP])
    def test_a_norm_after_the_mlp(self, tmp_path, model_type):
        """It is told where a change of an MLP's output is not the same change of the layer's."""
        transformers = pytest.importorskip("transformers")
        if model_type not in transformers.CONFIG_MAPPING:
            pytest.skip(f"this transformers has no {model_type}")
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 20, "head_dim": 8}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(model_type, **sizes))
        layer, change, outputs = model.model.layers[0], torch.zeros(16), []
        layer.mlp.register_forward_hook(lambda module, args, output: output + change)
        layer.register_forward_hook(
            lambda module, args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
        )
        for size in (0.0, 1.0):
            change[0] = size
            model(torch.tensor([[1, 2, 3]]))
        arrives = torch.allclose(outputs[1] - outputs[0], change.expand(3, 16), atol=1e-5)
        model.config.save_pretrained(tmp_path / "llama")
        config = {"model_name": str(tmp_path / "llama"), "v_loss_layer": 1}
        for method in ("MEMIT", "MEMIT-FE", "EMMET", "AlphaEdit", "SPHERE", "CORE", "EAMET"):
            assert any("a norm after each MLP" in line for line in found({**config, "alg_name": method})) != arrives
        for method in ("ROME", "R-ROME", "PMET", "UnKE"):
            assert not any("a norm after each MLP" in line for line in found({**config, "alg_name": method}))

    @pytest.mark.parametrize(
        "text", ["[1]", '{"model_type": ["gemma2"]}', '{"model_type": "gemma2", "num_hidden_layers": "x"}']
    )
    def test_a_model_whose_file_cannot_be_understood_is_not_known(self, tmp_path, text):
        (tmp_path / "llama").mkdir()
        (tmp_path / "llama" / "config.json").write_text(text)
        config = {"alg_name": "MEMIT", "model_name": str(tmp_path / "llama"), "v_loss_layer": 1}
        assert not any("norm" in line or "v_loss_layer" in line for line in found(config))

    def test_single_edits_that_know_of_each_other(self):
        for method in ("AlphaEdit", "SPHERE"):
            assert any("keeps the keys" in line for line in found({"alg_name": method, "model_name": "llama"}))
        assert any("never taken back" in line for line in found({"alg_name": "EMMET", "model_name": "llama"}))
        for method in ("ROME", "MEMIT"):
            told = found({"alg_name": method, "model_name": "llama"})
            assert not any("keeps the keys" in line or "never taken back" in line for line in told)

    def test_a_models_own_code_is_not_asked_about(self, tmp_path, monkeypatch):
        """transformers would wait at the terminal for an answer."""
        asked = []
        monkeypatch.setattr("builtins.input", lambda *question: asked.append(question) or "n")
        own_code = '{"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}, "num_hidden_layers": 6}'
        (tmp_path / "config.json").write_text(own_code)
        found({"alg_name": "MEMIT", "model_name": str(tmp_path), "v_loss_layer": 4})
        assert not asked

    def test_alphaedit_knows_few_families(self):
        assert any("makes no projection" in line for line in fatal({"alg_name": "AlphaEdit", "model_name": "mistral"}))
        assert not fatal({"alg_name": "AlphaEdit", "model_name": "qwen2.5-7b"})
        assert not fatal({"alg_name": "MEMIT", "model_name": "mistral"})
        assert any("null_space_project" in line for line in found({"alg_name": "AlphaEdit", "model_name": "llama"}))

    def test_fields(self):
        @dataclass
        class Hparams:
            alg_name: str
            model_name: str
            lr: float
            batch_size: int = 1

        config = {"alg_name": "LoRA", "model_name": "llama", "batch_size": 1, "extra": 1, "token_loss": "overtone"}
        lines = found(config, hparams_class=Hparams)
        assert any("extra is no field of Hparams" in line for line in lines)
        assert any("lr is missing" in line for line in lines)
        assert not any(line.startswith("token_loss") for line in lines)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command on files; its exit code and what it printed."""
    monkeypatch.setenv("COLUMNS", "250")

    def run(*files):
        parser = argparse.ArgumentParser()
        doctor.add_arguments(parser)
        code = doctor.run(parser.parse_args([str(file) for file in files]))
        return code, capsys.readouterr().out

    return run


@pytest.fixture
def standin(monkeypatch):
    """The stand-in in the place of easyeditor."""
    real = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "easyeditor"}
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "standin"))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "easyeditor"]:
        del sys.modules[name]
    sys.modules.update(real)


class TestCommand:
    """`overtone doctor`."""

    def test_without_easyedit(self, run, monkeypatch):
        monkeypatch.setitem(sys.modules, "easyeditor", None)
        monkeypatch.setattr(doctor, "find_easyedit", lambda: None)
        code, text = run()
        assert code == 1
        assert "not on PYTHONPATH" in text
        assert "clone https://github.com/zjunlp/EasyEdit" in text

    def test_seams(self, run, standin):
        code, text = run()
        assert code == 0
        assert "CrossEntropyLoss of ft.ft_main, while execute_ft runs" in text
        assert "easyeditor.models.qlora is missing" in text
        assert "model.loss_function" in text

    def test_a_missing_seam(self, run, standin, monkeypatch):
        monkeypatch.delattr(importlib.import_module("easyeditor.models.ft.ft_main"), "CrossEntropyLoss")
        code, text = run()
        assert code == 1
        assert "has no CrossEntropyLoss" in text

    def test_installed_seams(self, run, standin):
        import overtone.easyedit

        overtone.easyedit.install()
        assert "installed: CrossEntropyLoss of wise.WISE" in run()[1]
        overtone.easyedit.uninstall()

    def test_files(self, run, standin, tmp_path):
        file = tmp_path / "lora.yaml"
        file.write_text(yaml.safe_dump({"alg_name": "LoRA", "model_name": "llama", "num_steps": 3, "lr": 0.1}))
        code, text = run(file)
        assert code == 0
        assert "batch_size is left to its default" in text
        file.write_text(yaml.safe_dump({"alg_name": "LoRA", "model_name": "llama", "num_steps": 3, "extra": 1}))
        code, text = run(file)
        assert code == 1
        assert "extra is no field of LoRAHyperParams" in text
        assert "lr is missing" in text

    def test_unreadable_files(self, run, standin, tmp_path):
        code, text = run(tmp_path / "none.yaml")
        assert code == 1
        assert "none.yaml" in text
        assert "No such file" in text
        assert "Errno" not in text
        (file := tmp_path / "broken.yaml").write_text("lr: [")
        code, text = run(file)
        assert code == 1
        assert "cannot be read as YAML" in text
        (file := tmp_path / "list.yaml").write_text("- 1\n")
        code, text = run(file)
        assert code == 1
        assert "expected a mapping" in text

    def test_a_folder(self, run, standin, tmp_path):
        (tmp_path / "hparams").mkdir()
        code, text = run(tmp_path / "hparams")
        assert code == 1
        assert "name a file in it" in text

    def test_a_name_without_yaml(self, run, standin, tmp_path):
        """EasyEdit looks for lora.yml.yaml, whatever is there."""
        (file := tmp_path / "lora.yml").write_text("alg_name: LoRA\n")
        code, text = run(file)
        assert code == 1
        assert "lora.yml.yaml" in text
        assert "a name that ends in .yaml" in text
