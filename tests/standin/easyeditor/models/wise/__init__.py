"""WISE."""

from .wise_main import WISEHyperParams, apply_wise_to_model

__all__ = ["WISEHyperParams", "apply_wise_to_model"]
