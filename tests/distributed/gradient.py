"""Two processes, each with half of a ragged batch: is the gradient that of one process with all of it?

The single-process gradient is that of the literal loss, computed in each process before anything is wrapped.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import tiny_models
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments

from overtone import OverToneConfig, token_states
from overtone.functional import reference_loss
from overtone.huggingface import TokenStatesCallback, attach, compute_loss_func

Batch = dict[str, torch.Tensor]


def local_gradients(model: Any) -> Batch:
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in gradients.items()}


def ddp(model: Any, own: Batch, items: torch.Tensor) -> Batch:
    wrapped = DistributedDataParallel(model)
    with attach(wrapped):
        (wrapped(**own, num_items_in_batch=items).loss * dist.get_world_size()).backward()
    return local_gradients(model)


def fsdp2(model: Any, own: Batch, items: torch.Tensor) -> Batch:
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    if dist.get_rank() == 0:
        # A forward here would wait for the other rank's shards for ever: the check has to leave sharded models alone.
        attach(model).detach()
    with attach(model):
        (model(**own, num_items_in_batch=items).loss * dist.get_world_size()).backward()
    return local_gradients(model)


def accelerator(model: Any, own: Batch, items: torch.Tensor) -> Batch:
    engine = Accelerator(cpu=True)
    wrapped = engine.prepare(model)
    loss = compute_loss_func()(wrapped(**own), own["labels"], num_items_in_batch=items)
    engine.backward(loss * engine.num_processes)
    return local_gradients(model)


class Gradients(TrainerCallback):
    """Keeps the gradients of the step, which Trainer clears after it."""

    values: Batch

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.values = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def trainer(model: Any, own: Batch, items: torch.Tensor) -> Batch:
    """Trainer deals the rows out itself, one at a time; its own counting gives num_items_in_batch."""
    rows = len(own["labels"])
    gathered = {name: [torch.empty_like(values) for _ in range(2)] for name, values in own.items()}
    for name, values in own.items():
        dist.all_gather(gathered[name], values)
    batch = {name: torch.cat(values) for name, values in gathered.items()}
    dataset = [{name: values[row] for name, values in batch.items()} for row in range(len(batch["labels"]))]
    callback = TokenStatesCallback(OverToneConfig(epsilon=0.5), stop_after_held=1)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=rows,
            max_steps=1,
            max_grad_norm=0,
            learning_rate=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            ddp_find_unused_parameters=False,
        )
        gradients = Gradients()
        run = Trainer(model=model, args=args, train_dataset=dataset, callbacks=[callback, gradients])
        with attach(model, observer=callback.observe):
            run.train()
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    states = token_states(logits[:, :-1], batch["labels"][:, 1:], callback.config)
    error = run.state.log_history[0]["mean_kl"] - states.kl.sum().item() / states.counted.sum().item()
    assert abs(error) < 1e-5, "the logged token states are not those of all ranks"
    return gradients.values


ENGINES: dict[str, Callable[[Any, Batch, torch.Tensor], Batch]] = {
    "ddp": ddp,
    "fsdp2": fsdp2,
    "accelerator": accelerator,
    "trainer": trainer,
}


def check(engine: str) -> None:
    rank, processes = dist.get_rank(), dist.get_world_size()
    assert processes == 2
    model = tiny_models.build(sharpness=3)
    batch = tiny_models.ragged_batch(model, lengths=(9, 5, 7, 3))
    batch["labels"][2] = -100

    outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    reference_loss(outputs.logits[:, :-1], batch["labels"][:, 1:]).backward()
    expected = local_gradients(model)
    model.zero_grad()

    rows = len(batch["labels"]) // processes
    own = {name: values[rank * rows : (rank + 1) * rows] for name, values in batch.items()}
    gradients = ENGINES[engine](model, own, batch["labels"][:, 1:].ne(-100).sum())
    for name, gradient in gradients.items():
        scale = expected[name].abs().max().clamp(min=1)
        error = ((gradient - expected[name]) / scale).abs().max().item()
        assert error <= 1e-6, f"{engine}: gradient of {name} is off by {error}"
    assert gradients.keys() == expected.keys()


CHECKS = {engine: partial(check, engine) for engine in ENGINES}
