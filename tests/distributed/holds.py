"""Several processes that hold together: after N steps the weights are those of one process with all of the rows.

Started by torchrun with the engines as its arguments; exits with an error where a weight differs. Every step has three
micro-batches, of which each is held by all processes or by none; the last one is held too, while others are not.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny_models
import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from overtone import OverToneConfig, overtone_loss
from overtone.huggingface import attach

CONFIG = OverToneConfig(hold="correct")
MICRO_BATCHES, STEPS, LR = 3, 20, 1e-2
OPTIMIZERS = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}

Loss = Callable[[Any, torch.Tensor], torch.Tensor]


def micro_batches(processes: int) -> torch.Tensor:
    """Rows of token ids ``(micro-batches, processes, rows, length)``, harder to learn from the first to the last."""
    ids = torch.randint(3, 61, (MICRO_BATCHES, processes, 1, 6), generator=torch.Generator().manual_seed(0))
    ids[1:, ..., 3:] = ids[1:, ..., :3]
    return ids


def plain_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The function by itself, on a model's logits."""
    logits = model(input_ids=ids).logits
    return overtone_loss(logits[:, :-1], ids[:, 1:], **CONFIG.as_kwargs())


def attached_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids).loss


def steps(model: Any, own: torch.Tensor, loss: Loss, optimizer: Any, *, accumulates: bool = False) -> int:
    """Train; how many micro-batches have left every gradient as it was."""
    held = 0
    for _ in range(STEPS):
        optimizer.zero_grad()
        for number, ids in enumerate(own):
            is_last = number == len(own) - 1
            with model.no_sync() if accumulates and not is_last else nullcontext():
                value = loss(model, ids)
                before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
                (value / len(own)).backward()
            after = [p.grad for p in model.parameters()]
            held += all(a is b or (a is not None and torch.equal(a, b)) for a, b in zip(before, after, strict=True))
        optimizer.step()
    return held


def weights(model: Any) -> torch.Tensor:
    values = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([value.detach().flatten() for value in values])


def ddp(model: Any, own: torch.Tensor, optimizer: Any, **settings: Any) -> None:
    wrapped = DistributedDataParallel(model, **settings)
    steps(wrapped, own, plain_loss, optimizer(wrapped.parameters(), LR), accumulates=True)


def ddp_attached(model: Any, own: torch.Tensor, optimizer: Any) -> None:
    wrapped = DistributedDataParallel(model)
    with attach(wrapped, CONFIG):
        steps(wrapped, own, attached_loss, optimizer(wrapped.parameters(), LR), accumulates=True)


def fsdp2_attached(model: Any, own: torch.Tensor, optimizer: Any) -> None:
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    with attach(model, CONFIG):
        steps(model, own, attached_loss, optimizer(model.parameters(), LR))


def fsdp2_around_peft(model: Any, own: torch.Tensor, optimizer: Any) -> None:
    """The root that FSDP2 keeps whole is PEFT's wrapper, not the model that the loss is attached to."""
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    with attach(model, CONFIG):
        steps(model, own, attached_loss, optimizer([p for p in model.parameters() if p.requires_grad], LR))


def accelerator(model: Any, own: torch.Tensor, optimizer: Any) -> None:
    engine = Accelerator(cpu=True, gradient_accumulation_steps=len(own))
    wrapped, updates = engine.prepare(model, optimizer(model.parameters(), LR))
    with attach(wrapped, CONFIG):
        for _, ids in itertools.product(range(STEPS), own):
            with engine.accumulate(wrapped):
                engine.backward(attached_loss(wrapped, ids))
                updates.step()
                updates.zero_grad()


ENGINES: dict[str, Callable[[Any, torch.Tensor, Any], None]] = {
    "ddp": ddp,
    "ddp_unused": lambda *arguments: ddp(*arguments, find_unused_parameters=True),
    "ddp_views": lambda *arguments: ddp(*arguments, gradient_as_bucket_view=True),
    "ddp_attached": ddp_attached,
    "fsdp2_attached": fsdp2_attached,
    "fsdp2_around_peft": fsdp2_around_peft,
    "accelerator": accelerator,
}


def check(engine: str, optimizer: str) -> None:
    rank, processes = dist.get_rank(), dist.get_world_size()
    model = tiny_models.build(sharpness=3).double()
    if engine == "fsdp2_around_peft":
        torch.manual_seed(0)
        model = get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=64, target_modules="all-linear")
        )
        torch.nn.init.normal_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    alone = copy.deepcopy(model)
    batches = micro_batches(processes)
    optimizer_class = OPTIMIZERS[optimizer]
    ENGINES[engine](model, batches[:, rank], optimizer_class)

    with OneProcess():
        trained = [p for p in alone.parameters() if p.requires_grad]
        held = steps(alone, batches.flatten(1, 2), plain_loss, optimizer_class(trained, LR))
    error = (weights(model) - weights(alone)).abs().max().item()
    assert 0 < held < STEPS * MICRO_BATCHES, f"{engine}: {held} held micro-batches try nothing"
    assert error <= 1e-6, f"{engine}, {optimizer}: weights are off by {error}"


class OneProcess:
    """As if nobody else were there."""

    def __enter__(self) -> None:
        self.is_initialized = dist.is_initialized
        dist.is_initialized = lambda: False

    def __exit__(self, *exception: object) -> None:
        dist.is_initialized = self.is_initialized


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("engines", choices=sorted(ENGINES), nargs="+")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for engine in parser.parse_args().engines:
        for optimizer in OPTIMIZERS:
            check(engine, optimizer)
        sys.stdout.write(f"{engine}: rank {dist.get_rank()} of {dist.get_world_size()} agrees\n")
        sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
