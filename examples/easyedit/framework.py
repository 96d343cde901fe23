"""What the example scripts share: hparams files fitted to a model, and EasyEdit's scores in the paper's words."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml

MEASURES = ("Rel", "Gen", "Por", "Loc")
HPARAMS = Path(__file__).parent / "hparams"
CLASSES = {
    "FT": ("easyeditor.models.ft", "FTHyperParams"),
    "LoRA": ("easyeditor.models.lora", "LoRAHyperParams"),
    "MELO": ("easyeditor.models.melo", "MELOHyperParams"),
    "WISE": ("easyeditor.models.wise", "WISEHyperParams"),
    "MEMIT": ("easyeditor.models.memit", "MEMITHyperParams"),
    "AlphaEdit": ("easyeditor.models.alphaedit", "AlphaEditHyperParams"),
    "ROME": ("easyeditor.models.rome", "ROMEHyperParams"),
    "R-ROME": ("easyeditor.models.r_rome", "R_ROMEHyperParams"),
    "EMMET": ("easyeditor.models.emmet", "EMMETHyperParams"),
    "SPHERE": ("easyeditor.models.SPHERE", "SPHEREHyperParams"),
    "CORE": ("easyeditor.models.core", "COREHyperParams"),
    "EAMET": ("easyeditor.models.eamet", "EAMETHyperParams"),
    "PMET": ("easyeditor.models.pmet", "PMETHyperParams"),
}
VECTOR_METHODS = ("ROME", "R-ROME", "MEMIT", "EMMET", "AlphaEdit", "SPHERE", "CORE", "EAMET", "PMET")
"""Those that optimise one vector."""

LAYER_METHODS = ("MEMIT", "EMMET", "AlphaEdit", "SPHERE", "CORE", "EAMET")
"""Of these those that write into an MLP what is to come out of its layer."""

NOT_TAKEN_BACK = ("MELO", "EMMET", "UnKE")
"""Their single edits stay in the editor's model."""

KEEP_KEYS = ("AlphaEdit", "SPHERE")
"""They keep the keys of every edit in their module, of single ones too."""

NO_KEY = "none"
"""In the place of a loss: EasyEdit without the key."""

FIXED = {"alg_name", "token_loss"}
"""What other options of the programs say."""

LAYERS = {"llama-3.2-3b-instruct": 28, "qwen2.5-7b-instruct": 28}
"""Of the models that the files are for; of the others 32."""

Config = dict[str, Any]
Request = dict[str, Any]
Scores = dict[str, float]


def load_config(path: Path, model: str | None = None, **changes: Any) -> Config:
    """An hparams file, for another model where one is named; ``token_loss=None`` takes the key out."""
    config: Config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if model is not None:
        fit_to_model(config, model)
    config.update(changes)
    if config.get("token_loss") is None:
        config.pop("token_loss", None)
    return config


def with_changes(config: Config, changes: str) -> Config:
    """The config with values as a command line spells them, in JSON: ``act_ratio=0.5;layers=[2,3]``.

    Raises:
        ValueError: for a name that the config does not have, and a value that is not JSON.
    """
    for change in filter(None, map(str.strip, changes.split(";"))):
        name, equals, value = change.partition("=")
        section = config["grace"] if config["alg_name"] == "MELO" and name in config["grace"] else config
        if name in FIXED:
            raise ValueError(f"--change {change}: {name} is not changed here, but given by itself")
        if not equals or name not in section:
            known = ", ".join(sorted({*config, *config.get("grace", ())} - FIXED))
            raise ValueError(f"--change {change}: a change is name=value, and {config['alg_name']}'s file has {known}")
        try:
            section[name] = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f'--change {change}: a value is JSON, as 0.5, [2,3], true or "last"') from error
    return config


def fit_to_model(config: Config, model: str) -> None:
    """Point the file at another model: its path everywhere, its depth where a layer is named, the CPU without CUDA."""
    depth = json.loads(Path(model, "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    old_depth = LAYERS.get(Path(config["model_name"]).name, 32)

    def fit(layer: int) -> int:
        return layer * depth // old_depth if old_depth > depth else layer

    def fit_path(path: str) -> str:
        return re.sub(r"(layers[.\[])(\d+)", lambda found: found[1] + str(fit(int(found[2]))), path)

    config["model_name"] = model
    if not torch.cuda.is_available():
        config["device"] = "cpu"
        if "fp16" in config:
            config["fp16"] = False  # half precision is for CUDA
    if config["alg_name"] in ("FT", *VECTOR_METHODS):
        config["layers"] = sorted({fit(layer) for layer in config["layers"]})
        if "v_loss_layer" in config:
            config["v_loss_layer"] = depth - 1
    elif config["alg_name"] == "WISE":
        config["inner_params"] = [fit_path(path) for path in config["inner_params"]]
    elif config["alg_name"] == "MELO":
        section = config["model"]
        section["name"] = section["tokenizer_name"] = config["lora"]["cls_name"] = model
        section["target_modules"] = sorted({fit_path(path) for path in section["target_modules"]})
        first = min(int(number) for number in re.findall(r"layers\.(\d+)", " ".join(section["target_modules"])))
        section["grace_layer"] = re.sub(r"layers\.\d+", f"layers.{max(first - 1, 0)}", section["grace_layer"])


def open_editor(config: Config, *, prefixes: bool = True, at_mlp: bool = False) -> Any:
    """EasyEdit's editor of a config, with what a method needs to run at all.

    Args:
        config: of any method but UnKE, which EasyEdit's editor does not know.
        prefixes: let a method that optimises one vector sample texts to put before its prompt.
        at_mlp: let one of `LAYER_METHODS` optimise the output of the MLP into which it writes.
    """
    from easyeditor import BaseEditor

    editor = BaseEditor.from_hparams(load_hparams(config))
    if at_mlp:
        optimise_at_mlp(editor.hparams)
    if not prefixes:
        without_prefixes(editor)
    if config["alg_name"] == "PMET":
        mend_pmet(editor)
    return editor


def without_prefixes(editor: Any) -> None:
    """Let a method that optimises one vector see the bare prompt, not also prompts after texts that it samples.

    It then has 2 sequences a step instead of 7 or more.
    """
    module: Any = sys.modules[editor.apply_algo.__module__]
    module.CONTEXT_TEMPLATES_CACHE = ["{}"] if editor.alg_name in ("ROME", "R-ROME") else [["{}"]]


class _LayerOrMlp(str):
    """A template of layers' names that names one layer's MLP in its place."""

    layer: int
    mlp: str

    def format(self, layer: int) -> str:  # type: ignore[override]
        """The name of a layer, or of the one layer's MLP."""
        return self.mlp if layer == self.layer else super().format(layer)


def optimise_at_mlp(hparams: Any) -> None:
    """Let one of `LAYER_METHODS` optimise the output of an MLP in the place of its layer's.

    It writes the vector into the MLP. Gemma 2 and 3 put a norm between the MLP and the layer's output, so that there a
    vector of the one is none of the other.

    Raises:
        ValueError: several layers are edited, whose MLPs have no output in common, or the loss is read from the edited
            one.
    """
    if len(hparams.layers) != 1:
        raise ValueError(f"at an MLP one layer is edited, not {hparams.layers}: --change layers=[{hparams.layers[-1]}]")
    (layer,) = hparams.layers
    if hparams.v_loss_layer <= layer:
        raise ValueError(f"layers {hparams.layers} must come before v_loss_layer {hparams.v_loss_layer} at an MLP")
    template = _LayerOrMlp(hparams.layer_module_tmp)
    template.layer, template.mlp = layer, hparams.mlp_module_tmp.format(layer)
    hparams.layer_module_tmp = template


def forget_keys(editor: Any) -> None:
    """Let the next edit of one of `KEEP_KEYS` know of no other."""
    module: Any = sys.modules[editor.apply_algo.__module__]
    module.cache_c_new = False


def mend_pmet(editor: Any) -> None:
    """Pad on the right, as PMET counts, and put the space before a target that a byte-level tokenizer wants there."""
    apply = editor.apply_algo

    def with_space(model: Any, tok: Any, requests: list[Request], *args: Any, **kwargs: Any) -> Any:
        spaced = [{**request, "target_new": f" {request['target_new']}"} for request in requests]
        return apply(model, tok, spaced, *args, **kwargs)

    editor.tok.padding_side = "right"
    editor.apply_algo = with_space


def load_hparams(config: Config) -> Any:
    """The hparams object that EasyEdit makes of a config, read from a file as any user's."""
    module, name = CLASSES[config["alg_name"]]
    hparams_class = getattr(__import__(module, fromlist=[name]), name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "hparams.yaml")
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return hparams_class.from_hparams(str(path))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """EasyEdit prints every step and logs every edit; not here."""
    logging.disable(logging.INFO)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def scores_of(before: dict[str, Any], after: dict[str, Any]) -> Scores:
    """One edit's measures in percent, from what EasyEdit's `compute_edit_quality` said before and after it.

    A measure is the mean over its kinds of probes; portability kinds whose name begins with "rephrase" count as Gen.
    Locality is the share of answer tokens that stayed the same, as EasyEdit counts it. A measure without probes is left
    out.
    """
    portability = {key.removesuffix("_acc"): fmean(value) for key, value in after["portability"].items()}
    rephrased = [value for key, value in portability.items() if key.startswith("rephrase")]
    if "rephrase_acc" in after:
        rephrased.append(fmean(after["rephrase_acc"]))
    groups = {
        "Rel": [fmean(after["rewrite_acc"])],
        "Gen": rephrased,
        "Por": [value for key, value in portability.items() if not key.startswith("rephrase")],
        "Loc": [
            fmean(map(_agreement, before["locality"][key], outputs))
            for key, outputs in after["locality"].items()
            if key.endswith("_output")
        ],
    }
    return {measure: 100 * fmean(values) for measure, values in groups.items() if values}


def _agreement(before: Any, after: Any) -> float:
    if not isinstance(before, list):
        before, after = [before], [after]
    return fmean(float(old == new) for old, new in zip(before, after, strict=True)) if before else 1.0


def read_texts(file: Path, least: int = 1) -> list[str]:
    """The texts of a file, one a line.

    Raises:
        ValueError: there are fewer than the least number.
        OSError: there is no such file.
    """
    texts = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(texts) < least:
        raise ValueError(f"{file} must have a text a line, at least {least}, and has {len(texts)}")
    return texts


def finished(file: Path) -> list[dict[str, Any]]:
    """The edits that a file of results has; the half line that a killed run may leave at its end is cut off."""
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        file.write_text(text, encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def positive(text: str) -> int:
    """A number of edits on a command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def average(rows: list[Scores]) -> Scores:
    """The mean of each measure over edits, and of the four measures."""
    means = {m: fmean(row[m] for row in rows if m in row) for m in MEASURES if any(m in row for row in rows)}
    return {**means, "Avg": fmean(means.values())}


def examine(model: Any, editor: Any, request: Request) -> dict[str, Any]:
    """EasyEdit's own evaluation of a model on one request."""
    from easyeditor.evaluate import compute_edit_quality

    hparams = editor.hparams
    found: dict[str, Any] = compute_edit_quality(
        model, editor.model_name, hparams, editor.tok, request, hparams.device, eval_metric="token_em"
    )
    return found
