"""Are a model's labels shifted before they meet its logits? A causal language model's are, a classifier's are not.

Nothing in a batch tells the two apart, and neither does a class's name (transformers' BartForCausalLM does not shift).
So a model is asked: its own loss on a few tokens is the cross-entropy of its own logits one way or the other.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from overtone.huggingface.verification import find_causal_lm, how_sharded_or_unloaded, undisturbed

_BY_OUTPUT = {
    "CausalLMOutput": True,
    "CausalLMOutputWithPast": True,
    "MoeCausalLMOutputWithPast": True,
    "MaskedLMOutput": False,
    "TokenClassifierOutput": False,
    "Seq2SeqLMOutput": False,
    "Seq2SeqMoEOutput": False,
}
"""Whether labels are shifted, for the classes of outputs that no two kinds of models share."""

_TOKENS = (0, 1, 1, 0, 1, 0, 0, 1)
"""Labels that a classifier of two classes has, too."""


def labels_are_shifted(outputs: Any, model: nn.Module | None) -> bool:
    """Whether position t of the labels belongs to the logits at t - 1.

    Args:
        outputs: what the model returned for a batch, logits ``(batch, sequence, V)``.
        model: the model, bare or wrapped, if it is known.

    Raises:
        ValueError: if neither says.
    """
    causal_lm = None
    if model is not None and any(hasattr(module, "loss_type") for module in model.modules()):
        causal_lm = find_causal_lm(model)
        answer = _by_loss_function(causal_lm) if how_sharded_or_unloaded(model) else _by_trial(causal_lm)
    else:
        answer = _BY_OUTPUT.get(type(outputs).__name__)
    if answer is not None:
        return answer
    if causal_lm is None:
        raise ValueError(
            f"outputs must say whether the labels are shifted, and {type(outputs).__name__} does not: pass "
            "compute_loss_func(config, model=model), or call overtone.overtone_loss(logits, labels) on aligned labels"
        )
    raise ValueError(
        f"model must align its labels with its logits in a known way, but the loss of {type(causal_lm).__name__} on a "
        "few tokens is the cross-entropy of neither the next tokens nor the same ones; call "
        "overtone.overtone_loss(logits, labels), with labels aligned as that model aligns them"
    )


def _by_trial(model: Any) -> bool | None:
    tokens = torch.tensor([_TOKENS], device=model.get_input_embeddings().weight.device)
    with undisturbed(model), torch.no_grad():
        model.__dict__.pop("_loss_function", None)
        try:
            outputs = model(input_ids=tokens, labels=tokens, return_dict=True)
            logits, loss = outputs.logits.float(), float(outputs.loss)
        except Exception:
            return _by_loss_function(model)
    if logits.shape[:-1] != tokens.shape:
        return _by_loss_function(model)
    tokens = tokens.to(logits.device)
    off_shifted = abs(loss - _mean_loss(logits[:, :-1], tokens[:, 1:]))
    off_aligned = abs(loss - _mean_loss(logits, tokens))
    for answer, off, other in ((True, off_shifted, off_aligned), (False, off_aligned, off_shifted)):
        if off <= 0.1 * other and off <= 0.01 * (1 + abs(loss)):
            return answer
    return _by_loss_function(model)


def _mean_loss(logits: Tensor, labels: Tensor) -> float:
    return float(cross_entropy(logits.flatten(0, 1), labels.flatten()))


def _by_loss_function(model: Any) -> bool | None:
    """For a model that cannot be tried out, or adds other terms: by the loss function that its forward asks."""
    forward = inspect.unwrap(type(model).forward)
    if "loss_function" not in forward.__code__.co_names:
        return None
    default = LOSS_MAPPING.get(getattr(model, "loss_type", None), ForCausalLMLoss)
    return {"ForCausalLMLoss": True, "ForMaskedLMLoss": False, "ForTokenClassification": False}.get(default.__name__)
