"""FT."""

from .ft_main import FTHyperParams, apply_ft_to_model, execute_ft

__all__ = ["FTHyperParams", "apply_ft_to_model", "execute_ft"]
