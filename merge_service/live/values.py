"""Frozen values as plain JSON and back, with one text for each value.

The log of a service is read by other processes and after years, so what is written is checked on the way in as strictly as a
file of a stranger.

Invariant: `of_plain(type, plain(value)) == value`, and equal values have equal texts. An unknown field, a missing one, or a field of
another type is a `ValueError` that names the place.
"""

import hashlib
import json
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Value = TypeVar("Value")
LATER: Mapping[str, bool] = {"later": True}
"""Metadata of a field that came after logs were written: its default is left out, so that what was written then keeps its text."""


def canonical(value: object) -> bytes:
    """The text of plain JSON: sorted keys, no spaces, UTF-8. Raises `ValueError` for NaN and for text that is not Unicode."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def digest(value: object) -> str:
    """sha256 of the text of plain JSON."""
    return hashlib.sha256(canonical(value)).hexdigest()


def plain(value: object) -> Any:
    """A frozen dataclass, and what it holds, as dict, list, str, int, float, bool and None."""
    if is_dataclass(value) and not isinstance(value, type):
        shown = [
            one
            for one in fields(value)
            if not ("later" in one.metadata and getattr(value, one.name) == one.default)
        ]
        return {one.name: plain(getattr(value, one.name)) for one in shown}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def of_plain(kind: type[Value], value: object, where: str = "$") -> Value:
    """The value of a type. Raises `ValueError`."""
    found: Value = _read(kind, value, where)
    return found


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _read(kind: Any, value: Any, where: str) -> Any:
    origin = get_origin(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        return _record(kind, value, where)
    if origin in (Union, types.UnionType):
        return _either(kind, value, where)
    if origin is tuple:
        if type(value) is not list:
            raise ValueError(f"{where} must be a list")
        return tuple(_read(get_args(kind)[0], item, f"{where}[{at}]") for at, item in enumerate(value))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if type(value) is not dict:
            raise ValueError(f"{where} must be a mapping")
        return {key: _read(get_args(kind)[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{where} is not one of {', '.join(map(str, get_args(kind)))}")
        return value
    if kind is object:
        return value
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{where} must be of type {getattr(kind, '__name__', kind)}")
    return value


def _either(kind: Any, value: Any, where: str) -> Any:
    if value is None and type(None) in get_args(kind):
        return None
    choices = [one for one in get_args(kind) if one is not type(None)]
    return _read(choices[0], value, where)


def _record(kind: Any, value: Any, where: str) -> Any:
    if type(value) is not dict:
        raise ValueError(f"{where} must be a mapping")
    known: dict[str, Field[Any]] = {one.name: one for one in fields(kind)}
    for name in value:
        if name not in known:
            raise ValueError(f"{where}.{name} is not a field of {kind.__name__}")
    found = {}
    for name, one in known.items():
        if name in value:
            found[name] = _read(_hints(kind)[name], value[name], f"{where}.{name}")
        elif one.default is MISSING and one.default_factory is MISSING:
            raise ValueError(f"{where}.{name} is missing")
    return kind(**found)
