"""TRL's SFTTrainer with one forward pass a step, and the loss from the hidden states."""

from __future__ import annotations

from typing import Any

import torch

from overtone.cut_off import without_effect
from overtone.huggingface.fused_head import refuse_unfusable_model
from overtone.huggingface.holding import is_cut_off
from overtone.huggingface.loss import EvalLoss, causal_lm_loss_of_hidden, check_eval_loss
from overtone.huggingface.verification import find_causal_lm, how_sharded_or_unloaded
from overtone.huggingface.wrappers import for_virtual_tokens
from overtone.integrations.settings import Settings, read_settings, require


class OverToneMixin:
    """In front of SFTTrainer, whose metrics, packing, accumulation and router loss stay. Settings: `read_settings`."""

    def __init__(self, *, overtone: Settings = None, eval_loss: EvalLoss = "cross_entropy", **arguments: Any) -> None:
        self.overtone, self.eval_loss, self._is_held = read_settings(overtone), eval_loss, False
        check_eval_loss(eval_loss)
        require(arguments, compute_loss_func=None)
        super().__init__(**arguments)
        trainer: Any = self
        require(vars(trainer.args), loss_type="nll", label_smoothing_factor=0, torch_compile=False)
        if parallelism := trainer.accelerator.parallelism_config:
            require(vars(parallelism), cp_size=1, sp_size=1)
        refuse_unfusable_model(find_causal_lm(trainer.model), inside=trainer.model)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **others: Any) -> Any:
        """SFTTrainer's, which adds up the log-probabilities that the fused head returns: minus this loss, here."""
        parent: Any = super()
        if self.eval_loss == "cross_entropy" and not torch.is_grad_enabled():
            return parent.compute_loss(model, inputs, return_outputs, **others)
        require(inputs, loss_mask=None)
        if where := how_sharded_or_unloaded(model):
            raise ValueError(f"model must not be sharded, got one with {where}: pass compute_loss_func to SFTTrainer")
        causal_lm, sums = find_causal_lm(model), []

        def add_up(_: Any, __: Any, output: Any) -> None:  # inside the forward, where autocast is on
            hidden, head = output.last_hidden_state, causal_lm.get_output_embeddings()
            labels = for_virtual_tokens(inputs["labels"], hidden.shape[1], -100)
            sums.append(causal_lm_loss_of_hidden(hidden, head, labels, self.overtone, num_items_in_batch=1))
            self._is_held = self.overtone.hold is not None and is_cut_off(sums[0], hidden, head.weight, head.bias)

        def forward(**given: Any) -> Any:
            if "fused_lm_head" not in given:
                return model(**given)
            with causal_lm.base_model.register_forward_hook(add_up):
                outputs = model(**given)
            outputs.log_probs = -sums[0]
            return outputs

        result = parent.compute_loss(forward, inputs, return_outputs, **others)
        require({"fused_lm_head": bool(sums)}, fused_lm_head=True)  # which another parent may not ask the model for
        loss, *outputs = result if return_outputs else (result,)
        loss = without_effect(loss) if self._is_held else loss
        return (loss, *outputs) if return_outputs else loss
