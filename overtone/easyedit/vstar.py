"""ROME, MEMIT and their family: the log-probabilities of the target from which they compute the loss of their vector.

All of them optimise one vector v* by Adam on the mean NLL of the target, written out as ``log_softmax``, `torch.gather`
of the target tokens and a mask, and on a KL and a weight decay of their own, which stay. So the `torch` that their
modules imported becomes a stand-in whose `gather` returns, while a flagged edit runs, minus the loss of each target
token. A log-probability is a logit too: the losses do not see the difference.

Most end once their total is small. A held step reports a loss so far below that their own rule ends the edit; where
there is no such rule (UnKE), or it does not look at that step (EAMET's first), the vector stays where it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from overtone.easyedit.cross_entropy import never_used
from overtone.easyedit.held_steps import held_steps
from overtone.easyedit.patching import Patches
from overtone.easyedit.trainers import (
    Trainer,
    arguments,
    does_not_use,
    lacks,
    lacks_arguments,
    wrap,
)
from overtone.token_loss import EditLoss

METHOD = "lora"
"""Whose values of the paper they take: the paper has none for them, and 0.05 is where they stop themselves."""

HELD = -1e3
"""The loss of each token of a held step: no KL or weight decay beside it is near as large."""


class _Edit:
    """One running edit: its loss, and which positions hold target tokens."""

    def __init__(self, loss: EditLoss, since_last_step: list[bool]) -> None:
        self.loss = loss
        self.since_last_step = since_last_step
        self.calls = 0
        self.is_target: Tensor | None = None
        self.error: Exception | None = None

    def log_probs(self, log_probs: Tensor, index: Tensor) -> Tensor:
        """Minus the loss of each target token, and 0 elsewhere, in the shape of index ``(B, T, 1)``."""
        assert self.is_target is not None
        self.calls += 1
        # ROME's have a row more: that of the prompt whose distribution is to stay.
        rows, labels = log_probs[: len(index)], index.squeeze(-1)
        is_target = self.is_target.to(rows.device)
        try:
            values, held = self.loss(rows[is_target], labels[is_target])
        except Exception as error:
            self.error = error  # MEMIT-FE prints it and goes on without a vector
            raise
        self.since_last_step.append(held)
        if held:
            values = torch.full_like(values, HELD)
        log_probs = values.new_zeros(labels.shape).masked_scatter(is_target, -values)
        return log_probs.unsqueeze(-1)


_running: ContextVar[_Edit | None] = ContextVar("overtone_easyedit_running_vector", default=None)


class TorchStandIn(ModuleType):
    """`torch`, but for the target's log-probabilities of the edit that is running in this thread."""

    def __getattr__(self, name: str) -> Any:
        """Everything else is torch's."""
        return getattr(torch, name)

    @staticmethod
    def where(*args: Any, **kwargs: Any) -> Any:
        """As torch's. The index of the gathered tokens is made by it, and 0 where its condition sees no target."""
        edit = _running.get()
        if edit is not None:
            edit.is_target = args[0]
        return torch.where(*args, **kwargs)

    @staticmethod
    def gather(*args: Any, **kwargs: Any) -> Tensor:
        """As torch's; of an edit that is running in this thread, minus the loss of each target token."""
        edit = _running.get()
        return torch.gather(*args, **kwargs) if edit is None else edit.log_probs(args[0], args[2])


@contextmanager
def _vector_loss(loss: EditLoss) -> Iterator[None]:
    with held_steps() as since_last_step:
        edit = _Edit(loss, since_last_step)
        token = _running.set(edit)
        try:
            yield
        finally:
            _running.reset(token)
    if edit.error is not None:
        raise edit.error
    if not edit.calls:
        raise RuntimeError(never_used(loss))


def _problem(module: ModuleType, computes: tuple[str, ...], optimises: tuple[str, ...]) -> str | None:
    problem = lacks(module, ["torch", *computes, *optimises])
    if problem:
        return problem
    for name in computes:
        problem = problem or lacks_arguments(getattr(module, name), ["model", "hparams"])
    for name in optimises:
        for used in ("torch", "where", "gather", "log_softmax"):
            problem = problem or does_not_use(getattr(module, name), used)
    return problem or (
        None if module.torch is torch or isinstance(module.torch, TorchStandIn) else "torch is not torch"
    )


def _hook(trainer: Trainer, module: ModuleType, patches: Patches, computes: tuple[str, ...]) -> None:
    def compute(original: Any, *args: Any, **kwargs: Any) -> Any:
        hparams, model = arguments(original, args, kwargs, "hparams", "model")
        loss = trainer.loss_of(hparams, model)
        if loss is None:
            return original(*args, **kwargs)
        with _vector_loss(loss):
            return original(*args, **kwargs)

    patches.attribute(module, "torch", TorchStandIn("torch"))
    for function in computes:
        wrap(patches, module, function, compute)


def _trainer(
    name: str, module: str, hparams_class: str, *computes: str, optimises: tuple[str, ...] | None = None
) -> Trainer:
    return Trainer(
        name,
        preset=METHOD,
        module=module,
        hparams_class=hparams_class,
        way_in=f"torch.gather of {module}, while {' or '.join(computes)} runs",
        problem=partial(_problem, computes=computes, optimises=optimises or computes),
        hook=partial(_hook, computes=computes),
        optional=True,
        takes_anchor=False,
    )


VSTAR = (
    _trainer("ROME", "rome.compute_v", "ROMEHyperParams", "compute_v"),
    _trainer("R-ROME", "r_rome.compute_v", "R_ROMEHyperParams", "compute_v"),
    _trainer("MEMIT", "memit.compute_z", "MEMITHyperParams", "compute_z"),
    _trainer("MEMIT-FE", "memit_FE.compute_z", "MEMITFEHyperParams", "compute_z", optimises=("_direct_compute_z",)),
    _trainer("EMMET", "emmet.compute_z", "EMMETHyperParams", "compute_z"),
    _trainer("AlphaEdit", "alphaedit.compute_z", "AlphaEditHyperParams", "compute_z"),
    _trainer("SPHERE", "SPHERE.compute_z", "SPHEREHyperParams", "compute_z"),
    _trainer("CORE", "core.compute_z", "COREHyperParams", "compute_z"),
    _trainer("EAMET", "eamet.compute_z", "EAMETHyperParams", "compute_z"),
    _trainer("PMET", "pmet.compute_zs", "PMETHyperParams", "compute_zs", "compute_z"),
    _trainer("UnKE", "unke.compute_z", "unkeHyperParams", "compute_z"),
    _trainer("UnKE_ARE", "unke_ARE.compute_z", "unkeAREHyperParams", "compute_z"),
)
