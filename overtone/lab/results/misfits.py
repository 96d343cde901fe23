"""Whether a JSON value is of the type that its reader takes it to be."""

from __future__ import annotations

import sys
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict


def misfits(value: Any, kind: Any, place: str = "") -> list[str]:
    """The places at which a value is missing or of another type.

    Args:
        value: as `json.loads` gives it.
        kind: a dataclass, a TypedDict, a list or dict of a type, a union, float (any finite number), another type of
            JSON's, or Any.
        place: what the value is called in the answer.

    Returns:
        Such as "[0].scores.accuracy['rel']".
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return []
    if origin in (Union, UnionType):
        of_each = [misfits(value, one, place) for one in arguments]
        return min(of_each, key=bool)  # none where one of the types fits, else those of the first
    if origin is list and isinstance(value, list):
        return [wrong for index, item in enumerate(value) for wrong in misfits(item, arguments[0], f"{place}[{index}]")]
    if origin is dict and isinstance(value, dict):
        return [wrong for key, item in value.items() for wrong in misfits(item, arguments[1], f"{place}[{key!r}]")]
    if (is_dataclass(kind) or is_typeddict(kind)) and isinstance(value, dict):
        return _misfits_of_fields(value, kind, place)
    return [] if _is(value, kind) else [place]


def _misfits_of_fields(values: dict[str, Any], kind: Any, place: str) -> list[str]:
    types, may_be_missing = _fields(kind)
    wrong = []
    for name, type_of_field in types.items():
        called = f"{place}.{name}".lstrip(".")
        if name in values:
            wrong += misfits(values[name], type_of_field, called)
        elif name not in may_be_missing:
            wrong.append(called)
    return wrong


@cache
def _fields(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """The types of the fields, and which fields have a default."""
    own = fields(kind) if is_dataclass(kind) else ()
    has_default = (field.name for field in own if (field.default, field.default_factory) != (MISSING, MISSING))
    return get_type_hints(kind), frozenset(has_default)


def _is(value: Any, kind: Any) -> bool:
    if kind is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    # Not isinstance: a bool is no number here.
    return type(value) is kind
