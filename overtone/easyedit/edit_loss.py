"""The token loss of one edit, and whether the edit still needs anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from overtone.functional import ground_truth_check
from overtone.hold import Hold, refuse_hold_when_distributed, release_when_held

TokenLoss = Callable[[Tensor, Tensor], Tensor]
"""``(logits (N, V), labels (N,)) -> loss (N,)``, labels without ignored positions."""


@dataclass(frozen=True)
class EditLoss:
    """What a trainer minimises in place of cross-entropy.

    A held step reports exactly 0 for every token: the trainer sees the paper's values while there is something to
    learn, and a loss that satisfies its own stopping rule (FT-M's 1e-2, WISE's meter) once there is not.

    Attributes:
        description: for the log.
        token_loss: the values that are minimised.
        distance: what a hold is decided on, in nats, unclipped; None where the loss cannot be held.
        settled_below: a token is settled below this distance, in nats.
        hold: as `overtone.overtone_loss`'s hold_settled.
        hold_correct: as there.
    """

    description: str
    token_loss: TokenLoss
    distance: TokenLoss | None = None
    settled_below: float = 0.0
    hold: Hold = False
    hold_correct: bool = False

    def __call__(self, logits: Tensor, labels: Tensor, *, may_hold: bool = True) -> tuple[Tensor, bool]:
        """Values ``(N,)`` with their graph, and whether this step is held (the values are then to be dropped).

        Raises:
            ValueError: if the loss did not return one value a token.
        """
        values = self.token_loss(logits, labels)
        if not isinstance(values, Tensor) or values.shape != labels.shape:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"token_loss must return one loss a token, shape {tuple(labels.shape)} for logits "
                f"{tuple(logits.shape)}, got {got}: leave the reduction to the trainer"
            )
        if not may_hold or self.hold is False or self.distance is None:
            return values, False
        refuse_hold_when_distributed(self.hold)
        with torch.no_grad():
            distance = self.distance(logits, labels)
            correct = ground_truth_check(logits, labels) if self.hold_correct else None
        return values, release_when_held(values, distance, self.settled_below, self.hold, correct) is not values
