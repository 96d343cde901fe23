"""Fixtures for tests against a real checkout of EasyEdit, named by EASYEDIT_ROOT.

Without the variable tests/conftest.py leaves this folder out. Checkouts from before June 2026 send everything
to "cuda:<device>"; on a machine without CUDA the fixture `framework` sends it to the CPU instead.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy
import pytest
import torch

import overtone.easyedit
from overtone.easyedit.methods import TRAINERS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

if "EASYEDIT_ROOT" not in os.environ:
    raise pytest.UsageError("set EASYEDIT_ROOT to a checkout of EasyEdit, in an environment with its requirements")
ROOT = os.environ["EASYEDIT_ROOT"]
METHODS = ("FT", "LoRA", "MELO", "WISE")
ARCHITECTURES = ("llama", "gpt2", "qwen2", "qwen3_5", "mistral")


@dataclass(frozen=True)
class Framework:
    """The checkout under test."""

    editor_class: type
    methods: tuple[str, ...]
    device: int | str

    def module(self, name: str) -> ModuleType:
        return importlib.import_module(f"easyeditor.{name}")


@pytest.fixture(scope="session")
def framework(tmp_path_factory):
    """EasyEdit, imported, on the CPU, writing its logs to a folder of this session."""
    os.chdir(tmp_path_factory.mktemp("cwd"))
    sys.path.insert(0, ROOT)
    editor_class = importlib.import_module("easyeditor").BaseEditor
    device: int | str = "cpu"
    if importlib.util.find_spec("easyeditor.util.device") is None:
        device = 0
        if not torch.cuda.is_available():
            _send_cuda_to_cpu()
    gc.freeze()  # WISE collects garbage at every edit; the framework's many objects are none
    found = tuple(trainer.name for trainer in TRAINERS if trainer.name in METHODS and trainer.seam_problem() is None)
    return Framework(editor_class, found, device)


def _send_cuda_to_cpu():
    from transformers import BatchEncoding, PreTrainedModel

    def on_cpu(to):
        def moved(self, *args, **kwargs):
            args = tuple("cpu" if type(arg) is int or str(arg).startswith("cuda") else arg for arg in args)
            return to(self, *args, **kwargs)

        return moved

    for owner in (torch.Tensor, torch.nn.Module, PreTrainedModel, BatchEncoding):
        owner.to = on_cpu(owner.to)


@pytest.fixture(autouse=True)
def _clean_slate(request):
    """Adapters out, EasyEdit's process-wide state as at import, the same seed, before and after each test."""
    overtone.easyedit.uninstall()
    _reset(request.getfixturevalue("framework"))
    yield
    overtone.easyedit.uninstall()


def _reset(framework):
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(0)
    if "WISE" in framework.methods:
        wise = framework.module("models.wise.WISE")
        wise.edit_history, wise.merge_group_edit_history = [], []
        framework.module("models.wise.utils").CONTEXT_TEMPLATES_CACHE = None
    if "MELO" in framework.methods:
        framework.module("models.melo.peft_egg.src.peft.tuners.melo").LORA_BLOCK_MAPPING = []


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of tiny random models, by architecture; EasyEdit knows a family by the name in the path."""
    known = importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING_NAMES
    return {arch: _tiny_model(tmp_path_factory.mktemp(f"tiny-{arch}"), arch) for arch in ARCHITECTURES if arch in known}


TEXT = (
    "The capital of Ardan is Belmor . Velin Question: what Answer: I You Because Yes Q: spouse head Corin Tass "
    "unrelated city people river Mavi Solen"
)


def tiny_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A tokenizer of the tests' words, saved in the folder."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [TEXT] * 20, trainers.BpeTrainer(vocab_size=400, special_tokens=[end], initial_alphabet=alphabet)
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=end,
        bos_token=end,
        unk_token=end,
        pad_token=end,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.save_pretrained(folder)
    bpe.model.save(str(folder))  # GPT2Tokenizer reads vocab.json and merges.txt
    return tokenizer


def _tiny_model(folder: Path, arch: str) -> Path:
    import transformers

    tokenizer = tiny_tokenizer(folder)
    common = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    common["initializer_range"] = 0.3  # loud enough that a few steps fit a fact
    if arch == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **common)
    else:
        config_class = {
            "llama": transformers.LlamaConfig,
            "qwen2": transformers.Qwen2Config,
            "qwen3_5": getattr(transformers, "Qwen3_5TextConfig", None),
            "mistral": transformers.MistralConfig,
        }[arch]
        if arch == "qwen3_5":
            linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
            common |= {"head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, **linear}
        config = config_class(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4 if arch == "qwen3_5" else 2,  # every fourth has an attention of the usual kind
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=False,
            **common,
        )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    return folder


@dataclass
class Run:
    """What one call of an editor did."""

    editor: object
    edited: object
    metrics: list
    output: str

    def weights(self) -> dict[str, torch.Tensor]:
        """Every tensor of the edited model."""
        return {name: value.detach().clone() for name, value in self.edited.state_dict().items()}

    def printed(self, marker: str = "Batch loss ") -> list[float]:
        """The losses that the trainer printed."""
        return [float(line.removeprefix(marker)) for line in self.output.splitlines() if line.startswith(marker)]


@pytest.fixture
def edit(framework, models):
    """Edit with one of the four methods, from a freshly loaded model: ``edit("LoRA", token_loss="overtone")``.

    Sequential unless told: a single edit is taken back by BaseEditor after its evaluation, weights and all.
    """
    from hparams import build

    def run(method, arch="llama", *, token_loss=None, requests=1, sequential=True, batch=None, **changes):
        if method not in framework.methods:
            pytest.skip(f"{method} is not in this EasyEdit")
        if arch not in models:
            pytest.skip(f"this transformers has no {arch}")
        if framework.device == 0 and (arch == "qwen2" or (method, arch) == ("WISE", "gpt2")):
            pytest.skip(f"this EasyEdit cannot run {method} on {arch}")
        if framework.device == 0 and method == "LoRA" and sequential and requests > 1:
            pytest.skip("this EasyEdit cannot run LoRA edits in a row")
        _reset(framework)
        hparams = build(framework, method, models[arch], **({"batch_size": batch} if batch else {}), **changes)
        if token_loss is not None:
            hparams.token_loss = token_loss
        if sequential and method == "WISE":
            hparams.sequential_edit = True
        sequential = sequential and method != "MELO"  # MELO keeps its edits without it, and drops them with it
        return edit_with(framework, hparams, requests=requests, sequential=sequential, batch=batch)

    return run


PROMPTS = ["The capital of Ardan is", "The head of Velin is", "The river of Mavi is"]
TARGETS = ["Corin Solen", "Tass", "Belmor Mavi"]


def edit_with(framework, hparams, *, editor=None, requests=1, sequential=True, batch=None) -> Run:
    """Run BaseEditor on the first requests, quietly."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        editor = editor or framework.editor_class.from_hparams(hparams)
        arguments = {
            "prompts": PROMPTS[:requests],
            "target_new": TARGETS[:requests],
            "ground_truth": ["Belmor", "Mavi", "Tass"][:requests],
            "subject": ["Ardan", "Velin", "Mavi"][:requests],
        }
        if hparams.alg_name == "WISE":
            arguments["loc_prompts"] = ["river"] * requests
        call = editor.batch_edit if batch else editor.edit
        metrics, edited, _ = call(**arguments, sequential_edit=sequential, verbose=False)
    return Run(editor, edited, metrics, output.getvalue())
