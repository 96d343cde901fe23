"""What happens during an edit: losses on its probes, underfitting of its tokens (Figures 1 and 2 of the paper)."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from overtone.diagnostics import underfitting_degree
from overtone.lab.data.edit import Edit
from overtone.lab.model.targets import encode_targets, target_logits


@dataclass(frozen=True)
class EditTrace:
    """One edit seen step by step; losses are cross-entropies in nats, the mean over a probe's target tokens.

    Attributes:
        steps: after how many steps the losses were taken, from 0 to the last.
        generality_loss: mean over the rephrased prompts; empty for an edit without any.
        portability_loss: mean over the portability probes; empty for an edit without any.
        initial_loss: of every target token of the edit, before it.
        underfitting: `underfitting_degree` of every target token, after the last step.
    """

    steps: list[int]
    generality_loss: list[float]
    portability_loss: list[float]
    initial_loss: list[float]
    underfitting: list[float]


class Tracer:
    """Watches one edit.

    Make it from the unedited model, give `observe` to `overtone.lab.edit.fit.fit`, `record` the last step, and read
    `trace`.
    """

    def __init__(self, model: Any, tokenizer: Any, edit: Edit) -> None:
        """Tokenise the probes and keep the unedited model's logits of the edit's target tokens."""
        pairs = [
            (edit.prompt, edit.target_new),
            *((probe.prompt, probe.target) for probe in (*edit.generality, *edit.portability)),
        ]
        self._model = model
        self._batch = encode_targets(tokenizer, pairs, model.device)
        self._lengths = [len(target) for target in self._batch.targets]
        self._portability_from = 1 + len(edit.generality)
        self._unedited = self._logits()
        self._latest = self._unedited
        self._losses: dict[int, list[float]] = {}

    def observe(self, step: int) -> None:
        """Record the first ten steps, where most of an edit happens, and then every fifth: a pass costs two steps."""
        if step <= 10 or step % 5 == 0:
            self.record(step)

    def record(self, step: int) -> None:
        """Record the model as it is now, after this many steps."""
        self._latest = self._logits()
        losses = F.cross_entropy(self._latest, torch.cat(self._batch.targets), reduction="none")
        self._losses[step] = [probe.mean().item() for probe in losses.split(self._lengths)]

    @property
    def trace(self) -> EditTrace:
        """What was recorded so far."""
        edited = slice(0, self._lengths[0])
        labels = self._batch.targets[0]
        initial = F.cross_entropy(self._unedited[edited], labels, reduction="none")
        generality = [step[1 : self._portability_from] for step in self._losses.values()]
        portability = [step[self._portability_from :] for step in self._losses.values()]
        return EditTrace(
            steps=list(self._losses),
            generality_loss=[fmean(step) for step in generality if step],
            portability_loss=[fmean(step) for step in portability if step],
            initial_loss=initial.tolist(),
            underfitting=underfitting_degree(self._unedited[edited], self._latest[edited], labels).tolist(),
        )

    @torch.no_grad()
    def _logits(self) -> Tensor:
        return target_logits(self._model, self._batch)[0].float()
