"""Scores every position, masks the prompt, stops below 1e-2."""

from dataclasses import dataclass

import torch
import yaml
from torch.nn import CrossEntropyLoss

from ...util.hparams import HyperParams


@dataclass
class FTHyperParams(HyperParams):
    alg_name: str
    model_name: str
    num_steps: int
    lr: float
    objective_optimization: str

    @classmethod
    def from_hparams(cls, path):
        with open(path if ".yaml" in path else path + ".yaml") as stream:
            return cls(**yaml.safe_load(stream))


def apply_ft_to_model(model, tok, requests, hparams):
    return execute_ft(model, tok, requests, hparams)


def execute_ft(model, tok, requests, hparams):
    """``requests`` are pairs of token ids: prompt and target."""
    assert hparams.objective_optimization in ("target_new", "prompt_last")
    losses = []
    optimiser = torch.optim.Adam(model.parameters(), lr=hparams.lr)
    for _ in range(hparams.num_steps):
        for prompt, target in requests:
            ids = torch.tensor([prompt + target])
            logits = model(input_ids=ids).logits[:, :-1]
            tokens = CrossEntropyLoss(reduction="none")(logits.flatten(0, 1), ids[:, 1:].flatten())
            is_target = torch.arange(len(tokens)) >= len(prompt) - 1
            loss = (tokens * is_target).sum() / is_target.sum()
            losses.append(loss.item())
            optimiser.zero_grad()
            if loss.item() >= 1e-2:
                loss.backward()
                optimiser.step()
        if losses[-1] < 1e-2:
            break
    model.losses = losses
    return model
