"""Puts an edit together."""

from dataclasses import dataclass

import torch
import yaml

from ...util.hparams import HyperParams
from .WISE import WISE

TEMPLATES = ["{}", "I {}"]


@dataclass
class WISEHyperParams(HyperParams):
    alg_name: str
    model_name: str
    n_iter: int
    edit_lr: float
    act_ratio: float

    @classmethod
    def from_hparams(cls, path):
        with open(path if ".yaml" in path else path + ".yaml") as stream:
            return cls(**yaml.safe_load(stream))


def tokenize(batch, tokenizer, device, context_templates=None, hparams=None):
    prompt, target = batch[0]
    ids = [[0] * number + prompt + target for number in range(len(context_templates))]
    width = max(map(len, ids))
    ids = [[0] * (width - len(row)) + row for row in ids]
    labels = [[-100] * (width - len(target)) + target for _ in ids]
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}


def apply_wise_to_model(model, tok, requests, hparams):
    editor = WISE(model=model, config=hparams, device="cpu")
    tokens = tokenize(requests, tokenizer=tok, device="cpu", context_templates=TEMPLATES, hparams=hparams)
    editor.edit(config=hparams, tokens=tokens)
    return editor
