"""The lab's losses in the words of EasyEdit's adapters: the value of `hparams.token_loss`."""

from __future__ import annotations

from typing import Any

from overtone.lab.edit.losses import NamedLoss

PRESETS = {"FT": "ft-m", "LoRA": "lora", "MELO": "melo", "WISE": "wise"}
"""EasyEdit's name of each method whose loss can be replaced, and whose values of the paper it takes."""


def token_loss(alg_name: str, loss: NamedLoss) -> dict[str, Any] | None:
    """What `hparams.token_loss` has to say for one of EasyEdit's methods to minimise this loss.

    Early stopping becomes cross-entropy held at the threshold: once the mean loss of the target tokens is at or below
    it, the tokens change nothing any more. FT-M then ends as it does of itself, LoRA and MELO go on without effect, and
    WISE still follows its activation loss.

    Args:
        alg_name: EasyEdit's name of the method.
        loss: one of the lab's.

    Returns:
        None for the method's own cross-entropy.

    Raises:
        ValueError: EasyEdit's method cannot minimise this loss; the message says why.
    """
    if alg_name not in PRESETS:
        if loss.overtone is None and not loss.label_smoothing and loss.stop_below is None:
            return None
        raise ValueError(
            f"{alg_name} cannot minimise {loss.name!r}: it optimises its value vector by a cross-entropy of its own; "
            "use the loss cross_entropy for it"
        )
    if not loss.is_dynamic:
        raise ValueError(
            f"{alg_name} cannot minimise {loss.name!r}: EasyEdit's trainers keep no logits from before the edit"
        )
    config = loss.config(PRESETS[alg_name])
    if config is not None:
        return {"name": "overtone_recommended" if loss.is_recommended else "overtone", **config.as_kwargs()}
    hold = {} if loss.stop_below is None else {"hold_settled": loss.stop_below}
    if loss.label_smoothing:
        return {"name": "label_smoothing", "smoothing": loss.label_smoothing, **hold}
    return {"name": "cross_entropy", **hold} if hold else None
