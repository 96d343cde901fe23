# ruff: noqa: N999
"""SGD with a meter that stops at 0.02; asserts that its weights have gradients."""

import torch
from torch.nn import CrossEntropyLoss


class WISE(torch.nn.Module):
    def __init__(self, config, model, device):
        super().__init__()
        self.config = config
        self.model = model

    def edit(self, config, tokens, act_mask=None):
        self.losses, self.rows = [], len(tokens["input_ids"])
        self.edited_with = config
        optimiser = torch.optim.SGD(self.model.parameters(), lr=config.edit_lr)
        for _ in range(config.n_iter):
            loss = self.__cal_ft_loss(tokens)
            if len(self.losses) > 1 and self.losses[-1] <= 0.02 and abs(self.losses[-1] - self.losses[-2]) <= 1e-4:
                break
            optimiser.zero_grad()
            loss.backward()
            assert all(parameter.grad is not None for parameter in self.model.parameters())
            optimiser.step()
            self.losses.append(loss.item())

    def __cal_ft_loss(self, tokens):
        logits = self.model(input_ids=tokens["input_ids"]).logits[:, :-1]
        labels = tokens["labels"][:, 1:]
        loss = CrossEntropyLoss(reduction="none")(logits.flatten(0, 1), labels.flatten())
        return loss.sum() / (labels != -100).sum()


class WISEMultimodal(WISE):
    pass
