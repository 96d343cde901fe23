"""How a loss is written: a name, `name:field=value+field=value`, or a mapping with the name and the fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WORDS = {"true": True, "false": False, "none": None}


def read(value: object) -> tuple[str, dict[str, Any]]:
    """The name and the fields of a loss, as they are written; what they may be is not judged here.

    Raises:
        TypeError: neither a string nor a mapping.
        ValueError: a string with a part that is not `field=value`, or with a field twice; a mapping without a name.
    """
    if isinstance(value, str):
        return _read_text(value)
    if not isinstance(value, Mapping):
        raise TypeError(
            f"a loss must be a name, name:field=value+field=value, or a mapping with a name, got {value!r} of type "
            f"{type(value).__name__}"
        )
    fields = dict(value)
    name = fields.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f"a loss must have a name, got {name!r} in {value!r}")
    return name.strip(), {key: _read_field(field) for key, field in fields.items()}


def _read_field(value: Any) -> Any:
    """YAML has lists, and reads 5e-2 as a string."""
    if isinstance(value, list):
        return tuple(_read_field(part) for part in value)
    return read_value(value) if isinstance(value, str) else value


def _read_text(text: str) -> tuple[str, dict[str, Any]]:
    name, colon, written = (piece.strip() for piece in text.partition(":"))
    fields: dict[str, Any] = {}
    for part in written.split("+") if colon else ():
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise ValueError(f"loss {text!r}: {part!r} is not field=value; write {name}:field=value+field=value")
        if key in fields:
            raise ValueError(f"loss {text!r}: {key} is given twice")
        fields[key] = read_value(value)
    return name, fields


def read_value(text: str) -> Any:
    """A number, True, False or None, where the text is one; a tuple where it has commas; else the text itself."""
    text = text.strip()
    if "," in text:
        return tuple(read_value(part) for part in text.split(","))
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() else number


def write(name: str, fields: Mapping[str, Any]) -> str:
    """The spelling of a loss as one word, which `read` takes back."""
    written = "+".join(f"{key}={write_value(value)}" for key, value in fields.items())
    return f"{name}:{written}" if written else name


def write_value(value: Any) -> str:
    """One value of a field."""
    if isinstance(value, tuple):
        return ",".join(write_value(part) for part in value)
    if isinstance(value, float):
        return repr(int(value)) if value.is_integer() else repr(value)
    return str(value).lower()
