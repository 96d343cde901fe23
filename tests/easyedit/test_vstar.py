"""The methods that optimise one vector, in the real EasyEdit: the vector's loss is the one that the hparams name."""

from __future__ import annotations

import contextlib
import io
import re
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from conftest import PROMPTS, TARGETS, edit_with

import overtone.easyedit
from overtone import OverToneConfig
from overtone.easyedit.methods import BY_NAME
from overtone.easyedit.vstar import VSTAR
from overtone.functional import reference_loss
from overtone.token_loss import EditLoss
from overtone.token_loss.cross_entropy import cross_entropy

pytestmark = pytest.mark.easyedit

NAMES = tuple(trainer.name for trainer in VSTAR)

VALUES = {
    "layers": [0],
    "fact_token": "subject_last",
    "layer_selection": "all",
    "v_num_grad_steps": 6,
    "v_lr": 0.5,
    "v_loss_layer": 1,
    "v_weight_decay": 1e-3,
    "clamp_norm_factor": 4,
    "kl_factor": 0.0625,
    "mom2_adjustment": False,
    "mom2_update_weight": 1.0,
    "mom2_dataset": "wikipedia",
    "mom2_n_samples": 10,
    "mom2_dtype": "float32",
    "stats_dir": "./stats",
    "context_template_length_params": [[5, 1]],
    "rewrite_module_tmp": "model.layers.{}.mlp.down_proj",
    "layer_module_tmp": "model.layers.{}",
    "mlp_module_tmp": "model.layers.{}.mlp",
    "attn_module_tmp": "model.layers.{}.self_attn",
    "ln_f_module": "model.norm",
    "lm_head_module": "lm_head",
    "device": "cpu",
}
OWN_VALUES = {
    "R-ROME": {"enable_random_prefix_keys": True, "enable_prompt_keys": False, "original_implementation": False},
    "EMMET": {"update_norm_lambda": 0, "emmet_lambda": 0.1},
    "CORE": {"context": None, "reg_lambda": 0.1, "layer_range": 1},
    "EAMET": {
        "weight_decay_method": "norm",
        "delta_init": "zero",
        "clamp_ks_factor": 1,
        "cs_factor": 1,
        "mse_factor": 1,
        "tau": 0.07,
    },
    "PMET": {"nll_loss_factor": 1.0, "kl_factor": 1.0},
    "UnKE_ARE": {"window_size": 50, "overlap": 0},
}
REQUEST = {"prompt": "The capital of {} is", "subject": "Ardan", "target_new": " " + TARGETS[0]}
CONTEXTS = [["{}"], ["You. {}"]]


@pytest.fixture
def vector(framework, models):
    """Compute one method's vector on a freshly loaded model: ``vector("ROME", token_loss="overtone")``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def compute(name, token_loss=None, model=None, **changes):
        trainer = BY_NAME[name]
        if trainer.seam_problem() is not None and name not in overtone.easyedit.installation.installed():
            pytest.skip(f"{name} is not in this EasyEdit")
        torch.manual_seed(0)
        model = model or AutoModelForCausalLM.from_pretrained(models["llama"])
        tok = AutoTokenizer.from_pretrained(models["llama"], padding_side="right")
        hparams = SimpleNamespace(
            alg_name=name, model_name=str(models["llama"]), **{**VALUES, **OWN_VALUES.get(name, {}), **changes}
        )
        if token_loss is not None:
            hparams.token_loss = token_loss
        module = trainer.load()
        request = dict(REQUEST)
        if name in ("ROME", "R-ROME"):
            contexts = [context for group in CONTEXTS for context in group]
            left = torch.ones(64)
            call = [module.compute_v, request, hparams, 0, left, contexts]
        elif name.startswith("UnKE"):
            call = [module.compute_z, {"question": PROMPTS[0], "answer": REQUEST["target_new"]}, 0, hparams]
        elif name == "PMET":
            call = [module.compute_zs, request, hparams, 0, CONTEXTS]
        elif name == "MEMIT-FE":
            call = [module.compute_z, request, hparams, [0], CONTEXTS]
        elif name == "EAMET":
            call = [module.compute_z, request, hparams, 0, CONTEXTS, [], [[1.0]], 0, torch.ones(())]
        else:
            call = [module.compute_z, request, hparams, 0, CONTEXTS]
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            result = call[0](model, tok, *call[1:])
        return SimpleNamespace(values=tensors(result), output=output.getvalue(), tok=tok)

    return compute


def tensors(result):
    """Every tensor in what a method computed, in order."""
    if isinstance(result, torch.Tensor):
        return [result.detach()]
    items = result.values() if isinstance(result, dict) else result if isinstance(result, (list, tuple)) else ()
    return [tensor for item in items for tensor in tensors(item)]


def same(first, second):
    return len(first.values) == len(second.values) > 0 and all(map(torch.equal, first.values, second.values))


@pytest.fixture
def recorder(monkeypatch):
    """Logits, labels and values of every token loss, and whether the step was held."""
    original, calls = EditLoss.__call__, []

    def record(self, logits, labels, **arguments):
        values, held = original(self, logits, labels, **arguments)
        calls.append((logits.detach().clone(), labels.clone(), values.detach().clone(), held))
        return values, held

    monkeypatch.setattr(EditLoss, "__call__", record)
    return calls


@pytest.mark.parametrize("name", NAMES)
class TestVector:
    """Each method's own function, with and without the key."""

    def test_without_the_key_is_the_same_bit_for_bit(self, vector, name):
        before = vector(name)
        overtone.easyedit.install()
        during = vector(name)
        vector(name, "overtone")
        assert same(before, during)
        assert same(before, vector(name))
        assert during.output == before.output

    def test_cross_entropy_through_the_seam_is_its_own_loss(self, vector, name):
        stock = vector(name)
        overtone.easyedit.install()
        through = vector(name, cross_entropy)
        for value, expected in zip(through.values, stock.values, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4)

    def test_minimises_overtone_on_the_target_tokens(self, vector, recorder, name):
        stock = vector(name)
        overtone.easyedit.install()
        flagged = vector(name, "overtone:check=false")
        target = flagged.tok(REQUEST["target_new"], add_special_tokens=False)["input_ids"]
        contexts = 1 if name.startswith("UnKE") else 2
        settings = OverToneConfig.preset("lora", check=False).as_kwargs()
        assert len(recorder) == 6
        for logits, labels, values, _ in recorder:
            assert labels.tolist() == target * contexts
            torch.testing.assert_close(values, reference_loss(logits, labels, reduction="none", **settings))
        assert not same(flagged, stock)

    def test_a_held_step_ends_it_where_it_is(self, vector, recorder, name):
        """Held at once, the vector is the unedited model's, whatever KL, decay and the rest would still ask for."""
        overtone.easyedit.install()
        held = vector(name, "overtone:epsilon=1000")
        without_steps = vector(name, "overtone:hold=none", v_num_grad_steps=1)
        assert same(held, without_steps)
        steps = {"EAMET": 2, "UnKE": 6}.get(name, 1)
        assert [call[3] for call in recorder] == [True] * steps + [False]

    def test_is_held_in_the_middle(self, vector, recorder, name):
        overtone.easyedit.install()
        vector(name, "overtone:epsilon=0", v_num_grad_steps=12)
        means = [values.mean().item() for _, _, values, _ in recorder]
        threshold = (means[0] + min(means)) / 2
        steps = next(step for step, mean in enumerate(means) if mean <= threshold)
        assert steps > 0
        recorder.clear()
        vector(name, f"overtone:epsilon=0+hold={threshold}", v_num_grad_steps=12)
        held = [call[3] for call in recorder]
        assert held == [False] * steps + [True] * (1 if name != "UnKE" else 12 - steps)

    def test_an_error_in_the_loss_is_loud(self, vector, name):
        overtone.easyedit.install()
        with pytest.raises(ValueError, match="one loss a token"):
            vector(name, lambda logits, labels: logits.sum())
        assert same(vector(name), vector(name))


class TestEdit:
    """Whole edits, by EasyEdit's editor."""

    def hparams(self, framework, name, models, **changes):
        values = {**VALUES, "alg_name": name, "model_name": str(models["llama"]), **OWN_VALUES.get(name, {}), **changes}
        cls = _hparams_class(framework, name)
        known = cls.__dataclass_fields__
        return cls(**{key: value for key, value in values.items() if key in known})

    def run(self, framework, hparams):
        torch.manual_seed(0)
        return edit_with(framework, hparams)

    @pytest.mark.parametrize("name", ["ROME", "R-ROME", "MEMIT", "EMMET"])
    def test_takes_the_loss_from_its_hparams(self, framework, models, monkeypatch, recorder, name):
        package = name.lower().replace("-", "_")
        module = framework.module(f"models.{package}.{package}_main")
        contexts = CONTEXTS
        if "ROME" in name:
            contexts = [context for group in CONTEXTS for context in group]
        else:  # its statistics come from a corpus
            monkeypatch.setattr(module, "get_cov", lambda *args, **kwargs: torch.eye(64))
        monkeypatch.setattr(module, "CONTEXT_TEMPLATES_CACHE", contexts)
        stock = self.run(framework, self.hparams(framework, name, models)).weights()
        overtone.easyedit.install()
        again = self.run(framework, self.hparams(framework, name, models)).weights()
        assert not recorder
        assert all(torch.equal(value, again[key]) for key, value in stock.items())
        flagged = self.hparams(framework, name, models)
        flagged.token_loss = "overtone:check=false"
        edited = self.run(framework, flagged).weights()
        assert len(recorder) == 6
        assert any(not torch.equal(value, edited[key]) for key, value in stock.items())

    @pytest.mark.parametrize(("name", "is_taken_back"), [("MEMIT", True), ("EMMET", False)])
    def test_emmets_single_edits_are_not_taken_back(self, framework, models, monkeypatch, name, is_taken_back):
        """As the doctor says."""
        module = framework.module(f"models.{name.lower()}.{name.lower()}_main")
        monkeypatch.setattr(module, "get_cov", lambda *args, **kwargs: torch.eye(64))
        monkeypatch.setattr(module, "CONTEXT_TEMPLATES_CACHE", CONTEXTS)
        hparams = self.hparams(framework, name, models)
        editor = framework.editor_class.from_hparams(hparams)
        before = {key: value.clone() for key, value in editor.model.state_dict().items()}
        edit_with(framework, hparams, editor=editor, sequential=False)
        after = editor.model.state_dict()
        assert all(torch.equal(value, after[key]) for key, value in before.items()) == is_taken_back

    def test_alphaedits_single_edits_know_of_each_other(self, framework, models, monkeypatch, tmp_path):
        """As the doctor says: the same edit of the same model becomes another one, until the keys are forgotten."""
        module = framework.module("models.alphaedit.AlphaEdit_main")
        monkeypatch.setattr(module, "CONTEXT_TEMPLATES_CACHE", CONTEXTS)
        monkeypatch.setattr(module, "P_loaded", False)
        monkeypatch.setattr(module, "cache_c_new", False)
        projection = tmp_path / "projection.pt"
        torch.save(torch.eye(64).unsqueeze(0), projection)
        own = {"nullspace_threshold": 1e-2, "L2": 1, "P_loc": str(projection)}
        hparams = self.hparams(framework, "AlphaEdit", models, **own)
        editor = framework.editor_class.from_hparams(hparams)
        weights, edited = editor.model.model.layers[0].mlp.down_proj.weight, []
        monkeypatch.setattr(module, "compute_z", lambda *args: torch.ones(32))
        apply = editor.apply_algo

        def watched(*args, **kwargs):
            result = apply(*args, **kwargs)
            edited.append(weights.detach().clone())
            return result

        editor.apply_algo = watched
        for _ in range(2):
            edit_with(framework, hparams, editor=editor, sequential=False)
        module.cache_c_new = False
        edit_with(framework, hparams, editor=editor, sequential=False)
        assert torch.equal(edited[0], edited[2])
        assert not torch.allclose(edited[0], edited[1], rtol=1e-2)

    def test_says_how_low_a_held_loss_is_to_its_own_rule_alone(self, vector):
        """What it prints of a held step is below every threshold, and below what stands beside it."""
        overtone.easyedit.install()
        losses = re.findall(r"^loss (\S+) =", vector("ROME", "overtone:epsilon=1000").output, re.MULTILINE)
        assert [float(loss) < 0 for loss in losses] == [True]


class TestGraceAndDefer:
    """They minimise what the model computes from its labels."""

    OWN: ClassVar = {
        "GRACE": {
            "edit_lr": 1.0,
            "n_iter": 6,
            "eps": 1.0,
            "dist_fn": "euc",
            "val_init": "cold",
            "val_train": "sgd",
            "val_reg": "None",
            "reg": "early_stop",
            "replacement": "replace_last",
            "eps_expand": "coverage",
            "num_pert": 8,
            "dropout": 0.0,
        },
        "DEFER": {"edit_lr": 1e-2, "n_iter": 6, "threshold": 0.5},
    }

    def run(self, framework, models, name, token_loss=None, **changes):
        if BY_NAME[name].seam_problem() is not None and name not in overtone.easyedit.installation.installed():
            pytest.skip(f"{name} is not in this EasyEdit")
        hparams = _hparams_class(framework, name)(
            **{
                **self.OWN[name],
                "alg_name": name,
                "model_name": str(models["llama"]),
                "device": "cpu",
                "inner_params": ["model.layers[1].mlp.down_proj.weight"],
                **changes,
            }
        )
        if token_loss is not None:
            hparams.token_loss = token_loss
        torch.manual_seed(0)
        return edit_with(framework, hparams)

    @pytest.mark.parametrize("name", ["GRACE", "DEFER"])
    def test_takes_the_loss_from_its_hparams(self, framework, models, recorder, name):
        stock = self.run(framework, models, name).edited.losses
        overtone.easyedit.install()
        assert [float(loss) for loss in self.run(framework, models, name).edited.losses] == [float(x) for x in stock]
        assert not recorder
        flagged = self.run(framework, models, name, "overtone").edited.losses
        preset = OverToneConfig.preset("melo").as_kwargs()
        assert len(flagged) == len(recorder) == 6
        for loss, (logits, labels, _, _) in zip(flagged, recorder, strict=True):
            assert float(loss) == pytest.approx(reference_loss(logits, labels, **preset).item(), abs=1e-5)

    @pytest.mark.parametrize("name", ["GRACE", "DEFER"])
    def test_held_steps_leave_every_weight(self, framework, models, name):
        overtone.easyedit.install()
        runs = [
            self.run(framework, models, name, "overtone:epsilon=1000", n_iter=steps).edited.model.state_dict()
            for steps in (1, 6)
        ]
        assert all(torch.equal(value, runs[1][key]) for key, value in runs[0].items())


def _hparams_class(framework, name):
    package = BY_NAME[name].module.split(".")[0]
    return getattr(framework.module(f"models.{package}"), BY_NAME[name].hparams_class)
