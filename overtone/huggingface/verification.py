"""Is the attached loss really the one that the model computes? Asked once when attaching; `forward` asks in every step.

The question matters because the wrong answer is silent: transformers ignores an assignment on a wrapper, some forwards
compute cross-entropy themselves, and fused kernels replace the forward after the fact.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

WAY_OUT = (
    "pass compute_loss_func=overtone.huggingface.compute_loss_func(config) to the Trainer, or call "
    "overtone.huggingface.causal_lm_loss(outputs.logits, labels) on the outputs of a forward without labels"
)


def find_causal_lm(model: nn.Module) -> Any:
    """The outermost Hugging Face model within any wrappers: the one whose forward computes the loss."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a Hugging Face model or a wrapper around one, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise TypeError(
        f"model must hold a transformers.PreTrainedModel, got {type(model).__name__} without one; "
        "call overtone.overtone_loss(logits, labels) in its training loop"
    )


def refuse_unsupported_model(model: Any) -> None:
    """Raise a ValueError for a model whose loss is not that of next-token prediction, or is fused into its forward."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    name = type(model).__name__
    if PreTrainedModel.loss_function.fset is None:
        raise ValueError(
            f"model cannot be given a loss_function in transformers {transformers.__version__}: upgrade, or {WAY_OUT}"
        )
    default = LOSS_MAPPING.get(getattr(model, "loss_type", None), ForCausalLMLoss)
    if "_loss_function" not in model.__dict__ and default is not ForCausalLMLoss:
        raise ValueError(
            f"model must be a causal language model, got {name}, whose loss is {default.__name__}; call "
            "overtone.overtone_loss(logits, labels) on its logits, with labels aligned as that loss aligns them"
        )
    if culprit := bypassing_loss(model):
        raise ValueError(f"model must compute its own loss, got {name} with {culprit}, which bypasses it; {WAY_OUT}")


def verify_loss_is_called(model: Any, *, inside: nn.Module) -> None:
    """Raise a ValueError unless a forward of two tokens calls the model's loss_function; leave no trace of having run.

    Sharded parameters (DTensor, FSDP, ZeRO) would need every rank, and parameters on the meta device are not there
    yet: the guard in the first training step then stands in for this check.
    """
    if how_sharded_or_unloaded(inside):
        return
    called = False

    def probe(logits: Tensor, *_: Any, **__: Any) -> Tensor:
        nonlocal called
        called = True
        return logits.new_zeros(())

    run_on_two_tokens(model, probe)
    if not called:
        raise ValueError(
            f"model must compute its loss by self.loss_function, but the forward of {type(model).__name__} computes it "
            f"another way, so that attaching would change nothing; {WAY_OUT}"
        )


def run_on_two_tokens(model: Any, loss_function: Callable[..., Tensor]) -> None:
    """A forward with labels and that loss, which leaves no trace of having run; a ValueError if it fails."""
    device = model.get_input_embeddings().weight.device
    tokens = torch.zeros(1, 2, dtype=torch.long, device=device)
    with undisturbed(model), torch.no_grad():
        model.loss_function = loss_function
        try:
            model(input_ids=tokens, labels=tokens)
        except Exception as error:
            raise ValueError(
                f"model must take input_ids and labels, but {type(model).__name__} failed on two tokens "
                f"({type(error).__name__}: {error}); {WAY_OUT}"
            ) from error


def bypassing_loss(model: Any, kwargs: dict[str, Any] | None = None) -> str | None:
    """The name of a loss that a model's forward computes without its loss_function, if it is known to."""
    if kwargs and "fused_lm_head" in kwargs:
        return "TRL's fused LM head (SFTConfig loss_type 'nll', 'chunked_nll' and 'dft')"
    if can_be_asked_for_logits(model.forward):
        return None
    forward = inspect.unwrap(model.forward)
    # functools.wraps copies __module__, so the globals tell where a function was really written.
    written_in = getattr(forward, "__globals__", {}).get("__name__", "")
    if written_in.startswith("liger_kernel."):
        return "Liger's fused_linear_cross_entropy (use_liger_kernel=True)"
    if written_in.startswith("trl."):
        return "TRL's loss_type='chunked_nll'"
    return None


def can_be_asked_for_logits(forward: Callable[..., Any]) -> bool:
    """Whether a forward, Liger's, has a fused loss that it leaves for the model's loss_function if told to."""
    return "skip_logits" in getattr(getattr(forward, "__code__", None), "co_varnames", ())


def how_sharded_or_unloaded(model: nn.Module) -> str | None:
    """By what a model's parameters are not all here, or None."""
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.tensor import DTensor

        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            return "FSDP's FullyShardedDataParallel"
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            return "DTensor parameters (FSDP2, tensor parallelism)"
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return "DeepSpeed ZeRO-3"
    return "the meta device" if any(parameter.is_meta for parameter in model.parameters()) else None


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Evaluation mode, then everything as it was: each module's mode, the loss, the random number generators."""
    training = {module: module.training for module in model.modules()}
    replaced = model.__dict__.get("_loss_function")
    devices = {parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module, mode in training.items():
                module.training = mode
            if replaced is None:
                model.__dict__.pop("_loss_function", None)
            else:
                model.loss_function = replaced
