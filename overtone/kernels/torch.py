"""The kernel of PyTorch operations: for every device and every kind of tensor, over blocks of rows."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor

from overtone.checks import Reduction, check_labels, reduce_tokens, working_dtype
from overtone.hold import is_settled
from overtone.kernels.closed_form import (
    TargetTensors,
    become_gradient_of_others,
    fit_rows,
    gradient_of_labels,
    kept_of_part,
    sums_of_part,
    write_gradient_of_others,
)
from overtone.kernels.kernel import Clip, Fit, Target

logger = logging.getLogger(__name__)

BLOCK_ELEMENTS = 2**19
"""How many logits to work through at a time, in the cache and without much memory for what is in between."""

COMPILED_BLOCK_ELEMENTS = 2**26

COMPILE_FROM = 2**17
"""Logits of a call on a GPU from which on it is worth the seconds that the first such call compiles for."""

Rows: TypeAlias = slice | Tensor


class CompiledFunctions:
    """Functions that torch.compile turns into one pass over the rows each, when the first large call needs them.

    Where it cannot (no Triton, or ``TORCH_COMPILE_DISABLE=1``) they run as they stand. Neither another number of rows,
    but for one, nor another vocabulary compiles them anew.
    """

    def __init__(self) -> None:
        self.is_broken = False
        # torch.compile imports a compiler, which takes a second: not before there is something to compile.
        self._compiled: dict[Callable[..., Any], Callable[..., Any]] = {}

    def is_worthwhile(self, logits: Tensor) -> bool:
        """Whether a call with that many logits, on their device, runs compiled."""
        return not self.is_broken and logits.device.type != "cpu" and logits.numel() >= COMPILE_FROM

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call the function, compiled."""
        try:
            if function not in self._compiled:
                self._compiled[function] = torch.compile(function, dynamic=True)
            # The compiler has functions of their own for views and for what has a graph; detached, all are alike.
            detached = [value.detach() if isinstance(value, Tensor) else value for value in arguments]
            return self._compiled[function](*detached)
        except torch._dynamo.exc.TorchDynamoException as error:
            # Raised while compiling, so before anything was computed.
            self.is_broken = True
            logger.warning("torch.compile does not work here, so the loss runs without it, slower: %s", error)
            return function(*arguments)


class TorchKernel:
    """`overtone.kernels.kernel.Kernel` in PyTorch, compiled where the logits are many and not on the CPU."""

    gradient_with_fit_up_to = 0

    def __init__(self) -> None:
        self.compiled = CompiledFunctions()

    def fit(
        self,
        logits: Tensor,
        labels: Tensor,
        target: Target,
        clip: Clip,
        *,
        reduction: Reduction,
        ignore_index: int,
        scale: float = 1.0,
        gradient: Tensor | None = None,
    ) -> Fit:
        """As `overtone.kernels.kernel.Kernel.fit`; ignored rows cost nothing on the CPU."""
        counted = labels != ignore_index
        if logits.device.type == "cpu":
            check_labels(labels, logits.shape[1], ignore_index)
        in_range = labels.where(counted, 0)
        tensors = target_tensors(target, logits)
        kl = logits.new_zeros(len(logits), dtype=tensors.lam.dtype)
        coefficients = kl.new_zeros(5, len(logits))
        with without_autocast(logits):
            for rows in self._blocks(logits, counted, worthwhile_share=1):
                kl[rows], coefficients[:, rows] = self._call(fit_rows, logits, logits[rows], in_range[rows], tensors)
        kl = kl.where(counted, 0)
        fit = reduced_fit(kl, coefficients, counted, clip, reduction, scale)
        if gradient is not None:
            self.gradient(fit.row_weights, logits, labels, coefficients, out=gradient)
        return fit

    def gradient(self, grad_kl: Tensor, logits: Tensor, labels: Tensor, coefficients: Tensor, *, out: Tensor) -> None:
        """As `overtone.kernels.kernel.Kernel.gradient`; rows whose grad_kl is 0 cost little on the CPU."""
        needed = grad_kl != 0
        # Picking rows is a copy, which pays only where many are left out.
        blocks = list(self._blocks(logits, needed, worthwhile_share=0.5))
        if not blocks or not isinstance(blocks[0], slice):
            out.masked_fill_(~needed.unsqueeze(1), 0)
        with without_autocast(logits):
            for rows in blocks:
                block, own, scale = logits[rows], coefficients[:, rows].contiguous(), grad_kl[rows]
                # Picked rows are a copy, worked on in place.
                if isinstance(rows, slice) and out is not logits:
                    block_out = out[rows]
                    self._call(write_gradient_of_others, logits, block, own, scale, block_out)
                else:
                    block_out = block
                    self._call(become_gradient_of_others, logits, block, own, scale)
                _set_labels(block_out, labels[rows], gradient_of_labels(own, scale))
                if not isinstance(rows, slice):
                    out[rows] = block_out

    def highest(self, logits: Tensor) -> Tensor:
        """As `overtone.kernels.kernel.Kernel.highest`."""
        top = [logits[rows].amax(dim=1).to(working_dtype(logits)) for rows in self._slices(logits)]
        return torch.cat(top).nan_to_num(math.inf, math.inf, -math.inf) if top else _no_rows(logits)

    def sums(self, logits: Tensor, top: Tensor) -> Tensor:
        """As `overtone.kernels.kernel.Kernel.sums`."""
        with without_autocast(logits):
            sums = [self._call(sums_of_part, logits, logits[rows], top[rows]) for rows in self._slices(logits)]
        return torch.cat(sums, dim=1) if sums else _no_rows(logits).expand(5, 0)

    def kept(self, logits: Tensor, top: Tensor, threshold: Tensor) -> Tensor:
        """As `overtone.kernels.kernel.Kernel.kept`."""
        with without_autocast(logits):
            kept = [
                self._call(kept_of_part, logits, logits[rows], top[rows], threshold[rows])
                for rows in self._slices(logits)
            ]
        return torch.cat(kept) if kept else _no_rows(logits)

    def _slices(self, logits: Tensor) -> Iterator[Rows]:
        every_row = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        return self._blocks(logits, every_row, worthwhile_share=1)

    def _call(self, function: Callable[..., Any], logits: Tensor, *arguments: Any) -> Any:
        return self.compiled(function, *arguments) if self.compiled.is_worthwhile(logits) else function(*arguments)

    def _blocks(self, logits: Tensor, needed: Tensor, *, worthwhile_share: float) -> Iterator[Rows]:
        """Blocks of the rows ``(N,)``: slices of all of them, or the numbers of the needed ones.

        Args:
            logits: ``(N, V)``.
            needed: ``(N,)``, bool.
            worthwhile_share: all are worked through if at least this share is needed; and off the CPU, where it would
                cost a synchronisation to know.
        """
        elements = COMPILED_BLOCK_ELEMENTS if self.compiled.is_worthwhile(logits) else BLOCK_ELEMENTS
        size = max(1, elements // logits.shape[1])
        if logits.device.type != "cpu" or int(needed.sum()) >= worthwhile_share * len(logits):
            for start in range(0, len(logits), size):
                yield slice(start, min(start + size, len(logits)))
        else:
            yield from filter(len, needed.nonzero().squeeze(1).split(size))


def _no_rows(logits: Tensor) -> Tensor:
    return logits.new_empty(0, dtype=working_dtype(logits))


def reduced_fit(
    kl: Tensor, coefficients: Tensor, counted: Tensor, clip: Clip, reduction: Reduction, scale: float
) -> Fit:
    """The fit of rows of which the KL ``(N,)``, 0 where they do not count, and the coefficients are known."""
    settled = counted & is_settled(kl, clip.epsilon, coefficients[4] != 0 if clip.correct_only else None)
    row_weights = (counted ^ settled).to(kl.dtype) * scale
    if reduction == "mean":
        row_weights /= counted.sum().clamp(min=1)
    loss = reduce_tokens(kl.masked_fill(settled, clip.epsilon), counted, reduction) * scale
    return Fit(loss, kl, coefficients, row_weights)


def _set_labels(rows: Tensor, labels: Tensor, values: Tensor) -> None:
    """Put a value ``(B,)`` at the label ``(B,)`` of each row ``(B, V)``, where the label lies in the row."""
    tokens = labels.clamp(0, rows.shape[1] - 1)
    # Rows without their label keep what they have: picking the others would cost a synchronisation.
    kept = rows.gather(1, tokens.unsqueeze(1)).squeeze(1)
    # Not a scatter, which in half precision goes over all of the rows.
    numbers = torch.arange(len(rows), device=rows.device)
    rows[numbers, tokens] = torch.where(tokens == labels, values.to(rows.dtype), kept)


def target_tensors(target: Target, logits: Tensor) -> TargetTensors:
    """On the device of the logits, filled there: a copy from the host might wait for it."""
    n_sigma = math.inf if target.n_sigma is None else target.n_sigma
    values = n_sigma, target.lam, float(target.check)
    dtype, device = working_dtype(logits), logits.device
    return TargetTensors(*[torch.full((), value, dtype=dtype, device=device) for value in values])


def without_autocast(logits: Tensor) -> AbstractContextManager[object]:
    """Where autocast is off on the device of the logits."""
    device = logits.device.type
    is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if is_on else nullcontext()
