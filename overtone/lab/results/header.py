"""What a results folder says of itself once: what its edits depend on, and the commands that made them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FORMAT = "overtone bench 3"
"""What the header calls itself."""

_OF_MODEL = ("fingerprint", "file", "size")
"""What is compared of the models of one corpus and seed."""

_GROWING = ("commands", "data", "methods", "losses")
"""Lists to which another command may add."""


def merged(earlier: dict[str, Any], now: dict[str, Any], path: Path) -> dict[str, Any]:
    """The header of both runs.

    Args:
        earlier: of the runs that the folder holds.
        now: of another run, which may have more methods, corpora, losses and seeds.
        path: the file of the earlier header, for messages.

    Raises:
        ValueError: the edits of the two depend on different things, so they must not be mixed.
    """
    if earlier.get("format") != FORMAT:
        raise ValueError(f"{path} is not of this version of overtone ({FORMAT}): choose another folder")
    before, after = _dependencies(earlier), _dependencies(now)
    different = sorted(key for key in before.keys() & after if before[key] != after[key])
    if different:
        raise ValueError(
            f"{path.parent} holds the edits of a run with another {', '.join(different)}: "
            "choose another folder, or remove this one"
        )
    models = {(model["data"], model["seed"]): model for model in (*earlier["models"], *now["models"])}
    return {
        **now,
        **{name: _united(earlier[name], now[name]) for name in _GROWING},
        "versions": {**earlier["versions"], **now["versions"]},
        "models": list(models.values()),
    }


def _united(one: list[Any], other: list[Any]) -> list[Any]:
    return one + [item for item in other if item not in one]


def _dependencies(header: dict[str, Any]) -> dict[str, Any]:
    """What records depend on, by a name that a message can use."""
    return {
        "number of held-out texts": header["held_out_texts"],
        "choice of --generate": header.get("generate", False),
        **{f"version of {name}": number for name, number in header["versions"].items()},
        **{f"recommended setting of {name}": text for name, text in header["recommended"].items()},
        **{
            f"{key} of {model['data']} with seed {model['seed']}": model[key]
            for model in header["models"]
            for key in _OF_MODEL
        },
    }
