"""Replacing attributes of other people's modules so that every one can be put back, identical."""

from __future__ import annotations

import sys
from typing import Any

_MISSING = object()


class Patches:
    """A stack of replaced attributes and items; `undo` puts back what was there, by identity, last first."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, Any, Any, bool]] = []

    def attribute(self, owner: Any, name: str, value: object) -> None:
        """Set ``owner.name``; class attributes are kept raw, so that a classmethod comes back as the same object."""
        self._undo.append((owner, name, vars(owner).get(name, _MISSING), False))
        setattr(owner, name, value)

    def item(self, mapping: dict[str, Any], key: str, value: object) -> None:
        """Set ``mapping[key]``, which exists."""
        self._undo.append((mapping, key, mapping[key], True))
        mapping[key] = value

    def everywhere(self, package: str, name: str, value: object, original: object) -> None:
        """Set every module attribute of the package that is the original: ``from x import name`` made copies of it."""
        for module_name, module in list(sys.modules.items()):
            if module_name.split(".")[0] == package and getattr(module, "__dict__", {}).get(name) is original:
                self.attribute(module, name, value)

    def undo(self) -> None:
        """Put everything back; harmless when there is nothing to put back."""
        while self._undo:
            owner, name, original, is_item = self._undo.pop()
            if is_item:
                owner[name] = original
            elif original is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
