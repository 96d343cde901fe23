"""The token loss of one edit, and whether the edit still needs anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from overtone.functional import ground_truth_check
from overtone.hold import is_settled, read_hold, refuse_hold_when_distributed, release_when_held, replace_old_names

TokenLoss = Callable[[Tensor, Tensor], Tensor]
"""``(logits (N, V), labels (N,)) -> loss (N,)``, labels without ignored positions."""


@dataclass(frozen=True)
class EditLoss:
    """What a trainer minimises in place of cross-entropy.

    A held step reports exactly 0 for every token: the trainer sees the paper's values while there is something to
    learn, and a loss that satisfies its own stopping rule (FT-M's 1e-2, WISE's meter) once there is not.

    Attributes:
        description: for the log.
        token_loss: one loss a token, before it is clipped.
        settled_below: a token whose loss is below it is settled: a constant, without a gradient.
        hold: as `overtone.overtone_loss`'s hold_settled.
        hold_correct: as there.
    """

    description: str
    token_loss: TokenLoss
    settled_below: float = 0.0
    hold: bool | float = False
    hold_correct: bool = False

    def __call__(self, logits: Tensor, labels: Tensor, *, may_hold: bool = True) -> tuple[Tensor, bool]:
        """Values ``(N,)`` with their graph, and whether this step is held (the values are then to be dropped).

        Raises:
            ValueError: if the loss did not return one value a token.
        """
        unclipped = self.token_loss(logits, labels)
        if not isinstance(unclipped, Tensor) or unclipped.shape != labels.shape:
            got = tuple(unclipped.shape) if isinstance(unclipped, Tensor) else type(unclipped).__name__
            raise ValueError(
                f"token_loss must return one loss a token, shape {tuple(labels.shape)} for logits "
                f"{tuple(logits.shape)}, got {got}: leave the reduction to the trainer"
            )
        may_hold = may_hold and self.hold is not False
        waits = self.hold_correct and (may_hold or self.settled_below > 0)
        correct = ground_truth_check(logits.detach(), labels) if waits else None
        values = self._clipped(unclipped, correct)
        if not may_hold:
            return values, False
        hold = read_hold(replace_old_names(None, {"hold_settled": self.hold, "hold_correct": self.hold_correct}))
        refuse_hold_when_distributed(hold)
        held = release_when_held(values, unclipped.detach(), self.settled_below, hold, correct) is not values
        return values, held

    def _clipped(self, unclipped: Tensor, correct: Tensor | None) -> Tensor:
        if self.settled_below == 0:
            return unclipped
        return torch.where(is_settled(unclipped, self.settled_below, correct), self.settled_below, unclipped)
