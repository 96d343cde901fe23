"""The example that runs EasyEdit's methods on the lab's world: what it tells EasyEdit, without EasyEdit."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import mini_lab
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig

FOLDER = Path(__file__).parent.parent / "examples" / "easyedit"


@pytest.fixture
def lab(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.delenv("EASYEDIT_ROOT", raising=False)
    return importlib.import_module("lab")


@pytest.fixture
def framework(lab):
    return importlib.import_module("framework")


@pytest.fixture
def config_of(lab, tmp_path):
    """The config of a method on a model of three layers."""
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 3}))

    def config_of(method, loss="overtone", changes=""):
        return lab.config_of(lab.Job(method, loss, 1, False, 0, changes), str(tmp_path), tmp_path / "out")

    return config_of


class TestConfig:
    """A method's config on the lab's model."""

    def test_edits_the_first_layer_and_reads_the_last(self, framework, config_of):
        for method in framework.VECTOR_METHODS:
            config = config_of(method)
            assert (config["alg_name"], config["layers"], config["v_loss_layer"]) == (method, [0], 2)

    def test_second_moments_are_those_of_the_worlds_texts(self, lab, config_of, tmp_path):
        config = config_of("MEMIT")
        assert config["stats_dir"] == str(tmp_path / "out" / "statistics")
        assert config["mom2_n_samples"] == len(lab.texts())

    def test_without_a_loss_has_no_key(self, lab, config_of):
        for method in ("FT", "ROME"):
            assert "token_loss" not in config_of(method, lab.NO_KEY)
            assert config_of(method, "overtone")["token_loss"] == "overtone"

    def test_changes_come_last(self, config_of):
        assert config_of("AlphaEdit", changes="v_lr=0.1;layers=[1]")["v_lr"] == 0.1

    def test_every_text_is_a_line_of_the_file_that_the_moments_are_made_of(self, lab):
        assert all(text.strip() and len(text.splitlines()) == 1 for text in lab.texts())


def test_pmet_is_padded_on_the_right_and_sees_a_space_before_its_targets(framework):
    seen = []
    editor = SimpleNamespace(
        tok=SimpleNamespace(padding_side="left"), apply_algo=lambda model, tok, requests, **_: seen.extend(requests)
    )
    requests = [{"prompt": "The capital of Ardan is", "target_new": "Tass"}]
    framework.mend_pmet(editor)
    editor.apply_algo(None, None, requests, copy=False)
    assert editor.tok.padding_side == "right"
    assert seen == [{"prompt": "The capital of Ardan is", "target_new": " Tass"}]
    assert requests[0]["target_new"] == "Tass"


class TestAtTheMlp:
    """A template that names the MLP of the edited layer."""

    def hparams(self, **changes):
        values = {"layer_module_tmp": "layers.{}", "mlp_module_tmp": "layers.{}.mlp", "layers": [3], "v_loss_layer": 5}
        return SimpleNamespace(**values | changes)

    def test_the_loss_is_read_where_it_was(self, framework):
        hparams = self.hparams()
        framework.optimise_at_mlp(hparams)
        template = copy.deepcopy(hparams).layer_module_tmp
        assert [template.format(layer) for layer in (2, 3, 5)] == ["layers.2", "layers.3.mlp", "layers.5"]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"layers": [2, 3]}, r"one layer is edited, not \[2, 3\]: --change layers=\[3\]"),
            ({"v_loss_layer": 3}, r"layers \[3\] must come before v_loss_layer 3"),
        ],
        ids=["two layers", "the last layer"],
    )
    def test_what_it_cannot_do(self, framework, changes, message):
        hparams = self.hparams(**changes)
        with pytest.raises(ValueError, match=message):
            framework.optimise_at_mlp(hparams)
        assert hparams == self.hparams(**changes)


def test_a_methods_own_file_is_taken_as_it_is(lab):
    vector_hparams = importlib.import_module("vector_hparams")
    own = {"alg_name": "EMMET", "emmet_lambda": 7}
    assert vector_hparams.as_method(own, "EMMET") == own


class TestUnkeOnModelsOfSeveralTypesOfLayers:
    """A rotary embedding of which no type of layer is asked."""

    @pytest.mark.parametrize("layer", [0, 1])
    def test_is_that_of_the_trained_layer(self, lab, layer):
        sizes = mini_lab.SIZES | {"num_key_value_heads": 1, "head_dim": 16}
        sizes["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
        model = AutoModelForCausalLM.from_config(Gemma3TextConfig(vocab_size=24, **sizes)).eval()
        inputs = torch.randint(3, 20, (1, 6))
        before = model(inputs).logits
        x, positions = torch.zeros(1, 6, 32), torch.arange(6)[None]
        expected = model.model.rotary_emb(x, positions, model.config.layer_types[layer])
        other = model.model.rotary_emb(x, positions, model.config.layer_types[1 - layer])
        importlib.import_module("unke").mend_rotary(model.model, [layer])
        found = model.model.rotary_emb(x, positions)
        assert all(torch.equal(own, wanted) for own, wanted in zip(found, expected, strict=True))
        assert not torch.equal(found[0], other[0])
        assert torch.equal(model(inputs).logits, before)

    def test_several_types_are_not_trained_at_once(self, lab):
        config = SimpleNamespace(layer_types=["sliding_attention", "full_attention"])
        model = SimpleNamespace(config=config, rotary_emb=SimpleNamespace(forward=lambda x, ids, layer_type: None))
        with pytest.raises(ValueError, match=r"layers \[0, 1\] are of the types full_attention, sliding_attention"):
            importlib.import_module("unke").mend_rotary(model, [0, 1])

    def test_others_stay(self, lab):
        model = mini_lab.random_model("llama")
        importlib.import_module("unke").mend_rotary(model.model, [0, 1])
        assert "forward" not in vars(model.model.rotary_emb)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "ROME", "--in-a-row", "3"], "--in-a-row is not for ROME"),
        (["--methods", "UnKE_ARE"], "unknown: UnKE_ARE"),
        (["--methods", "ROME", "--losses", "none", "cross_entropy:anchor=1"], "anchor=1"),
        (
            ["--methods", "ROME", "--change", "v_lrr=1"],
            "--change v_lrr=1: a change is name=value, and ROME's file has attn_module_tmp",
        ),
        (["--methods", "WISE", "--change", "context_templates=false"], "and WISE's file has act_margin"),
        (["--methods", "ROME", "--change", 'token_loss="gem"'], "token_loss is not changed here"),
        (["--methods", "ROME", "--change", "fact_token=last"], "--change fact_token=last: a value is JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_what_it_cannot_run(lab, monkeypatch, capsys, arguments, message):
    monkeypatch.setenv("EASYEDIT_ROOT", "/nowhere")
    monkeypatch.setattr(sys, "argv", ["lab.py", *arguments])
    with pytest.raises(SystemExit):
        lab.main()
    assert message in capsys.readouterr().err


@pytest.fixture
def knowedit(lab, tmp_path, monkeypatch):
    """The program on one record, with editors that only note how they were opened."""
    program, data, out, opened = importlib.import_module("knowedit"), tmp_path / "data.json", tmp_path / "out", []
    record = {"prompt": "The capital of Ardan is", "subject": "Ardan", "target_new": "Tass", "ground_truth": "Solen"}
    data.write_text(json.dumps([record]))
    scores = {"rewrite_acc": [1.0], "portability": {}, "locality": {}}

    def opening(config, **options):
        opened.append((config, options))
        metrics = [{"pre": scores, "post": scores}]
        return SimpleNamespace(edit_requests=lambda *args, **kwargs: (metrics, None, None), apply_algo=None)

    for name in ("open_editor", "UnkeEditor"):
        monkeypatch.setattr(program, name, opening)
    monkeypatch.setattr("overtone.easyedit.install", lambda: None)

    def run(file, *arguments):
        hparams = FOLDER / "hparams" / f"{file}-llama-3.2-3b-instruct.yaml"
        command = ["knowedit.py", str(data), "--hparams", str(hparams), "--out", str(out), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        return program.main()

    run.out, run.opened = out, opened
    return run


class TestKnowEdit:
    def test_a_folder_takes_edits_of_one_setting(self, lab, tmp_path):
        """The same settings go on; others would be averaged with what is there."""
        knowedit = importlib.import_module("knowedit")
        file = tmp_path / "overtone.jsonl"
        (tmp_path / "earlier.jsonl").write_text("{}\n")
        with pytest.raises(ValueError, match=r"edits of earlier without earlier\.settings\.json: give another folder"):
            knowedit.require_same_settings(tmp_path / "earlier.jsonl", {"lr": 1})
        settings = {"data": "zsre.json", "lr": 5e-4, "layers": (1, 2)}
        knowedit.require_same_settings(file, settings | {"lr": 1.0})  # of which no edit was made
        knowedit.require_same_settings(file, settings)
        file.write_text("{}\n")
        knowedit.require_same_settings(file, settings)
        with pytest.raises(ValueError, match=r"edits of overtone made with layers=\[1, 2\], not with layers=\[3\]"):
            knowedit.require_same_settings(file, settings | {"layers": [3]})
        with pytest.raises(ValueError, match=r"made with data=zsre\.json, not with data=wiki\.json"):
            knowedit.require_same_settings(file, settings | {"data": "wiki.json"})
        knowedit.require_same_settings(tmp_path / "cross-entropy.jsonl", settings | {"layers": [3]})

    @pytest.mark.parametrize(
        ("file", "arguments", "message"),
        [
            ("memit", ["--method", "SPHERE"], "SPHERE takes its values from a file of AlphaEdit, not of MEMIT"),
            ("rome", ["--at-mlp"], "--at-mlp is for MEMIT, EMMET, AlphaEdit, SPHERE, CORE, EAMET, not for ROME"),
            ("memit", ["--method", "UnKE"], "--keep is for UnKE, and needed there; the method is UnKE"),
            (
                "memit",
                ["--change", "layer=[3]"],
                "--change layer=[3]: a change is name=value, and MEMIT's file has attn_module_tmp",
            ),
            ("memit", ["--losses", "nosuch"], "nosuch"),
            ("memit", ["--at-mlp"], "at an MLP one layer is edited, not [4, 5, 6, 7, 8]: --change layers=[8]"),
            ("memit", ["--change", 'alg_name="ROME"'], "alg_name is not changed here"),
            ("memit", ["--limit", "0"], "--limit: must be at least 1, got 0"),
            ("nosuch", [], "No such file or directory"),
            ("memit", ["--keep", "texts.txt"], "--keep is for UnKE, and needed there; the method is MEMIT"),
            ("memit", ["--method", "UnKE", "--keep", "texts.txt", "--no-prefixes"], "not for UnKE"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_refuses_what_a_method_does_not_have(self, knowedit, capsys, file, arguments, message):
        with pytest.raises(SystemExit):
            knowedit(file, *arguments)
        assert message in capsys.readouterr().err
        assert not knowedit.out.exists()

    def test_tells_the_editor_and_the_folder_what_is_asked(self, knowedit):
        knowedit("memit", "--method", "EMMET", "--at-mlp", "--no-prefixes", "--change", "layers=[1]")
        ((config, options), *_) = knowedit.opened
        assert (config["alg_name"], config["layers"], config["emmet_lambda"]) == ("EMMET", [1], 0.1)
        assert options == {"prefixes": False, "at_mlp": True}
        with pytest.raises(SystemExit):
            knowedit("memit", "--method", "EMMET", "--no-prefixes", "--change", "layers=[1]")

    def test_unke_keeps_the_texts_of_a_file(self, knowedit, tmp_path):
        texts = tmp_path / "texts.txt"
        texts.write_text("One.\n\nTwo.\n")
        unke = ("memit", "--method", "UnKE", "--keep", str(texts), "--change")
        knowedit(*unke, "ex_data_num=2")
        ((config, options), *_) = knowedit.opened
        assert (config["alg_name"], options) == ("UnKE", {"texts": ["One.", "Two."]})
        for text, change in (("One.\nThree.\n", "ex_data_num=2"), ("One.\n\nTwo.\n", "ex_data_num=3")):
            texts.write_text(text)
            with pytest.raises(SystemExit):
                knowedit(*unke, change)

    def test_a_half_written_edit_is_made_again(self, knowedit):
        knowedit("rome")
        file = knowedit.out / "overtone.jsonl"
        whole = file.read_text()
        file.write_text(whole[:-5])
        knowedit("rome")
        assert file.read_text() == whole
        assert len(knowedit.opened) == 3

    def test_runs_are_called_by_their_loss(self, knowedit):
        knowedit("rome", "--losses", "none")
        knowedit("rome")
        knowedit("rome", "--losses", "gem", "none")
        assert {file.stem for file in knowedit.out.glob("*.jsonl")} == {"cross-entropy", "overtone", "gem"}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('[{"prompt": "Tass is"}]', "a record has prompt, and no target_new, ground_truth, subject"),
            ('{"prompt": "Tass is"}', "must be a list of records, and holds 'prompt'"),
            ("[", "data.json is not JSON"),
        ],
        ids=["fields", "no list", "no JSON"],
    )
    def test_reads_records_of_its_format(self, lab, tmp_path, text, message):
        file = tmp_path / "data.json"
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            importlib.import_module("knowedit").read(file)
