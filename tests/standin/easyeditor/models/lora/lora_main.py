"""Minimises what the model computes from its labels."""

from dataclasses import dataclass

import torch
import yaml

from ...util.hparams import HyperParams


@dataclass
class LoRAHyperParams(HyperParams):
    alg_name: str
    model_name: str
    num_steps: int
    lr: float

    @classmethod
    def from_hparams(cls, path):
        with open(path if ".yaml" in path else path + ".yaml") as stream:
            return cls(**yaml.safe_load(stream))


def apply_lora_to_model(model, tok, requests, hparams):
    return execute_lora(model, tok, requests, hparams)


def execute_lora(model, tok, requests, hparams):
    optimiser = torch.optim.Adam(model.parameters(), lr=hparams.lr)
    losses = []
    for _ in range(hparams.num_steps):
        for prompt, target in requests:
            optimiser.zero_grad()
            labels = torch.tensor([[-100] * len(prompt) + target])
            loss = model(input_ids=torch.tensor([prompt + target]), labels=labels).loss
            losses.append(loss.item())
            loss.backward()
            optimiser.step()
    model.losses = losses
    return model
