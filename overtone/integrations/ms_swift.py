"""ms-swift: a loss for `swift sft --external_plugins plugin.py --loss_type overtone`. Run with ms-swift 4.6.0.

from overtone.integrations.ms_swift import register   # all of plugin.py
register("overtone:lam=0.5+hold=settled")
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from overtone.config import OverToneConfig
from overtone.huggingface.holding import is_cut_off
from overtone.huggingface.loss import CROSS_ENTROPY, causal_lm_loss
from overtone.integrations.settings import Settings, read_settings, require


def register(settings: Settings = None, *, name: str = "overtone") -> None:
    """Give ms-swift's `--loss_type` a name that means this loss; for the settings see `read_settings`."""
    config = read_settings(settings)
    from swift.loss import loss_map

    loss_map[name] = partial(SwiftLoss, config)


class SwiftLoss:
    """What ms-swift makes of a loss_type and calls in each step; while gradients are disabled it is cross-entropy."""

    def __init__(self, config: OverToneConfig, args: Any, trainer: Any) -> None:
        require(vars(args), label_smoothing_factor=0, enable_dft_loss=False)
        require(vars(trainer.template), sequence_parallel_size=1, task_type="causal_lm")
        self.config = config

    def __call__(
        self,
        outputs: Any,
        labels: Tensor,
        *,
        num_items_in_batch: int | Tensor | None = None,
        loss_scale: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """The loss of outputs.logits (batch, sequence, V); labels are not shifted yet, loss_scale (flat) is."""
        next_tokens = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        count = (next_tokens != -100).sum() if num_items_in_batch is None else num_items_in_batch
        weights = None if loss_scale is None else loss_scale.view_as(labels)
        config = self.config if torch.is_grad_enabled() else CROSS_ENTROPY
        loss = causal_lm_loss(
            outputs.logits, None, config, shift_labels=next_tokens, loss_mask=weights, num_items_in_batch=count
        )
        if config.hold is not None and is_cut_off(loss, outputs.logits) and "aux_loss" in outputs:
            outputs["aux_loss"] = outputs["aux_loss"].detach()  # which the trainer adds
        return loss
