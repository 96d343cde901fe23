"""An edit whose prompt must stay as the model continued it before: what an anchored loss sees of the edit's texts."""

from __future__ import annotations

import torch
from torch import Tensor

from overtone.anchor import Anchors
from overtone.anchored import AnchoredTerm
from overtone.lab.model.positions import Text
from overtone.lab.model.targets import IGNORE_INDEX, TargetBatch
from overtone.token_loss import EditLoss


class AnchoredTexts:
    """The texts of one edit, with the positions of their prompts beside those that predict target tokens.

    A prompt's positions are those of all its tokens but a BOS and its last, which predicts the target and belongs to
    it: the rule of `overtone.easyedit`. The model before the edit is the one that the first step sees.

    Attributes:
        texts: without padding.
        is_target: (P,), bool, which of their positions predict target tokens.
        labels: (N,), these tokens.
    """

    def __init__(self, batch: TargetBatch, bos_token_id: int | None) -> None:
        """Find the positions."""
        self.texts: list[Text] = []
        is_target = []
        lengths = batch.attention_mask.sum(dim=1).tolist()
        for ids, labels, length in zip(batch.input_ids, batch.labels, lengths, strict=True):
            predicts_target = labels[1:length] != IGNORE_INDEX
            positions = (predicts_target | (ids[: length - 1] != bos_token_id)).nonzero().squeeze(1)
            self.texts.append(Text(ids[:length], positions))
            is_target.append(predicts_target[positions])
        self.is_target = torch.cat(is_target)
        self.labels = batch.labels[batch.labels != IGNORE_INDEX]
        self._before: Anchors | None = None

    def read(self, loss: EditLoss, logits: Tensor) -> tuple[Tensor, Tensor, AnchoredTerm]:
        """The logits (N, V) of the target tokens, these tokens (N,), and how far the prompts have moved.

        Args:
            loss: with an anchor.
            logits: (P, V), at the positions of the texts, text after text.
        """
        if self._before is None:
            self._before = Anchors.record(logits, ~self.is_target)
        logits, moved = loss.anchored(logits, [self._before])
        return logits[self.is_target], self.labels, moved

    def mean(self, loss: EditLoss, logits: Tensor) -> Tensor:
        """`EditLoss.mean` of a step; arguments as of `read`."""
        target_logits, labels, moved = self.read(loss, logits)
        return loss.mean(target_logits, labels, anchored=moved)
