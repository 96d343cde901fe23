"""One edit as a short loop of Adam that takes any token loss."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from overtone.lab.model.targets import TargetBatch, target_logits


@dataclass(frozen=True)
class FitTrace:
    """How one edit went.

    Attributes:
        losses: the loss before each update, and the one at which the edit was held.
        steps: optimiser steps taken.
        ended: "steps" (all were taken), "held" (the loss asked for no further change) or "stopped" (by a rule of the
            method's own).
        seconds: wall-clock time.
    """

    losses: tuple[float, ...]
    steps: int
    ended: str
    seconds: float


def fit(
    parameters: list[nn.Parameter],
    loss_of: Callable[[], Tensor],
    *,
    steps: int,
    lr: float,
    observe: Callable[[int], None] | None = None,
) -> FitTrace:
    """Minimise a loss with Adam.

    Args:
        parameters: the weights to move, as an editing method opens them.
        loss_of: the loss with the weights as they are, a scalar; a held one leaves every gradient None.
        steps: optimiser steps at most.
        lr: Adam's learning rate.
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
        loss = loss_of()
        losses.append(loss.item())
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss is {losses[-1]} after {step} steps with lr={lr}: lower lr")
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


def target_loss(model: Any, batch: TargetBatch, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
    """The loss of all of a batch's target tokens, as `fit` takes it.

    Args:
        model: a Hugging Face causal language model.
        batch: the edit's prompts and targets.
        loss_of: from the logits (N, V) of the target tokens and their labels (N,) to a scalar.
    """
    return lambda: loss_of(*target_logits(model, batch))
