"""Several processes that hold together: after N steps the weights are those of one process with all of the rows.

Every step has three micro-batches, of which each is held by all processes or by none; the last one is held too, while
others are not.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import tiny_models
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from overtone import OverToneConfig, overtone_loss
from overtone.huggingface import attach, compute_loss_func

CONFIG = OverToneConfig(hold="correct")
MICRO_BATCHES, STEPS, LR = 3, 18, 3e-2
NO_LABELS = 60
OPTIMIZERS = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}

Loss = Callable[[Any, torch.Tensor], torch.Tensor]


def micro_batches(processes: int, *, some_without_labels: bool) -> torch.Tensor:
    """Rows of token ids ``(micro-batches, processes, rows, length)``; one process may have none of a micro-batch."""
    ids = torch.randint(3, NO_LABELS, (MICRO_BATCHES, processes, 1, 6), generator=torch.Generator().manual_seed(0))
    ids[1:, ..., 3:] = ids[1:, ..., :3]
    if some_without_labels:
        ids[1, -1, :, 0] = NO_LABELS
    return ids


def labels_of(ids: torch.Tensor) -> torch.Tensor:
    """Rows that begin with NO_LABELS have none."""
    return ids.masked_fill(ids[:, :1] == NO_LABELS, -100)


def plain_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The function by itself, on a model's logits."""
    logits = model(input_ids=ids).logits
    return overtone_loss(logits[:, :-1], labels_of(ids)[:, 1:], reduction="sum", **CONFIG.as_kwargs()) / places(ids)


def attached_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=labels_of(ids), num_items_in_batch=places(ids)).loss


def places(ids: torch.Tensor) -> int:
    """What to divide by, so that the mean over the processes is one process' own."""
    return len(ids) * (ids.shape[1] - 1)


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


def ddp_compiled(model: Any, own: torch.Tensor, optimizer: Any) -> None:
    wrapped = DistributedDataParallel(torch.compile(model, backend="aot_eager"))
    steps(wrapped, own, plain_loss, optimizer(wrapped.parameters(), LR), accumulates=True)


def ddp_attached(model: Any, own: torch.Tensor, optimizer: Any) -> None:
    wrapped = DistributedDataParallel(model)
    with attach(wrapped, CONFIG):
        steps(wrapped, own, attached_loss, optimizer(wrapped.parameters(), LR), accumulates=True)


def _shard(model: Any) -> None:
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)


def fsdp2_attached(model: Any, own: torch.Tensor, optimizer: Any) -> None:
    _shard(model)
    with attach(model, CONFIG):
        steps(model, own, attached_loss, optimizer(model.parameters(), LR))


def fsdp2_plain(model: Any, own: torch.Tensor, optimizer: Any) -> None:
    """The function by itself sees no model: it warns, and the loop does what it says."""

    def loss(sharded: Any, ids: torch.Tensor) -> torch.Tensor:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            value = plain_loss(sharded, ids)
        if any("model.reshard()" in str(warning.message) for warning in caught):
            sharded.reshard()
        return value

    _shard(model)
    steps(model, own, loss, optimizer(model.parameters(), LR))


def fsdp2_computed(model: Any, own: torch.Tensor, optimizer: Any) -> None:
    """The loss is worked out after the model's forward, of its outputs."""
    _shard(model)
    compute_loss = compute_loss_func(CONFIG, model=model)
    steps(
        model,
        own,
        lambda m, ids: compute_loss(m(input_ids=ids), labels_of(ids), places(ids)),
        optimizer(model.parameters(), LR),
    )


def trainer(model: Any, own: torch.Tensor, optimizer: Any) -> None:
    """Trainer accumulates under no_sync, and divides by the tokens of all micro-batches and processes."""
    every_rank = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(every_rank, own.contiguous())
    rows = torch.stack(every_rank, dim=1).flatten(0, 2)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=len(own),
            num_train_epochs=STEPS,
            max_grad_norm=0,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            ddp_find_unused_parameters=False,
            train_sampling_strategy="sequential",
        )
        Trainer(
            model=model,
            args=arguments,
            train_dataset=[{"input_ids": ids, "labels": ids} for ids in rows],
            optimizers=(optimizer(model.parameters(), LR), None),
            compute_loss_func=compute_loss_func(CONFIG),
        ).train()


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
    "ddp_compiled": ddp_compiled,
    "ddp_attached": ddp_attached,
    "fsdp2_attached": fsdp2_attached,
    "fsdp2_plain": fsdp2_plain,
    "fsdp2_computed": fsdp2_computed,
    "trainer": trainer,
    "accelerator": accelerator,
}


def check(engine: str, optimizer: str) -> None:
    rank, processes = dist.get_rank(), dist.get_world_size()
    model = tiny_models.build(sharpness=3).double()
    alone = copy.deepcopy(model)
    # Trainer divides by the labels that there are.
    batches = micro_batches(processes, some_without_labels=engine != "trainer")
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


CHECKS = {f"{engine}_{name}": partial(check, engine, name) for engine in ENGINES for name in OPTIMIZERS}
