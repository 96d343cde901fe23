"""How the lab's small models are trained, by architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: texts packed end to end into blocks, AdamW, learning rate warmed up and decayed to 0."""

    vocabulary: int = 600
    steps: int = 1400
    blocks: int = 16
    block_length: int = 64
    learning_rate: float = 4e-3
    warmup: float = 0.05
    weight_decay: float = 0.5


RECIPES: Mapping[str, Recipe] = {
    "llama": Recipe(),
    "qwen2": Recipe(),
    "mistral": Recipe(),
    "gpt2": Recipe(steps=1900),
}
"""What each architecture needs for a world; with learned positions, names are copied later than with rotary ones."""


def adapted(recipe: Recipe, arch: str) -> Recipe:
    """A llama's recipe for another architecture: as many times the steps as a world takes it."""
    return replace(recipe, steps=round(recipe.steps * RECIPES[arch].steps / RECIPES["llama"].steps))
