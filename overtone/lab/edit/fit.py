"""One edit as a short loop of Adam that takes any token loss."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from overtone.lab.edit.losses import TokenLoss
from overtone.lab.model.targets import TargetBatch, target_logits


@dataclass(frozen=True)
class FitTrace:
    """How one edit went.

    Attributes:
        losses: the token loss before each update, and the one at which the edit was held or stopped.
        steps: optimiser steps taken.
        ended: "steps" (all were taken), "stopped" (the loss fell below `stop_below`) or "held" (the loss asked for no
            further change).
        seconds: wall-clock time.
    """

    losses: tuple[float, ...]
    steps: int
    ended: str
    seconds: float


def fit(
    model: Any,
    parameters: list[nn.Parameter],
    batch: TargetBatch,
    token_loss: TokenLoss,
    *,
    steps: int,
    lr: float,
    stop_below: float | None = None,
    observe: Callable[[int], None] | None = None,
) -> FitTrace:
    """Fit the batch's target tokens with Adam, all of them in every step.

    Args:
        model: a Hugging Face causal language model.
        parameters: the weights to move, as an editing method opens them.
        batch: the edit's prompts and targets.
        token_loss: logits (N, V) and labels (N,) to a scalar.
        steps: optimiser steps at most.
        lr: Adam's learning rate.
        stop_below: stop before a step once the loss is below this value.
        observe: called with the number of steps taken so far, before every step.

    Raises:
        RuntimeError: the loss is NaN or infinite.
    """
    start = time.perf_counter()
    optimizer = torch.optim.Adam(parameters, lr=lr)
    losses: list[float] = []
    ended = "steps"
    for step in range(steps):
        if observe is not None:
            observe(step)
        optimizer.zero_grad()
        loss = token_loss(*target_logits(model, batch))
        losses.append(loss.item())
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss is {losses[-1]} after {step} steps with lr={lr}: lower lr")
        if stop_below is not None and losses[-1] < stop_below:
            ended = "stopped"
            break
        loss.backward()
        if all(parameter.grad is None for parameter in parameters):
            # No gradient, so Adam would leave every weight where it is; the next forward pass would be this one
            # again, with the same answer. Nothing can change any more.
            ended = "held"
            break
        optimizer.step()
    optimizer.zero_grad()
    taken = len(losses) if ended == "steps" else len(losses) - 1
    return FitTrace(tuple(losses), taken, ended, time.perf_counter() - start)
