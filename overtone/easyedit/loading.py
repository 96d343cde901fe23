"""Getting the key past loaders that refuse unknown keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from overtone.easyedit.hparams import KEY


def read_yaml(path: str) -> dict[str, Any]:
    """The hparams file as EasyEdit's loaders find it: ``.yaml`` is added to a path without it."""
    import yaml

    with open(path if ".yaml" in path else path + ".yaml", encoding="utf-8") as stream:
        config = yaml.safe_load(stream)
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no hparams file: expected a mapping, got {type(config).__name__}")
    return config


def loader(stock: Callable[[type, str], Any], check: Callable[[dict[str, Any]], None]) -> Callable[[type, str], Any]:
    """A `from_hparams` that takes the key out of the file, loads the rest, and sets the key as an attribute.

    Args:
        stock: the class's own loader, unbound.
        check: raises where the file's token loss could not be used.
    """

    def from_hparams(cls: type, hparams_name_or_path: str) -> Any:
        import yaml

        path = str(hparams_name_or_path)
        config = read_yaml(path)
        if KEY not in config:
            return stock(cls, hparams_name_or_path)
        check(config)
        value = config.pop(KEY)
        with TemporaryDirectory() as folder:
            stripped = Path(folder, Path(path).name if ".yaml" in path else Path(path).name + ".yaml")
            stripped.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
            hparams = stock(cls, str(stripped))
        hparams.token_loss = value
        return hparams

    return from_hparams
