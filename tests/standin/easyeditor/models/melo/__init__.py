"""MELO."""

from .melo import LORA, MELOHyperParams


def apply_melo_to_model(model, tok, requests, hparams):
    editor = LORA(model, hparams)
    for request in requests:
        editor.edit(request)
    return editor


__all__ = ["MELOHyperParams", "apply_melo_to_model"]
