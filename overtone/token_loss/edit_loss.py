"""The token loss of one edit, and whether the edit still needs anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from overtone.cut_off import without_effect
from overtone.functional import ground_truth_check
from overtone.hold import NEVER, Hold, is_settled

TokenLoss = Callable[[Tensor, Tensor], Tensor]
"""``(logits (N, V), labels (N,)) -> loss (N,)``, labels without ignored positions."""


@dataclass(frozen=True)
class EditLoss:
    """What an edit minimises in place of cross-entropy.

    Attributes:
        description: for the log.
        token_loss: one loss a token, before it is clipped.
        epsilon: in nats. A token that is further than this from its target counts with its loss; a closer one is
            settled: the constant epsilon, without a gradient.
        hold: when a step is held.
        distance: of each token from its target, in nats, which epsilon and hold are compared with; None: the token
            loss itself. For losses whose own value can be small where the label is still improbable.
    """

    description: str
    token_loss: TokenLoss
    epsilon: float = 0.0
    hold: Hold = NEVER
    distance: TokenLoss | None = None

    def __call__(self, logits: Tensor, labels: Tensor, *, may_hold: bool = True) -> tuple[Tensor, bool]:
        """The token losses, and whether the step is held, so that they are to have no effect.

        Args:
            logits: ``(N, V)``.
            labels: ``(N,)``, token ids, none ignored.
            may_hold: False while some of these tokens may turn out not to count.

        Returns:
            ``(N,)`` with its graph, and whether the step is held.

        Raises:
            ValueError: the loss did not return one value a token.
        """
        loss = self.token_loss(logits, labels)
        if not isinstance(loss, Tensor) or loss.shape != labels.shape:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"token_loss must return one loss a token, shape {tuple(labels.shape)} for logits "
                f"{tuple(logits.shape)}, got {got}: leave the reduction to the trainer"
            )
        may_hold = may_hold and bool(self.hold)
        if not (may_hold or self.epsilon > 0):
            return loss, False
        with torch.no_grad():
            distance = loss if self.distance is None else self.distance(logits, labels)
            correct = ground_truth_check(logits, labels) if self.hold.correct else None
        if self.epsilon > 0:
            loss = torch.where(is_settled(distance, self.epsilon, correct), self.epsilon, loss)
        if not may_hold:
            return loss, False
        return loss, loss.requires_grad and self.hold.is_met_here(distance, self.epsilon, correct)

    def mean(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean over the tokens, 0 if there is none; of a held step cut off from the model.

        `backward()` works on either, but a held step leaves every `.grad` as it was: after ``zero_grad()`` they all are
        None, an optimiser skips its step, and a loop can end.
        """
        loss, held = self(logits, labels)
        mean = loss.sum() / max(len(labels), 1)
        return without_effect(mean) if held else mean
