"""UnKE, which EasyEdit's editor does not know: its own function in an editor that scores as EasyEdit's does."""

from __future__ import annotations

import importlib
import random
from dataclasses import fields
from inspect import signature
from typing import Any

from framework import Config, Request, examine, load_hparams

ACCEPTED = "Qwen2.5-7B-Instruct"
"""UnKE trains its layer only where model_name contains this or Llama3-8B-Instruct; nothing else depends on it."""

OWN: Config = {"fact_token": "last", "lr": 2e-4, "optim_num_step": 50, "ex_data_num": 20}
"""Where UnKE's hparams differ from MEMIT's, or have more."""


def mend_rotary(model: Any, layers: list[int]) -> None:
    """Answer a call that names no type of layer with the rotary embedding of the layers that are trained.

    Models with layers of several types, such as Gemma 3, have one for each; UnKE names none. Others stay as they are.

    Raises:
        ValueError: the layers are of several types.
    """
    original = model.rotary_emb.forward
    if "layer_type" not in signature(original).parameters:
        return
    types = {model.config.layer_types[layer] for layer in layers}
    if len(types) > 1:
        raise ValueError(f"layers {layers} are of the types {', '.join(sorted(types))}: UnKE can train those of one")
    (trained,) = types

    def forward(x: Any, position_ids: Any, layer_type: str | None = None) -> Any:
        return original(x, position_ids, layer_type or trained)

    model.rotary_emb.forward = forward


class UnkeEditor:
    """UnKE in the place of EasyEdit's editor. Its edits stay in the model."""

    def __init__(self, config: Config, texts: list[str]) -> None:
        """Load the model as MEMIT's editor does.

        Args:
            config: MEMIT's and `OWN`.
            texts: of which each edit keeps ``ex_data_num``.

        Raises:
            ValueError: the layers are of several types.
        """
        from easyeditor import BaseEditor

        module: Any = importlib.import_module("easyeditor.models.unke.unke_main")
        self.apply_algo = module.apply_unke_to_model
        known = {field.name for field in fields(module.unkeHyperParams)}
        self.hparams = module.unkeHyperParams(**{name: config[name] for name in known} | {"model_name": ACCEPTED})
        self.hparams.token_loss = config.get("token_loss")
        own = {"lr", "optim_num_step", "ex_data_num", "token_loss"}
        shared = {name: value for name, value in config.items() if name not in own}
        self._editor = BaseEditor.from_hparams(load_hparams(shared | {"alg_name": "MEMIT"}))
        self.model = self._editor.model
        mend_rotary(self.model.model, self.hparams.layers)
        self._texts = texts

    def edit_requests(self, requests: list[Request], **_: Any) -> tuple[list[dict[str, Any]], Any, dict[str, Any]]:
        """One edit, with the texts to keep chosen by its prompt: the same for every loss."""
        (request,) = requests
        pair = {"question": request["prompt"], "answer": f" {request['target_new']}"}
        kept = random.Random(request["prompt"]).sample(self._texts, self.hparams.ex_data_num)
        before = examine(self.model, self._editor, request)
        weights = self.apply_algo(self.model, self._editor.tok, self.hparams, [pair], kept)
        return [{"pre": before, "post": examine(self.model, self._editor, request)}], self.model, weights
