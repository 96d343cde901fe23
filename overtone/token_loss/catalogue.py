"""Every loss that has a name."""

from __future__ import annotations

from collections.abc import Mapping

from overtone.config import OverToneConfig
from overtone.token_loss.anchor_fields import NO_ANCHOR
from overtone.token_loss.cross_entropy import cross_entropy, dft, eaft, gem
from overtone.token_loss.overtone import OverTone
from overtone.token_loss.plain import Number, PlainLoss

NAMED_LOSSES: Mapping[str, PlainLoss | OverTone] = {
    "cross_entropy": PlainLoss("cross-entropy", cross_entropy, takes_anchor=True),
    "label_smoothing": PlainLoss(
        "label smoothing {smoothing:g}", cross_entropy, {"smoothing": Number(0.1, 0.0, 1.0)}, distance=cross_entropy
    ),
    "dft": PlainLoss("DFT", dft, distance=cross_entropy),
    "gem": PlainLoss("GEM, beta {beta:g}", gem, {"beta": Number(0.7, 0.01, 100.0)}, distance=cross_entropy),
    "eaft": PlainLoss("EAFT, top {top_k}", eaft, {"top_k": Number(20, 2, 10**6)}, distance=cross_entropy),
    "overtone": OverTone("OverTone", OverToneConfig.preset, {"check": True, "hold": None, **NO_ANCHOR}),
    "overtone_recommended": OverTone("OverTone, recommended", OverToneConfig.recommended, {}),
}
"""By name; each has `defaults` (its fields), `title`, `config` and `build`."""
