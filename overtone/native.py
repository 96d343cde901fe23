"""The closed form in C++ (closed_form.cpp), which PyTorch's own tooling builds at the first call that is worth it."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from functools import cache
from importlib.resources import files
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from overtone.checks import check_labels, working_dtype
from overtone.settings import TargetSettings

logger = logging.getLogger(__name__)

BUILD_FROM = 2**14
"""Logits of a call from which on it is worth the seconds that the first such call on a machine builds for."""

_STORAGES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


class Fit(NamedTuple):
    """What one call says of its rows.

    Attributes:
        loss: ``()``, the clipped KLs, reduced.
        kl, coefficients: ``(N,)`` and ``(5, N)``, as from `overtone.closed_form.kl_of_rows`; zeros where ignored.
        row_weights: ``(N,)``, what the gradient of each row's KL is multiplied by: 0 where settled or ignored.
    """

    loss: Tensor
    kl: Tensor
    coefficients: Tensor
    row_weights: Tensor


def native_for(logits: Tensor) -> Native | None:
    """The library's functions for these logits ``(N, V)``: None where they are few, on another device or not plain."""
    if (
        logits.numel() < BUILD_FROM
        or not logits.is_cpu
        # A subclass may have no memory of its own.
        or type(logits) not in (Tensor, nn.Parameter)
        or logits.dtype not in _STORAGES
        or logits.stride(1) != 1
        or logits.is_neg()
        # None, or freed.
        or (logits.data_ptr() == 0 and logits.numel() > 0)
        or _is_traced()
    ):
        return None
    return _load()


def _is_traced() -> bool:
    """Whether new tensors have no values, or a graph is recorded, which would not see what C++ does."""
    modes = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in (modes.FAKE, modes.PROXY))


def _in_memory(tensor: Tensor) -> Tensor:
    """With every value as it is at its place, one after the other."""
    return (tensor.clone() if tensor._is_zerotensor() else tensor).resolve_neg().contiguous()


@cache
def _load() -> Native | None:
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        return None
    try:
        from torch._inductor.codecache import CppCodeCache

        source = files("overtone").joinpath("closed_form.cpp").read_text(encoding="utf-8")
        were_flushed = _are_denormals_flushed()
        library = CppCodeCache.load(source)
        if _are_denormals_flushed() and not were_flushed:
            torch.set_flush_denormal(False)  # what torch 2.4 builds switches it on for whoever loads it
        return Native(library)
    except Exception as error:  # whatever a compiler raises, or an interface that other versions of torch do not have
        reason = str(error).partition("\n")[0] or type(error).__name__  # a compiler's goes on for a thousand lines
        logger.warning("the C++ code could not be built, so the loss runs without it, slower: %s", reason)
        logger.debug("in full:", exc_info=error)
        return None


def _are_denormals_flushed() -> bool:
    return sys.float_info.min / 2 == 0


class Native:
    """The functions of the library; each works through all rows of its logits ``(N, V)`` in one call."""

    def __init__(self, library: ctypes.CDLL) -> None:
        problem, settings, tensor = ctypes.POINTER(_Problem), ctypes.POINTER(_Settings), ctypes.c_void_p
        self._fit, self._gradient = library.overtone_fit, library.overtone_gradient
        self._fit.argtypes = [problem, settings, ctypes.POINTER(_Reduction), *[tensor] * 4, ctypes.c_int64]
        self._gradient.argtypes = [problem, tensor, tensor, ctypes.c_int64]
        self._gradient.restype = None

    def fit(
        self,
        logits: Tensor,
        labels: Tensor,
        settings: TargetSettings,
        ignore_index: int,
        *,
        epsilon: float = 0.0,
        hold_correct: bool = False,
        row_weight: float | None = 1.0,
        gradient: Tensor | None = None,
    ) -> Fit:
        """Everything about the rows at once, the gradient while their logits are in the cache.

        Args:
            logits: ``(N, V)``.
            labels: ``(N,)``, int64.
            settings: of the target.
            ignore_index: label of rows that do not count, and cost nothing.
            epsilon, hold_correct: as in `overtone.overtone_loss`.
            row_weight: what the reduction multiplies each row's loss by; None for the mean of those that count.
            gradient: ``(N, V)``, to write that of the loss by the logits to: the entries of each row one after the
                other, and in the place of the logits if need be. None where it is not wanted.

        Raises:
            ValueError: for a label out of range.
        """
        coefficients = logits.new_empty((5, len(logits)), dtype=working_dtype(logits))
        loss, kl, row_weights = (coefficients.new_empty(shape) for shape in ((), len(logits), len(logits)))
        labels = _in_memory(labels)
        problem = _problem(logits, labels, coefficients, ignore_index)
        reduction = _Reduction(epsilon, row_weight or 0, hold_correct, row_weight is None)
        outputs = (tensor.data_ptr() for tensor in (loss, kl, row_weights))
        where = (None, 0) if gradient is None else (gradient.data_ptr(), gradient.stride(0))
        if not self._fit(problem, _Settings(*settings.numbers()), reduction, *outputs, *where):
            _raise_for(labels, logits.shape[1], ignore_index)
        return Fit(loss, kl, coefficients, row_weights)

    def write_gradient(
        self, grad_kl: Tensor, logits: Tensor, labels: Tensor, coefficients: Tensor, *, out: Tensor
    ) -> None:
        """Write ``grad_kl * dKL/dlogits`` into out ``(N, V)``, which may be the logits themselves.

        Args:
            grad_kl: ``(N,)``; rows of which it is 0 get exact zeros, and cost little else.
            logits: as of `fit`, or a slice of their vocabulary.
            labels: ``(N,)``; one that is not in the slice is no part of its row.
            coefficients: of `fit`.
            out: the entries of each row one after the other.
        """
        labels, grad_kl = _in_memory(labels), _in_memory(grad_kl)
        problem = _problem(logits, labels, coefficients, ignore_index=0)
        self._gradient(problem, grad_kl.data_ptr(), out.data_ptr(), out.stride(0))


def _raise_for(labels: Tensor, vocabulary: int, ignore_index: int) -> NoReturn:
    """Nothing was written, so nothing can be returned."""
    check_labels(labels, vocabulary, ignore_index)
    raise RuntimeError("labels were changed, by another thread, while the loss was worked out")


class _Problem(ctypes.Structure):
    _fields_ = (
        ("storage", ctypes.c_int64),
        ("logits", ctypes.c_void_p),
        ("labels", ctypes.c_void_p),
        ("coefficients", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("vocabulary", ctypes.c_int64),
        ("logits_stride", ctypes.c_int64),
        ("coefficients_stride", ctypes.c_int64),
        ("ignore_index", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    )


class _Settings(ctypes.Structure):
    _fields_ = (("n_sigma", ctypes.c_double), ("lam", ctypes.c_double), ("check", ctypes.c_int64))


class _Reduction(ctypes.Structure):
    _fields_ = (
        ("epsilon", ctypes.c_double),
        ("row_weight", ctypes.c_double),
        ("hold_correct", ctypes.c_int64),
        ("is_mean", ctypes.c_int64),
    )


def _problem(logits: Tensor, labels: Tensor, coefficients: Tensor, ignore_index: int) -> _Problem:
    return _Problem(
        _STORAGES[logits.dtype],
        logits.data_ptr(),
        labels.data_ptr(),
        coefficients.data_ptr(),
        *logits.shape,
        logits.stride(0),
        coefficients.stride(0),
        ignore_index,
        torch.get_num_threads(),
    )
