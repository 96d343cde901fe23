"""What `attach` puts where a model keeps its loss function."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from overtone.anchor import Anchors
from overtone.config import OverToneConfig
from overtone.huggingface.calls import Calls
from overtone.huggingface.fused_head import FusedHead
from overtone.huggingface.holding import is_cut_off, resharding
from overtone.huggingface.loss import (
    CROSS_ENTROPY,
    EvalLoss,
    Observer,
    causal_lm_loss,
    causal_lm_loss_of_hidden,
)
from overtone.huggingface.reference import Reference, record_anchors

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, eq=False)
class AttachedLoss:
    """Callable as transformers' `ForCausalLMLoss`, and picklable with the model, as a closure is not.

    (A module would be ignored by transformers.)
    """

    config: OverToneConfig
    observer: Observer | None
    calls: Calls
    fused_head: FusedHead | None
    eval_loss: EvalLoss
    hold_group: ProcessGroup | None
    reference: Reference | None = None
    anchor_top_k: int | None = None

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int | None = None,
        num_items_in_batch: int | Tensor | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """The loss of the logits, or of the hidden states that the forward has kept in their place."""
        arguments: dict[str, Any] = {
            "num_items_in_batch": num_items_in_batch,
            "shift_labels": shift_labels,
            "loss_mask": loss_mask,
            "ignore_index": ignore_index,
            "hold_group": self.hold_group,
        }
        is_evaluation = self.eval_loss == "cross_entropy" and not torch.is_grad_enabled()
        config = CROSS_ENTROPY if is_evaluation else self.config
        diverted = None if self.fused_head is None else self.fused_head.take(logits)
        if config.anchor and not (labels is None and shift_labels is None):
            like = logits if diverted is None else diverted[0]
            # What a fused head returns has no rows, but the vocabulary's columns.
            arguments["anchors"] = self._anchors(
                labels, shift_labels, ignore_index, like, logits.shape[-1], fused=diverted is not None
            )
            if num_items_in_batch is not None:
                _warn_without_targets(shift_labels if labels is None else labels, ignore_index)
        if diverted is None:
            with resharding(config.hold):
                loss = causal_lm_loss(logits, labels, config, observer=self.observer, **arguments)
            sources: tuple[Tensor | None, ...] = (logits,)
        else:
            hidden, head = diverted
            loss = causal_lm_loss_of_hidden(hidden, head, labels, config, **arguments)
            sources = hidden, head.weight, head.bias
        # Outside of a forward, someone has called the function directly: that vouches for no forward.
        if (call := self.calls.current) is not None:
            call.has_asked = True
            if config.hold is not None:
                call.is_held |= is_cut_off(loss, *sources)
        return loss

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _anchors(
        self,
        labels: Tensor | None,
        shift_labels: Tensor | None,
        ignore_index: int,
        like: Tensor,
        vocabulary: int,
        *,
        fused: bool,
    ) -> tuple[Anchors, ...]:
        """Recorded from the unedited model on the batch of the running forward."""
        batch = None if self.calls.current is None else self.calls.current.batch
        if batch is None or self.reference is None:
            raise ValueError("the anchor of an attached loss needs the model's own forward: call the model with labels")
        return record_anchors(
            self.reference,
            batch,
            labels,
            shift_labels,
            ignore_index=ignore_index,
            top_k=self.anchor_top_k,
            like=like,
            vocabulary=vocabulary,
            fused_head=self.fused_head if fused else None,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> AttachedLoss:
        """With the same observer and reference, as a function would have: a copy of the model reports to it too."""
        calls, fused_head = copy.deepcopy((self.calls, self.fused_head), memo)
        return dataclasses.replace(self, calls=calls, fused_head=fused_head)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _warn_without_targets(labels: Tensor | None, ignore_index: int) -> None:
    """An anchored term counts with its micro-batch's share of the step's label tokens, which is then 0."""
    if labels is not None and not (labels != ignore_index).any():
        warnings.warn(
            "the anchor counts nothing in a micro-batch without a target, whose share of the step's label tokens is 0: "
            "put a row with a target into each",
            stacklevel=2,
        )
