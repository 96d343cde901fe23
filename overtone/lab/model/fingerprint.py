"""A checksum of a model, by which an edit that was not taken back shows."""

from __future__ import annotations

import hashlib
from typing import Any

import torch


def fingerprint(model: Any) -> str:
    """A checksum of a model's state: two models with the same one are the same, bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {_checksum(tensor)}".encode())
    return digest.hexdigest()


_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 2**24
_SPREAD = 0x9E3779B97F4A7C15 - 2**64  # of multiplicative hashing, as int64: neighbours get very different weights


def _checksum(tensor: torch.Tensor) -> int:
    """The weighted sum of a tensor's words modulo 2**64, on its own device: quick where copying billions would not be.

    The weights are odd, and so have an inverse: a change of one word always shows.
    """
    words = tensor.detach().contiguous().flatten().view(_WORDS[tensor.element_size()])
    total = 0
    for number, chunk in enumerate(words.split(_CHUNK)):
        weights = torch.arange(len(chunk), device=chunk.device).add_(number * _CHUNK).mul_(_SPREAD).bitwise_or_(1)
        total += int((chunk.long() * weights).sum())
    return total % 2**64
