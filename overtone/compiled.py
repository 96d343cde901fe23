"""Row functions fused by torch.compile where that pays, and as they stand where it does not or cannot be had."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

COMPILE_FROM = 2**17
"""Logits of a call from which on it is worth the seconds that the first such call compiles for."""

BLOCK_ELEMENTS = 2**19
"""How many logits to work through at a time uncompiled, in the cache and without much memory for what is in between."""


class Fused:
    """Functions over the rows of a tensor that torch.compile turns into one pass each, at the first large call.

    On the CPU, for which there is `overtone.native`, and without a compiler (no Triton, or ``TORCH_COMPILE_DISABLE=1``)
    they run as they stand.
    """

    def __init__(self, *functions: Callable[..., Any]) -> None:
        """Wrap functions; neither another number of rows, but for one, nor another vocabulary compiles them anew."""
        # torch.compile imports a compiler, which takes a second: not before there is something to compile.
        self._compiled: dict[Callable[..., Any], Callable[..., Any] | None] = dict.fromkeys(functions)

    def is_worthwhile(self, logits: Tensor) -> bool:
        """Whether a call with that many logits runs compiled."""
        return bool(self._compiled) and logits.device.type != "cpu" and logits.numel() >= COMPILE_FROM

    def rows_at_once(self, logits: Tensor) -> int:
        """How many rows ``(N, V)`` to work through in one call, without needing much memory for what is in between."""
        elements = 2**26 if self.is_worthwhile(logits) else BLOCK_ELEMENTS
        return max(1, elements // logits.shape[1])

    def call(self, function: Callable[..., Any], logits: Tensor, *arguments: Any) -> Any:
        """Call one of the functions, compiled if the call that it is a part of, with these logits, is large."""
        if not self.is_worthwhile(logits):
            return function(*arguments)
        try:
            compiled = self._compiled[function] or torch.compile(function, dynamic=True)
            self._compiled[function] = compiled
            # The compiler has functions of their own for views and for what has a graph; detached, all are alike.
            detached = [value.detach() if isinstance(value, Tensor) else value for value in arguments]
            return compiled(*detached)
        except torch._dynamo.exc.TorchDynamoException as error:
            # Raised while compiling, so before anything was computed.
            self._compiled.clear()
            logger.warning("torch.compile does not work here, so the loss runs without it, slower: %s", error)
            return function(*arguments)
