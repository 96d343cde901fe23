"""What `attach` puts where a model keeps its loss function."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

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

    def __deepcopy__(self, memo: dict[int, Any]) -> AttachedLoss:
        """With the same observer, as a function would have: a copy of the model reports to it too."""
        calls, fused_head = copy.deepcopy((self.calls, self.fused_head), memo)
        return AttachedLoss(self.config, self.observer, calls, fused_head, self.eval_loss, self.hold_group)
