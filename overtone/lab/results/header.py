"""What a results folder says of itself once: what its edits depend on, and the commands that made them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

from overtone.lab.results.misfits import misfits

FORMAT = "overtone bench 3"
"""What the header calls itself."""

_OF_MODEL = ("fingerprint", "file", "size")
"""What is compared of the models of one corpus and seed."""

_GROWING = ("commands", "data", "methods", "losses")
"""Lists to which another command may add."""


class _Model(TypedDict):
    data: str
    seed: int
    title: str
    knowledge: dict[str, float]
    perplexity: float | None
    fingerprint: str
    file: str | None
    size: int | None


class _Header(TypedDict):
    """What every header has, beside what it calls itself."""

    commands: list[list[str]]
    data: list[str]
    methods: list[str]
    losses: list[str]
    versions: dict[str, str]
    machine: str
    recommended: dict[str, str]
    held_out_texts: int
    models: list[_Model]


def require_header(header: dict[str, Any], path: Path) -> None:
    """Check that a file has what is read of a header.

    Args:
        header: the JSON object in the file.
        path: the file, for messages.

    Raises:
        ValueError: it is of another version, or a field is missing or of another type.
    """
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} is not of this version of overtone ({FORMAT}): choose another folder")
    wrong = misfits(header, _Header)
    if wrong:
        raise ValueError(
            f"{path} is not as overtone wrote it (missing or of the wrong type: {', '.join(wrong)}): "
            "choose another folder, or remove this file"
        )


def merged(earlier: dict[str, Any], now: dict[str, Any], path: Path) -> dict[str, Any]:
    """The header of both runs.

    Args:
        earlier: of the runs that the folder holds.
        now: of another run, which may have more methods, corpora, losses and seeds.
        path: the file of the earlier header, for messages.

    Raises:
        ValueError: as `require_header` for the earlier one, or the edits of the two depend on different things, so
            they must not be mixed.
    """
    require_header(earlier, path)
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
