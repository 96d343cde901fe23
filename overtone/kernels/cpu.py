"""The kernel in C++ (cpu.cpp), for plain tensors in the memory of a CPU; built when the package is installed."""

from __future__ import annotations

import logging
import math
from functools import cache
from types import ModuleType
from typing import NoReturn

import torch
from torch import Tensor, nn

from overtone.checks import Reduction, check_labels, working_dtype
from overtone.kernels.kernel import Clip, Fit, Target
from overtone.torch_state import is_recorded

logger = logging.getLogger(__name__)

_STORAGES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

MISSED_FROM = 2**17
"""Logits of a call from which on it is a pity that the C++ was not built."""


def can_read(logits: Tensor) -> bool:
    """Whether logits ``(N, V)`` are what C++ reads: in memory, row by row, with every value as it is at its place."""
    return (
        logits.is_cpu
        # A subclass may have no memory of its own.
        and type(logits) in (Tensor, nn.Parameter)
        and logits.dtype in _STORAGES
        and logits.layout == torch.strided
        and not logits.is_neg()
        and not is_recorded()
        and _has_memory(logits)
        and (logits.stride(1) == 1 or logits.shape[1] == 1)
    )


def _has_memory(tensor: Tensor) -> bool:
    """Neither freed, nor zeros that are nowhere, nor the tensor of a transform (torch.func)."""
    try:
        return tensor.data_ptr() != 0 or tensor.numel() == 0
    except RuntimeError:
        return False


def _in_memory(tensor: Tensor) -> Tensor:
    """With every value as it is at its place, one after the other."""
    return (tensor if _has_memory(tensor) else tensor.clone()).resolve_neg().contiguous()


INTERFACE = 1
"""Of this file with cpu.cpp, which has the same number: an older library may be there, where only Python is updated."""


@cache
def library() -> ModuleType | None:
    """The compiled module, or None where it was not built, or was for another version of this file."""
    try:
        from overtone.kernels import _cpu  # type: ignore[attr-defined]
    except ImportError:
        return None
    return _cpu if getattr(_cpu, "INTERFACE", None) == INTERFACE else None


@cache
def _warn_once() -> None:
    logger.warning(
        "overtone's C++ kernel was not built, so the loss on the CPU runs in PyTorch, several times as slow: without a "
        "compiler (g++ or clang++) overtone is installed without it; install it again with one"
    )


class CpuKernel:
    """`overtone.kernels.kernel.Kernel` in C++, with one of the kinds of vector instructions that it was built for.

    Args:
        variant: one of those in `library().VARIANTS`, of which the fastest comes first.
    """

    gradient_with_fit_up_to = 2**22

    def __init__(self, variant: int = 0) -> None:
        self._library = library()
        self._variant = variant

    def serves(self, logits: Tensor) -> bool:
        """Whether these logits can be worked on here; says so once if only the library is missing for it."""
        if not can_read(logits):
            return False
        if self._library is None and logits.numel() >= MISSED_FROM:
            _warn_once()
        return self._library is not None

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
        """As `overtone.kernels.kernel.Kernel.fit`; the gradient while a row's logits are in the cache."""
        assert self._library is not None
        coefficients = logits.new_empty((5, len(logits)), dtype=working_dtype(logits))
        token_loss, kl, row_weights = (coefficients.new_empty(len(logits)) for _ in range(3))
        loss = coefficients.new_empty(())
        labels = _in_memory(labels)
        is_in_range = self._library.fit(
            *self._tensors(logits, labels, coefficients, gradient),
            ignore_index,
            math.inf if target.n_sigma is None else target.n_sigma,
            target.lam,
            target.check,
            clip.epsilon,
            clip.correct_only,
            reduction == "mean",
            scale,
            *(tensor.data_ptr() for tensor in (loss, token_loss, kl, row_weights)),
            torch.get_num_threads(),
        )
        if not is_in_range:
            _raise_for(labels, logits.shape[1], ignore_index)
        return Fit(token_loss if reduction == "none" else loss, kl, coefficients, row_weights)

    def gradient(self, grad_kl: Tensor, logits: Tensor, labels: Tensor, coefficients: Tensor, *, out: Tensor) -> None:
        """As `overtone.kernels.kernel.Kernel.gradient`."""
        assert self._library is not None
        labels, grad_kl = _in_memory(labels), _in_memory(grad_kl)
        tensors = self._tensors(logits, labels, coefficients, out)
        self._library.gradient(*tensors, grad_kl.data_ptr(), torch.get_num_threads())

    def highest(self, logits: Tensor) -> Tensor:
        """As `overtone.kernels.kernel.Kernel.highest`."""
        return self._part(0, logits, 1)[0]

    def sums(self, logits: Tensor, top: Tensor) -> Tensor:
        """As `overtone.kernels.kernel.Kernel.sums`."""
        return self._part(1, logits, 5, top)

    def kept(self, logits: Tensor, top: Tensor, threshold: Tensor) -> Tensor:
        """As `overtone.kernels.kernel.Kernel.kept`."""
        return self._part(2, logits, 1, top, threshold)[0]

    def _part(self, which: int, logits: Tensor, values: int, *of_rows: Tensor) -> Tensor:
        assert self._library is not None
        out = logits.new_empty((values, len(logits)), dtype=working_dtype(logits))
        addresses = [tensor.data_ptr() for tensor in map(_in_memory, of_rows)]
        addresses += [0] * (2 - len(addresses))
        no_labels = logits.new_empty(0, dtype=torch.int64)
        tensors = self._tensors(logits, no_labels, out, None)
        self._library.part(which, *tensors, *addresses, torch.get_num_threads())
        return out

    def _tensors(
        self, logits: Tensor, labels: Tensor, coefficients: Tensor, gradient: Tensor | None
    ) -> tuple[int, ...]:
        return (
            self._variant,
            _STORAGES[logits.dtype],
            logits.data_ptr(),
            labels.data_ptr(),
            *logits.shape,
            logits.stride(0),
            coefficients.data_ptr(),
            coefficients.stride(0),
            *((0, 0) if gradient is None else (gradient.data_ptr(), gradient.stride(0))),
        )


def _raise_for(labels: Tensor, vocabulary: int, ignore_index: int) -> NoReturn:
    """Nothing was written, so nothing can be returned."""
    check_labels(labels, vocabulary, ignore_index)
    raise RuntimeError("labels were changed, by another thread, while the loss was worked out")
