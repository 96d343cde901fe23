"""A stand-in for the CrossEntropyLoss that a trainer's module imported (FT-M, WISE and their twins).

It takes the class's place from install to uninstall, and is the class itself wherever no flagged edit is running: the
running edit is a context variable, so threads and nested calls do not see each other's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from overtone.easyedit.prompts import Prompts, prompts_of
from overtone.token_loss import EditLoss


class _Edit:
    """One running edit: its loss, and which positions its trainer has been seen to use."""

    def __init__(self, loss: EditLoss, prompts: Prompts | None) -> None:
        self.loss = loss
        self.calls = 0
        self._prompts = prompts
        self._used_rows: dict[bytes, Tensor] = {}

    def values(self, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        """Token values ``(N,)``, 0 at positions without a loss, which the trainer masks and averages."""
        self.calls += 1
        # FT-M hands over every position, the prompt's too, and masks afterwards. Which ones count is learned from the
        # first gradient that comes back, so that prompt tokens, which never settle, cannot keep a step from being held.
        batch = labels.detach().cpu().numpy().tobytes()
        used = self._used_rows.get(batch)
        counted = labels != ignore_index
        if used is not None:
            counted = counted & used
        anchored = None
        if self._prompts is not None:
            logits, anchored = self._prompts.anchored(logits, None if used is None else counted)
        token_values, held = self.loss(logits[counted], labels[counted], may_hold=used is not None, anchored=anchored)
        # Zeros and not nothing: WISE asserts that its weight has a gradient, and SGD stands still on zeros.
        token_values = token_values * 0 if held else token_values
        values = token_values.new_zeros(labels.shape).masked_scatter(counted, token_values)
        return _ReportUsedRows.apply(values, self._used_rows, batch)  # type: ignore[no-any-return, no-untyped-call]


class _ReportUsedRows(torch.autograd.Function):
    """Identity; its backward notes which values the trainer's reduction kept."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, used_rows: dict[bytes, Tensor], batch: bytes) -> Tensor:
        ctx.note = used_rows, batch
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        used_rows, batch = ctx.note
        used_rows.setdefault(batch, grad != 0)
        return grad, None, None


_running: ContextVar[_Edit | None] = ContextVar("overtone_easyedit_running_edit", default=None)


class CrossEntropyStandIn(nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss`, or the loss of the edit that is running in this thread."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Loss of logits ``(N, V)`` and labels ``(N,)``, reduced as constructed."""
        edit = _running.get()
        if edit is None:
            return super().forward(input, target)
        values = edit.values(input, target, self.ignore_index)
        if self.reduction == "none":
            return values
        total = values.sum()
        return total if self.reduction == "sum" else total / (target != self.ignore_index).sum().clamp(min=1)


@contextmanager
def running(loss: EditLoss, model: nn.Module) -> Iterator[None]:
    """Let the stand-ins compute this loss, in this thread, inside the block, from what this model says.

    Raises:
        RuntimeError: at the end, if no stand-in was asked for the loss.
    """
    with prompts_of(model, loss) as prompts:
        edit = _Edit(loss, prompts)
        token = _running.set(edit)
        try:
            yield
        finally:
            _running.reset(token)
    if not edit.calls:
        raise RuntimeError(never_used(loss))


def never_used(loss: EditLoss) -> str:
    """The message for an edit that finished without its loss."""
    return (
        f"the trainer finished without computing {loss.description}: it ran no step, or took a path of its own to its "
        "loss; leave token_loss out to run it as it is"
    )
