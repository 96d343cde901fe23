"""The example on the lab's world, with the real EasyEdit: every single edit begins with the unedited model."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, tiny_tokenizer

pytestmark = pytest.mark.easyedit

EXAMPLES = Path(__file__).parents[2] / "examples" / "easyedit"


@pytest.fixture
def lab(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("lab")


@pytest.mark.parametrize(
    "method", ["ROME", "R-ROME", "MEMIT", "EMMET", "AlphaEdit", "SPHERE", "CORE", "EAMET", "PMET", "UnKE"]
)
def test_single_edits_know_nothing_of_each_other(framework, models, lab, monkeypatch, tmp_path, method):
    monkeypatch.chdir(tmp_path)
    if method == "UnKE":
        editor_class, module = lab.UnkeEditor, None
    else:
        editor_class = framework.editor_class
        module = importlib.import_module(framework.module("util.alg_dict").ALG_DICT[method].__module__)
        monkeypatch.setattr(module, "CONTEXT_TEMPLATES_CACHE", ["{}"] if "ROME" in method else [["{}"]])
        monkeypatch.setattr(module, "P_loaded", False, raising=False)
        monkeypatch.setattr(module, "get_cov", lambda *args, **kwargs: 0.1 * torch.eye(64), raising=False)
    edit, found = editor_class.edit_requests, []

    def watched(editor, *args, **kwargs):
        weights = {name: value.clone() for name, value in editor.model.state_dict().items()}
        found.append((weights, getattr(module, "cache_c_new", False)))
        return edit(editor, *args, **kwargs)

    monkeypatch.setattr(editor_class, "edit_requests", watched)
    lab.perform(lab.Job(method, "overtone", 2, False, 0, "v_num_grad_steps=3"), str(models["llama"]), tmp_path)
    (first, first_keys), (second, second_keys) = found
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not first_keys
    assert not second_keys


@pytest.fixture
def norm_after_mlp(tmp_path):
    """The folder of a tiny Gemma 3."""
    import transformers

    folder = tmp_path / "llama-gemma"
    folder.mkdir()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    config = transformers.Gemma3TextConfig(vocab_size=len(tiny_tokenizer(folder)), **sizes)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("method", ["MEMIT", "EMMET", "AlphaEdit", "CORE", "EAMET"])
@pytest.mark.parametrize("at_mlp", [True, False])
def test_an_edit_meets_its_vector_at_the_mlp(framework, lab, monkeypatch, tmp_path, norm_after_mlp, method, at_mlp):
    """Behind a norm it is another one; before it is the MLP's own output. SPHERE leaves out a part of it anywhere."""
    monkeypatch.chdir(tmp_path)
    examples = importlib.import_module("framework")
    config = lab.vector_config(method, norm_after_mlp, 10, tmp_path)
    config |= {"mom2_update_weight": 1e-6, "L2": 1e-6, "layers": [0], "v_loss_layer": 2}
    del config["token_loss"]
    if method not in examples.KEEP_KEYS:
        del config["L2"]
    module = importlib.import_module(framework.module("util.alg_dict").ALG_DICT[method].__module__)
    monkeypatch.setattr(module, "CONTEXT_TEMPLATES_CACHE", [["{}"]])
    monkeypatch.setattr(module, "P_loaded", False, raising=False)
    monkeypatch.setattr(module, "cache_c_new", False, raising=False)
    monkeypatch.setattr(module, "get_cov", lambda *args, **kwargs: 0.1 * torch.eye(64))
    with examples.quiet():
        editor = examples.open_editor(config, at_mlp=at_mlp)
    compute, vectors = module.compute_z, []

    def watched(*args, **kwargs):
        vectors.append(compute(*args, **kwargs))
        return vectors[-1]

    monkeypatch.setattr(module, "compute_z", watched)
    request = {"prompt": "The capital of Ardan is", "subject": "Ardan", "target_new": "Tass", "case_id": 0}
    with examples.quiet():
        model, _ = editor.apply_algo(editor.model, editor.tok, [request], editor.hparams, copy=False)
    outputs = []
    (model.model.layers[0].mlp if at_mlp else model.model.layers[0]).register_forward_hook(
        lambda module, args, output: outputs.append(output)
    )
    model(**editor.tok("The capital of Ardan", return_tensors="pt"))
    (vector,), reached = vectors, outputs[0][0, -1].detach()
    vector = vector[0] if isinstance(vector, tuple) else vector
    distance = (reached - vector).norm() / vector.norm()
    assert distance < 1e-3 if at_mlp else distance > 0.1


THEIRS = {"EMMET": "llama3.2-3b", "PMET": "llama3.2-3b", "EAMET": "qwen2.5-7b", "SPHERE": "llama3-8b"}
OF_THE_MODEL = {"alg_name", "model_name", "device", "model_parallel", "layers", "v_loss_layer", "lm_head_module"}
OF_THE_LAB = {"stats_dir", "mom2_n_samples", "mom2_update_weight"}


@pytest.mark.parametrize("method", THEIRS)
def test_values_are_those_of_easyedits_own_file(framework, models, lab, monkeypatch, tmp_path, method):
    vector_hparams = importlib.import_module("vector_hparams")
    monkeypatch.setattr(vector_hparams, "SMALL", {})
    ours = vector_hparams.vector_config(method, str(models["llama"]), 10, tmp_path)
    theirs = yaml.safe_load(Path(ROOT, "hparams", method, f"{THEIRS[method]}.yaml").read_text())
    for name in theirs.keys() - OF_THE_MODEL - OF_THE_LAB:
        value = float(theirs[name]) if isinstance(ours[name], float) else theirs[name]
        assert ours[name] == value, name
    assert ours.keys() - theirs.keys() <= {"token_loss", "model_parallel"}
