"""The loss for a Trainer, which hands over a model's outputs and the labels."""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from overtone.checks import check_number
from overtone.config import OverToneConfig, checked_config
from overtone.cut_off import without_effect
from overtone.hold import check_hold_group
from overtone.huggingface.alignment import labels_are_shifted
from overtone.huggingface.holding import is_cut_off, let_shards_go, resharding
from overtone.huggingface.loss import (
    CROSS_ENTROPY,
    EvalLoss,
    Observer,
    causal_lm_loss,
    check_eval_loss,
    check_observer,
)
from overtone.huggingface.trainers import calling_trainer, items_that_count, smooths_labels
from overtone.huggingface.wrappers import (
    added_loss,
    for_virtual_tokens,
    is_of_peft,
    refuse_replaced_loss,
    virtual_tokens,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger(__name__)


def compute_loss_func(
    config: OverToneConfig | None = None,
    *,
    model: nn.Module | None = None,
    router_aux_loss_coef: float | None = None,
    observer: Observer | None = None,
    eval_loss: EvalLoss = "cross_entropy",
    hold_group: ProcessGroup | None = None,
) -> ComputeLoss:
    """A loss for ``Trainer(compute_loss_func=...)`` and ``SFTTrainer(compute_loss_func=...)``.

    Labels are shifted for causal language models, and stay as they are for classifiers, masked language models and
    encoder-decoders: the model says which, by its own loss on a few tokens.

    Args:
        config: the settings of the loss; None for the defaults. With a hold, train in bf16 or float32: in a held step
            under fp16=True on a GPU torch's gradient scaler raises an AssertionError, since it finds no gradients.
        model: the model whose outputs they will be, bare or wrapped. In a Trainer it need not be given; in a loop of
            your own it must, where the class of the outputs does not say whether labels are shifted.
        router_aux_loss_coef: weight of the auxiliary loss of a mixture-of-experts model, which the trainer leaves to
            this function: ``model.config.router_aux_loss_coef``. Needed as soon as the model returns one. A held step
            holds it too.
        observer: as for `causal_lm_loss`; ``TokenStatesCallback(...).observe``, say.
        eval_loss: what the loss is while gradients are disabled: "cross_entropy" or "overtone", which training without
            gradients needs (MeZO).
        hold_group: the ranks of torch.distributed that hold together, all or none, each of which has to make the call;
            None for all there are.

    Returns:
        ``(outputs, labels, num_items_in_batch=None) -> loss``. In a Trainer a column ``loss_mask`` of the batch weighs
        the tokens, as in `causal_lm_loss`. It raises a ValueError for outputs without logits or of unknown alignment,
        with an auxiliary loss that has no weight, for a model in a PEFT tuner that has a loss of its own, and for
        label_smoothing_factor.

    Raises:
        ValueError, TypeError: for a config with an anchor, which needs `attach`; an unknown eval_loss; a negative or
            non-finite router_aux_loss_coef; an argument of another type.
    """
    config = checked_config(config)
    if config.anchor:
        raise ValueError(
            f"anchor must be 0 in compute_loss_func, got {config.anchor}: a function of outputs and labels has no "
            "unedited model; use overtone.huggingface.attach(model, config, reference=...) in its place"
        )
    check_eval_loss(eval_loss)
    check_observer(observer)
    check_hold_group(hold_group)
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or None, got {model!r} of type {type(model).__name__}")
    if router_aux_loss_coef is not None:
        expected = "a finite number, 0 or above, or None"
        check_number("router_aux_loss_coef", router_aux_loss_coef, expected, lambda value: value >= 0)
    logger.info(
        "compute_loss_func is OverTone while gradients are enabled, and %s otherwise (eval_loss=%r)",
        "cross-entropy" if eval_loss == "cross_entropy" else "OverTone too",
        eval_loss,
    )
    return ComputeLoss(config, model, router_aux_loss_coef, observer, eval_loss, hold_group)


class ComputeLoss:
    """What `compute_loss_func` returns."""

    def __init__(
        self,
        config: OverToneConfig,
        model: nn.Module | None,
        router_aux_loss_coef: float | None,
        observer: Observer | None,
        eval_loss: EvalLoss,
        hold_group: ProcessGroup | None,
    ) -> None:
        self.config = config
        self.model = model
        self.router_aux_loss_coef = router_aux_loss_coef
        self.observer = observer
        self.eval_loss = eval_loss
        self.hold_group = hold_group
        self._shifted: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: int | Tensor | None = None) -> Tensor:
        """The loss of a model's outputs."""
        model, loss_mask = self.model, None
        if found := calling_trainer("compute_loss"):
            trainer, variables = found
            if problem := smooths_labels(trainer):
                raise ValueError(f"{problem}; pass label_smoothing_factor=0")
            model, loss_mask = model or trainer.model, variables["inputs"].get("loss_mask")
        if model is not None:
            _refuse_losses_of_wrappers(model)
        logits, auxiliary = self._parts(outputs)
        is_evaluation = self.eval_loss == "cross_entropy" and not torch.is_grad_enabled()
        config = CROSS_ENTROPY if is_evaluation else self.config
        num_items_in_batch = items_that_count(num_items_in_batch, {"labels": labels, "loss_mask": loss_mask})
        given: dict[str, Any] = {"labels": labels, "loss_mask": loss_mask}
        if labels is not None and logits.dim() > 2:
            if model is not None:
                given = _lengthened(given, virtual_tokens(model), logits.shape[-2])
            elif labels.shape[-1] < logits.shape[-2]:
                raise ValueError(
                    f"labels must be as many as the logits, got {tuple(labels.shape)} for {tuple(logits.shape)}: where "
                    "virtual tokens (prompt tuning) lengthen the logits, pass compute_loss_func(config, model=model)"
                )
            if not self._labels_are_shifted(outputs, model):
                given = {"labels": None, "shift_labels": given["labels"], "loss_mask": given["loss_mask"]}
        elif labels is not None:
            _refuse_no_classes(logits)
            given = {"labels": None, "shift_labels": labels, "loss_mask": loss_mask}
        with resharding(None if model is None else config.hold):
            loss = causal_lm_loss(
                logits,
                config=config,
                num_items_in_batch=num_items_in_batch,
                observer=self.observer,
                hold_group=self.hold_group,
                **given,
            )
        is_held = config.hold is not None and is_cut_off(loss, logits)
        if is_held and model is not None:
            let_shards_go(model.modules())
        if auxiliary is None:
            return loss
        total = loss + auxiliary.to(loss.device)
        return without_effect(total) if is_held else total

    def __getstate__(self) -> dict[str, Any]:
        """For the processes that a launcher spawns: without what was learned about models of this one."""
        return {**self.__dict__, "_shifted": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """With nothing learned."""
        self.__dict__.update(state, _shifted=weakref.WeakKeyDictionary())

    def _parts(self, outputs: Any) -> tuple[Tensor, Tensor | None]:
        """The logits, and the weighted auxiliary loss if there is one."""
        if isinstance(outputs, (tuple, list)):
            outputs = {"logits": outputs[0]} if outputs else {}
        elif not isinstance(outputs, dict):
            raise TypeError(
                f"outputs must be what a model returns, with logits by name or first, got {type(outputs).__name__}"
            )
        logits = outputs.get("logits")
        if logits is None:
            raise ValueError(
                "outputs must hold logits, got none: a fused loss (Liger's fused_linear_cross_entropy, TRL's "
                "loss_type='chunked_nll') never builds them; pass use_liger_kernel=False and loss_type='nll'"
            )
        auxiliary: Tensor | None = outputs.get("aux_loss")
        if auxiliary is None:
            return logits, None
        if self.router_aux_loss_coef is None:
            raise ValueError(
                "router_aux_loss_coef must be given: the model returns an auxiliary loss (aux_loss), and the trainer "
                "leaves it to compute_loss_func; pass router_aux_loss_coef=model.config.router_aux_loss_coef, or 0"
            )
        return logits, self.router_aux_loss_coef * auxiliary

    def _labels_are_shifted(self, outputs: Any, model: nn.Module | None) -> bool:
        if model is None:
            return labels_are_shifted(outputs, None)
        if model not in self._shifted:
            self._shifted[model] = labels_are_shifted(outputs, model)
        return self._shifted[model]


def _refuse_losses_of_wrappers(model: nn.Module) -> None:
    for module in model.modules():
        if not is_of_peft(module):
            continue
        refuse_replaced_loss(module)
        if culprit := added_loss(module):
            raise ValueError(
                f"compute_loss_func cannot train with {culprit}, which PEFT adds only to a loss that the model itself "
                "computes; use overtone.huggingface.attach(model, config) in its place"
            )


def _lengthened(given: dict[str, Any], added: int, length: int) -> dict[str, Any]:
    """Labels and mask for logits that begin with those of virtual tokens."""
    fills = {"labels": -100, "loss_mask": 0}
    return {
        name: for_virtual_tokens(values, length, fills[name])
        if isinstance(values, Tensor) and values.shape[-1] + added == length
        else values
        for name, values in given.items()
    }


def _refuse_no_classes(logits: Tensor) -> None:
    if logits.shape[-1] == 1:
        raise ValueError(f"logits must be of two classes or more, got shape {tuple(logits.shape)}: a regression")
