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
        losses: the loss before each update, and those of the steps that were held.
        steps: optimiser steps taken, without those that were held.
        ended: "steps" (the limit was reached), "held" (the loss asked for no further change) or "stopped" (by a rule of
            the method's own).
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
    steps_a_round: int = 1,
) -> FitTrace:
    """Minimise a loss with Adam.

    Args:
        parameters: the weights to move, as an editing method opens them.
        loss_of: the loss with the weights as they are, a scalar; a held one leaves every gradient None.
        steps: at most; of a loss that looks at its texts in turn, rounds over all of them.
        lr: Adam's learning rate.
        observe: called with the number of steps taken so far, before every step.
        steps_a_round: after how many calls `loss_of` has looked at all of its texts. The fit ends held after a round of
            which every step was.

    Raises:
        RuntimeError: the loss is NaN or infinite.
        ValueError: steps_a_round is less than 1.
    """
    if steps_a_round < 1:
        raise ValueError(f"steps_a_round must be at least 1, got {steps_a_round}")
    start = time.perf_counter()
    optimizer = torch.optim.Adam(parameters, lr=lr)
    losses: list[float] = []
    taken = taken_before_round = 0
    ended = "steps"
    for step in range(steps * steps_a_round):
        if observe is not None:
            observe(taken)
        optimizer.zero_grad()
        loss = loss_of()
        losses.append(loss.item())
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss is {losses[-1]} after {taken} steps with lr={lr}: lower lr")
        loss.backward()
        if any(parameter.grad is not None for parameter in parameters):
            optimizer.step()
            taken += 1
        if (step + 1) % steps_a_round == 0:
            if taken == taken_before_round:
                # No gradient, so Adam would leave every weight where it is; the next forward passes would be these
                # again, with the same answer. Nothing can change any more.
                ended = "held"
                break
            taken_before_round = taken
    optimizer.zero_grad()
    return FitTrace(tuple(losses), taken, ended, time.perf_counter() - start)


def target_loss(model: Any, batch: TargetBatch, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
    """The loss of all of a batch's target tokens, as `fit` takes it.

    Args:
        model: a Hugging Face causal language model.
        batch: the edit's prompts and targets.
        loss_of: from the logits (N, V) of the target tokens and their labels (N,) to a scalar.
    """
    return lambda: loss_of(*target_logits(model, batch))
