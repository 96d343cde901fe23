"""A checksum of a model, by which an edit that was not taken back shows."""

from __future__ import annotations

import hashlib
import zlib
from typing import Any

import torch


def fingerprint(model: Any) -> str:
    """A checksum of a model's state: two models on one kind of device with the same one are the same, bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {_checksum(tensor)}".encode())
    return digest.hexdigest()


_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 2**24
_SPREAD = 0x9E3779B97F4A7C15 - 2**64  # of multiplicative hashing, as int64: neighbours get very different weights


def _checksum(tensor: torch.Tensor) -> int:
    """A number of a tensor's words which a change of one of them always changes, worked out on its own device."""
    words = tensor.detach().contiguous().flatten().view(_WORDS[tensor.element_size()])
    # CRC-32 sees every change within 32 bits, and so within a word of that size.
    is_quick = words.device.type == "cpu" and words.element_size() <= 4
    return zlib.crc32(words.numpy().data) if is_quick else _weighted_sum(words)


def _weighted_sum(words: torch.Tensor) -> int:
    """Modulo 2**64: quick where copying billions of words to the CPU would not be.

    The weights are odd, and so have an inverse: a change of one word always shows.
    """
    total = 0
    for number, chunk in enumerate(words.split(_CHUNK)):
        weights = torch.arange(len(chunk), device=chunk.device).add_(number * _CHUNK).mul_(_SPREAD).bitwise_or_(1)
        total += int((chunk.long() * weights).sum())
    return total % 2**64
