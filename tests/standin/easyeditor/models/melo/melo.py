"""Wraps the model, and keeps its hparams as `config`."""

from dataclasses import dataclass

import torch
import yaml

from ...util.hparams import HyperParams


@dataclass
class MELOHyperParams(HyperParams):
    alg_name: str
    model_name: str
    num_iter: int
    lr: float

    @classmethod
    def from_hparams(cls, path):
        with open(path if ".yaml" in path else path + ".yaml") as stream:
            return cls(**yaml.safe_load(stream))


class _Wrapper(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.wrapped = model

    def get_base_model(self):
        return self.wrapped


def get_peft_model(model):
    return _Wrapper(model)


class LORA(torch.nn.Module):
    def __init__(self, model, config):
        super().__init__()
        self.config = config
        self.model = get_peft_model(model)

    def edit(self, tokens):
        prompt, target = tokens
        model = self.model.get_base_model()
        optimiser = torch.optim.Adam(model.parameters(), lr=self.config.lr)
        self.losses = []
        for _ in range(self.config.num_iter):
            labels = torch.tensor([[-100] * len(prompt) + target])
            loss = model(input_ids=torch.tensor([prompt + target]), labels=labels).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            self.losses.append(loss.item())
