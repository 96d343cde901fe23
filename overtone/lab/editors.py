"""FT-M and LoRA as short loops that take any token loss.

An editing method opens a few weights of a model for training and, when its context ends, leaves the model as it found
it, bit for bit. Inside the context `fit` moves these weights towards one edit or, called again, towards the next.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from overtone.lab.batching import TargetBatch, target_logits
from overtone.lab.losses import TokenLoss
from overtone.lab.registry import look_up


@dataclass(frozen=True)
class FitTrace:
    """How one edit went.

    Attributes:
        losses: the token loss before each update, and the one at which the edit was held or stopped.
        steps: optimiser steps taken.
        ended: "steps" (all were taken), "stopped" (the loss fell below `stop_below`) or "held" (the loss asked for no
            further change).
        seconds: wall-clock time.
    """

    losses: tuple[float, ...]
    steps: int
    ended: str
    seconds: float


def fit(
    model: Any,
    parameters: list[nn.Parameter],
    batch: TargetBatch,
    token_loss: TokenLoss,
    *,
    steps: int,
    lr: float,
    stop_below: float | None = None,
    observe: Callable[[int], None] | None = None,
) -> FitTrace:
    """Fit the batch's target tokens with Adam, all of them in every step.

    Args:
        model: a Hugging Face causal language model.
        parameters: the weights to move, as an editing method opens them.
        batch: the edit's prompts and targets.
        token_loss: logits (N, V) and labels (N,) to a scalar.
        steps: optimiser steps at most.
        lr: Adam's learning rate.
        stop_below: stop before a step once the loss is below this value.
        observe: called with the number of steps taken so far, before every step.

    Raises:
        RuntimeError: the loss is NaN or infinite.
    """
    start = time.perf_counter()
    optimizer = torch.optim.Adam(parameters, lr=lr)
    losses: list[float] = []
    ended = "steps"
    for step in range(steps):
        if observe is not None:
            observe(step)
        optimizer.zero_grad()
        loss = token_loss(*target_logits(model, batch))
        losses.append(loss.item())
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss is {losses[-1]} after {step} steps with lr={lr}: lower lr")
        if stop_below is not None and losses[-1] < stop_below:
            ended = "stopped"
            break
        loss.backward()
        if all(parameter.grad is None for parameter in parameters):
            # No gradient, so Adam would leave every weight where it is; the next forward pass would be this one
            # again, with the same answer. Nothing can change any more.
            ended = "held"
            break
        optimizer.step()
    optimizer.zero_grad()
    taken = len(losses) if ended == "steps" else len(losses) - 1
    return FitTrace(tuple(losses), taken, ended, time.perf_counter() - start)


@contextmanager
def open_down_projection(model: Any, *, layer: int | None = None) -> Iterator[list[nn.Parameter]]:
    """FT-M: open one MLP's down-projection weight for training; restore it at the end.

    Args:
        model: a causal language model with `mlp.down_proj` (LLaMA, Qwen2, Mistral) or `mlp.c_proj` (GPT-2).
        layer: which block; None: two thirds up the model, where EasyEdit edits LLaMA 2 (21 of 32).

    Raises:
        ValueError: the model has no such weight, or not so many layers.
    """
    weight = _down_projection(model, layer)
    saved = weight.detach().clone()
    with frozen(model):
        weight.requires_grad_(True)
        try:
            yield [weight]
        finally:
            weight.grad = None
            with torch.no_grad():
                weight.copy_(saved)


@contextmanager
def open_lora(model: Any, *, rank: int = 8, alpha: int = 32, seed: int = 0) -> Iterator[list[nn.Parameter]]:
    """LoRA: put PEFT adapters on the query and value projections; take them off at the end.

    Args:
        model: a causal language model with `q_proj` and `v_proj`, or GPT-2's joint `c_attn`.
        rank: of the adapters.
        alpha: the adapters' output is scaled by alpha / rank.
        seed: of the adapters' random half; the global random state is left alone.

    Raises:
        ImportError: PEFT is not there.
        ValueError: the model has neither kind of projection.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError('the lab needs PEFT: pip install "overtone[lab]"') from error

    joint = any(name.endswith(".c_attn") for name, _ in model.named_modules())
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=["c_attn"] if joint else ["q_proj", "v_proj"],
        fan_in_fan_out=joint,
    )
    with frozen(model):
        with torch.random.fork_rng(), warnings.catch_warnings():
            # PEFT asks transformers for an attribute that transformers has renamed.
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            torch.manual_seed(seed)
            adapted = get_peft_model(model, config)
        adapted.eval()
        try:
            yield [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        finally:
            adapted.unload()
            # Older versions of PEFT leave their configuration on the model.
            vars(model).pop("peft_config", None)


@dataclass(frozen=True)
class EditingMethod:
    """An editing method and the optimiser settings that every loss gets alike.

    Attributes:
        name: the key in `METHODS`, which is also the name of the paper's OverTone preset.
        title: what tables and figures say.
        open: from a model and a seed (for methods that begin at random weights) to a context of the weights to move;
            when it ends, the model is restored.
        steps: optimiser steps at most.
        lr: Adam's learning rate.
    """

    name: str
    title: str
    open: Callable[[Any, int], AbstractContextManager[list[nn.Parameter]]]
    steps: int
    lr: float


METHODS: dict[str, EditingMethod] = {
    method.name: method
    for method in (
        EditingMethod("lora", "LoRA", lambda model, seed: open_lora(model, seed=seed), steps=50, lr=5e-3),
        EditingMethod("ft-m", "FT-M", lambda model, seed: open_down_projection(model), steps=25, lr=5e-3),
    )
}


def named_methods(names: Iterable[str]) -> list[EditingMethod]:
    """Look the names up in `METHODS`.

    Raises:
        ValueError: a name that is not there, with those that are.
    """
    return look_up(METHODS, "method", names)


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Evaluation mode (no dropout) and no weight that wants a gradient, as long as the context lasts."""
    modes = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, requires_grad in wanted.items():
            parameter.requires_grad_(requires_grad)


def _down_projection(model: Any, layer: int | None) -> nn.Parameter:
    projections: list[nn.Parameter] = [
        parameter
        for name, parameter in model.named_parameters()
        if name.endswith((".mlp.down_proj.weight", ".mlp.c_proj.weight"))
    ]
    if not projections:
        raise ValueError(f"model {type(model).__name__} has no mlp.down_proj or mlp.c_proj weight for FT-M to edit")
    if layer is None:
        layer = 2 * len(projections) // 3
    if not 0 <= layer < len(projections):
        raise ValueError(f"layer is {layer}, but {type(model).__name__} has layers 0 to {len(projections) - 1}")
    return projections[layer]
