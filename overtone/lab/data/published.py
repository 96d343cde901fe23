"""Published editing data as JSON records whose faults are told by file, record and field."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Record:
    """A JSON object of a file, or of a field of another record."""

    def __init__(self, value: Any, place: str) -> None:
        """Take the value, and where it stands, for messages.

        Raises:
            ValueError: the value is no object.
        """
        if not isinstance(value, dict):
            raise ValueError(f"{place} must be an object, got {_brief(value)}")
        self._value = value
        self._place = place

    def __contains__(self, field: str) -> bool:
        """Whether the field is there and holds something."""
        return bool(self._value.get(field))

    def fault(self, field: str, what: str) -> ValueError:
        """The error that says what is wrong with a field."""
        return ValueError(f"{self._place}, field {field!r}: {what}")

    def text(self, field: str) -> str:
        """The field's text, without white space around it.

        Raises:
            ValueError: the field is missing, empty, or no text.
        """
        value = self._of(field)
        if not isinstance(value, str) or not value.strip():
            raise self.fault(field, f"expected a text, got {_brief(value)}")
        return value.strip()

    def texts(self, field: str) -> tuple[str, ...]:
        """The field's texts, given as one or in a list or in lists in a list; empty ones are left out."""
        found = tuple(self._flattened(field, self._of(field)))
        return tuple(dict.fromkeys(text.strip() for text in found if text.strip()))

    def answers(self, field: str) -> tuple[str, ...]:
        """`texts`, of which there must be one.

        Raises:
            ValueError: there is none.
        """
        texts = self.texts(field)
        if not texts:
            raise self.fault(field, "expected at least one answer, got none")
        return texts

    def record(self, field: str) -> Record:
        """The field's object."""
        return Record(self._of(field), f"{self._place}, field {field!r}")

    def records(self, field: str) -> list[Record]:
        """The field's list of objects."""
        value = self._of(field)
        if not isinstance(value, list):
            raise self.fault(field, f"expected a list, got {_brief(value)}")
        return [Record(item, f"{self._place}, field {field!r}, item {number}") for number, item in enumerate(value)]

    def groups(self, field: str) -> list[tuple[str, list[Record]]]:
        """The field's lists of objects by name; none where the field is missing or empty."""
        if field not in self:
            return []
        groups = self.record(field)
        return [(name, groups.records(name)) for name in groups._value if name in groups]

    def _of(self, field: str) -> Any:
        if field not in self._value:
            raise self.fault(field, "missing")
        return self._value[field]

    def _flattened(self, field: str, value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            for item in value:
                yield from self._flattened(field, item)
        else:
            raise self.fault(field, f"expected texts, got {_brief(value)}")


def read_records(path: Path, fields: tuple[str, ...]) -> list[Record]:
    """The records of a JSON file.

    Args:
        path: a file with a list of objects.
        fields: that every record has.

    Raises:
        ValueError: the file is not JSON, holds no list of objects, or a field is missing.
        OSError: it cannot be read.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, list) or not values:
        raise ValueError(f"{path} must hold a list of records, got {_brief(values)}")
    records = [Record(value, f"{path}, record {number}") for number, value in enumerate(values)]
    for record in records:
        for field in fields:
            if field not in record:
                raise record.fault(field, "missing or empty")
    return records


def sample(records: list[Record], size: int, *, seed: int, path: Path) -> list[Record]:
    """Some of a file's records, drawn with a seed.

    Raises:
        ValueError: ``size`` is none or more than the file has.
    """
    if not 1 <= size <= len(records):
        raise ValueError(f"size must be from 1 to {len(records)}, the records of {path}, got {size}")
    return random.Random(f"records {seed}").sample(records, size)


def take(items: list[Any], count: int, *, seed: int, what: str) -> list[Any]:
    """The first ``count`` items in an order drawn with a seed, so that a longer list begins with the shorter one.

    Raises:
        ValueError: there are not so many.
    """
    if not 1 <= count <= len(items):
        raise ValueError(f"count must be from 1 to {len(items)}, the {what}, got {count}")
    return random.Random(f"edits {seed}").sample(items, len(items))[:count]


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
