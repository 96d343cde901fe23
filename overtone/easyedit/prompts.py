"""What an anchored loss keeps: the tokens of an edit's own prompt, as the model continued them before the edit.

Trainers hand over logits and labels, and no more. Which tokens of a text are real, and which of them lead to its
target, is seen in what their model is asked.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from overtone.anchor import Anchors
from overtone.anchored import AnchoredTerm
from overtone.easyedit.innermost import innermost
from overtone.easyedit.patching import Patches
from overtone.token_loss import EditLoss


class Prompts:
    """The prompts of one running edit.

    A prompt's positions are those of its real tokens, but for a BOS, and for its last token, which predicts the target
    and belongs to it. The model before the edit is the one that the first pass over a text sees: trainers start at the
    weights that they find.
    """

    def __init__(self, loss: EditLoss, bos_token_id: int | None) -> None:
        self._loss = loss
        self._bos_token_id = bos_token_id
        self._input_ids: Tensor | None = None
        self._is_real: Tensor | None = None
        self._before: dict[bytes, Anchors] = {}

    def watch(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A forward method that notes what it is asked."""
        signature = inspect.signature(forward)

        @functools.wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            asked = signature.bind_partial(*args, **kwargs).arguments
            self._input_ids, mask = asked.get("input_ids"), asked.get("attention_mask")
            if self._input_ids is not None:
                self._is_real = torch.ones_like(self._input_ids).bool() if mask is None else mask.bool()
            return forward(*args, **kwargs)

        return watched

    def anchored(self, logits: Tensor, is_target: Tensor | None) -> tuple[Tensor, AnchoredTerm]:
        """How far the prompts of the last forward pass have moved.

        Args:
            logits: ``(N, V)``, of all positions of its texts, or of all but the last of each of its first texts.
            is_target: ``(N,)``, the positions that predict a target token; None while that is not known, at the first
                pass over a text, where nothing has moved.

        Returns:
            As of `EditLoss.anchored`.
        """
        candidates = self._are_words(len(logits)).to(logits.device)
        assert self._input_ids is not None
        text = self._input_ids.cpu().numpy().tobytes()
        if text not in self._before:
            self._before[text] = Anchors.record(logits, candidates.reshape(-1))
        before = self._before[text]
        if is_target is None:
            floor = self._loss.anchor * self._loss.anchor_epsilon
            return logits, AnchoredTerm(before.log_probs.new_tensor(floor), before.log_probs.new_zeros(()))
        rows = is_target.reshape(candidates.shape)
        precedes_target = (rows.cumsum(dim=1) == 0) & rows.any(dim=1, keepdim=True)
        at = candidates & precedes_target
        prompt = Anchors(at.reshape(-1), before.log_probs[at[candidates]])
        return self._loss.anchored(logits, [prompt])

    def _are_words(self, count: int) -> Tensor:
        """``(texts, positions)``, bool: the real tokens that are no BOS, at this many positions together."""
        if self._input_ids is None or self._is_real is None:
            raise ValueError("anchor needs the input_ids of the model's forward pass, and it got none: leave it out")
        texts, length = self._input_ids.shape
        if count < texts * length:
            texts, length = count // max(length - 1, 1), length - 1
        if texts * length != count or texts > len(self._input_ids):
            raise ValueError(
                f"anchor needs the logits of whole texts, {len(self._input_ids)} of {self._input_ids.shape[1]} tokens, "
                f"and got {count} positions: leave it out"
            )
        words = self._is_real
        if self._bos_token_id is not None:
            words = words & (self._input_ids != self._bos_token_id)
        return words[:texts, :length]


@contextmanager
def prompts_of(model: nn.Module, loss: EditLoss) -> Iterator[Prompts | None]:
    """The prompts that this model is asked inside the block; None for a loss without an anchor."""
    if loss.anchor == 0:
        yield None
        return
    base: Any = innermost(model)
    config = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    prompts = Prompts(loss, getattr(config, "bos_token_id", None))
    patches = Patches()
    patches.attribute(base, "forward", prompts.watch(base.forward))
    try:
        yield prompts
    finally:
        patches.undo()
