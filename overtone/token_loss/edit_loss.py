"""The token loss of one edit, and whether the edit still needs anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from overtone.anchor import Anchors
from overtone.anchored import AnchoredTerm, anchored_rows, anchored_term
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
        anchor: the weight of the anchored term: how far the anchored positions have moved from the unedited model. 0
            for none.
        anchor_epsilon: in nats, what epsilon is for the tokens: an anchored position that has moved by less is let go.
    """

    description: str
    token_loss: TokenLoss
    epsilon: float = 0.0
    hold: Hold = NEVER
    distance: TokenLoss | None = None
    anchor: float = 0.0
    anchor_epsilon: float = 0.05

    def anchored(self, logits: Tensor, groups: Sequence[Anchors]) -> tuple[Tensor, AnchoredTerm]:
        """What a step says of what must stay.

        Args:
            logits: ``(N, V)``, of all positions.
            groups: positions among these, with the unedited model's distributions there; each has a mean of its own.

        Returns:
            The logits to compute the targets' losses from, and the term that `__call__` takes.

        Raises:
            ValueError: no groups.
        """
        logits, term = anchored_term(logits, anchored_rows(tuple(groups), self.anchor, self.anchor_epsilon, "mean"))
        if term is None:
            raise ValueError("groups must hold Anchors, got none: nothing to keep is one without positions")
        return logits, term

    def __call__(
        self, logits: Tensor, labels: Tensor, *, may_hold: bool = True, anchored: AnchoredTerm | None = None
    ) -> tuple[Tensor, bool]:
        """The token losses, and whether the step is held, so that they are to have no effect.

        Args:
            logits: ``(N, V)``.
            labels: ``(N,)``, token ids, none ignored.
            may_hold: False while some of these tokens may turn out not to count.
            anchored: from `anchored`, where there is an anchor. It is added to every token's loss, so that it counts
                once in their mean, and the step is not held while a group of anchors has moved.

        Returns:
            ``(N,)`` with its graph, and whether the step is held.

        Raises:
            ValueError: the loss did not return one value a token, or has an anchor but got no term of it.
        """
        if self.anchor > 0 and anchored is None:
            raise ValueError(
                f"anchor={self.anchor:g} is not used here, where the loss sees target tokens alone: leave it out"
            )
        loss = self.token_loss(logits, labels)
        if not isinstance(loss, Tensor) or loss.shape != labels.shape:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"token_loss must return one loss a token, shape {tuple(labels.shape)} for logits "
                f"{tuple(logits.shape)}, got {got}: leave the reduction to the trainer"
            )
        may_hold = may_hold and bool(self.hold)
        if not (may_hold or self.epsilon > 0):
            return loss if anchored is None else loss + anchored.loss, False
        with torch.no_grad():
            distance = loss if self.distance is None else self.distance(logits, labels)
            correct = ground_truth_check(logits, labels) if self.hold.correct else None
        if self.epsilon > 0:
            loss = torch.where(is_settled(distance, self.epsilon, correct), self.epsilon, loss)
        moved = None
        if anchored is not None:
            loss, moved = loss + anchored.loss, anchored.moved
        if not may_hold:
            return loss, False
        return loss, loss.requires_grad and self.hold.is_met_here(distance, self.epsilon, correct, moved)

    def mean(self, logits: Tensor, labels: Tensor, *, anchored: AnchoredTerm | None = None) -> Tensor:
        """The mean over the tokens, 0 if there is none; of a held step cut off from the model.

        `backward()` works on either, but a held step leaves every `.grad` as it was: after ``zero_grad()`` they all are
        None, an optimiser skips its step, and a loop can end.
        """
        loss, held = self(logits, labels, anchored=anchored)
        mean = loss.sum() / max(len(labels), 1)
        return without_effect(mean) if held else mean
