"""The shipped hparams files, loaded by the real EasyEdit's own classes and compared with its own files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from conftest import ROOT

import overtone.easyedit
from overtone.easyedit.methods import BY_NAME
from overtone.easyedit.trainers import MODELS

pytestmark = pytest.mark.easyedit

FILES = Path(__file__).parents[2] / "examples" / "easyedit" / "hparams"
ALG_NAMES = {
    "ft-m": "FT",
    "lora": "LoRA",
    "melo": "MELO",
    "wise": "WISE",
    "memit": "MEMIT",
    "alphaedit": "AlphaEdit",
    "rome": "ROME",
    "r-rome": "R-ROME",
}
THEIRS = {
    "llama-2-7b-chat": "llama-7b",
    "llama-3-8b-instruct": "llama3-8b",
    "llama-3.2-3b-instruct": "llama3.2-3b",
    "qwen2.5-7b-instruct": "qwen2.5-7b",
    "qwen3.5-9b": "qwen3.5-9b",
    "mistral-7b-v0.1": "mistral-7b",
}
BORROWED = {
    "lora-qwen3.5-9b": "qwen2.5-7b",
    "lora-mistral-7b-v0.1": "llama-7b",
    "memit-qwen3.5-9b": "qwen2.5-7b",
    "alphaedit-llama-3.2-3b-instruct": "llama3-8b",
}
"""Files for models that EasyEdit has none for: whose values they take."""

NO_VALUES = {"model_name", "device", "model_parallel", "token_loss", "use_chat_template"}
CHANGED = {
    "ft-m": {"objective_optimization"},
    "lora": {"lora_type", "lora_dropout"},
    "melo": {"model.target_modules", "model.grace_layer", "model.name", "model.class_name", "model.tokenizer_class"}
    | {"model.tokenizer_name", "model.fan_in_fan_out", "model.pt", "grace.init_radius", "grace.val_reg"}
    | {"lora.cls_name"},
    "memit-qwen3.5-9b": {"v_loss_layer", "attn_module_tmp"},
    "alphaedit-qwen3.5-9b": {"v_loss_layer"},
    "alphaedit-llama-3.2-3b-instruct": {"v_loss_layer", "lm_head_module"},
}
"""What differs from EasyEdit's file, by method and by file."""


@pytest.fixture
def load(framework):
    """The hparams object of a method's file; EasyEdit is there, with the adapters in it."""
    overtone.easyedit.install()

    def load(method, path):
        trainer = BY_NAME[ALG_NAMES[method]]
        package = framework.module(f"{MODELS.removeprefix('easyeditor.')}.{trainer.module.split('.')[0]}")
        return getattr(package, trainer.hparams_class).from_hparams(str(path))

    return load


def values_of(hparams):
    """Every value by its dotted name."""
    values = {}
    for name, value in vars(hparams).items():
        if dataclasses.is_dataclass(value):
            values.update({f"{name}.{inner}": found for inner, found in values_of(value).items()})
        elif name not in NO_VALUES:
            values[name] = value
    return values


@pytest.mark.parametrize("file", sorted(FILES.glob("*.yaml")), ids=lambda file: file.stem)
def test_differs_from_easyedits_own_file_in_what_it_says_alone(load, file):
    method = next(method for method in ALG_NAMES if file.name.startswith(f"{method}-"))
    model = file.stem.removeprefix(f"{method}-")
    theirs = "gpt2-xl" if method == "melo" else BORROWED.get(file.stem, THEIRS[model])
    stock = Path(ROOT, "hparams", ALG_NAMES[method], f"{theirs}.yaml")
    if not stock.exists():
        pytest.skip(f"this EasyEdit has no {stock.name} for {method}")
    ours = load(method, file)
    assert ours.token_loss == "overtone"
    ours, stock_values = values_of(ours), values_of(load(method, stock))
    differing = {name for name in ours.keys() | stock_values.keys() if ours.get(name) != stock_values.get(name)}
    assert differing <= CHANGED.get(method, set()) | CHANGED.get(file.stem, set())


@pytest.mark.parametrize("name", BORROWED)
def test_borrows_only_where_easyedit_has_no_file(name):
    method, _, model = name.partition("-")
    assert not Path(ROOT, "hparams", ALG_NAMES[method], f"{THEIRS[model]}.yaml").exists()
