"""Fingerprints of values: equal meaning gives equal sha256, on any machine, in any process, for any order of keys.

Invariant: a value has a fingerprint only if its text can never change by itself. Everything else (NaN, sets, objects,
paths, numpy scalars, keys that are not text) raises `TypeError`, which names the place in the value.

The text is JSON in the manner of RFC 8785: sorted keys, no spaces, and one spelling per number, so 1 and 1.0 agree.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import Any, TypeVar

_EXACT_INTEGERS = 2**53
_MAX_DEPTH = 64

Kept = TypeVar("Kept")
Where = tuple[str | int, Any]


class Texts:
    """Canonical texts of values that are part of many others, each computed once. These values are kept here and must
    not change.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Any, str]] = {}

    def keep(self, value: Kept) -> Kept:
        """Cache the text of a value and return the value."""
        if id(value) not in self._kept:
            self._kept[id(value)] = value, canonical(value, self)
        return value

    def of(self, value: Any) -> str | None:
        """The cached text of this object, if any."""
        found = self._kept.get(id(value))
        return None if found is None else found[1]


def fingerprint(value: Any, texts: Texts | None = None) -> str:
    """sha256, as 64 hex digits, of the canonical text of `value`. Raises `TypeError` for a value without a stable form."""
    return hashlib.sha256(_bytes(value, texts)).hexdigest()


def step_fingerprint(kind: str, spec: dict[str, Any], texts: Texts | None = None) -> str:
    """Fingerprint of a step: its kind and its spec, which holds everything that determines the result and nothing else."""
    return fingerprint({"kind": kind, "spec": spec}, texts)


def canonical(value: Any, texts: Texts | None = None) -> str:
    """The canonical text of a value. Raises `TypeError` for a value without a stable form."""
    return _bytes(value, texts).decode("utf-8")


def _bytes(value: Any, texts: Texts | None) -> bytes:
    parts: list[str] = []
    _Writer(parts.append, texts or Texts()).write(value, ("$", None), 0)
    try:
        return "".join(parts).encode("utf-8")
    except UnicodeEncodeError:
        raise TypeError("$: text with a lone surrogate has no stable form; no fingerprint") from None


@dataclass(frozen=True)
class _Writer:
    """Writes one value; `where` is the path to it, last part first."""

    emit: Callable[[str], None]
    texts: Texts

    def write(self, value: Any, where: Where, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise TypeError(f"{_place(where)}: nested deeper than {_MAX_DEPTH} levels; no fingerprint")
        kind = type(value)
        if kind is str:
            self.emit(encode_basestring(value))
        elif value is None or kind is bool:
            self.emit("null" if value is None else "true" if value else "false")
        elif kind is int:
            self.emit(str(value))
        elif kind is float:
            self.emit(_number(value, where))
        elif kind is dict or kind is list or kind is tuple:
            known = self.texts.of(value)
            if known is not None:
                self.emit(known)
            else:
                (self._object if kind is dict else self._array)(value, where, depth)
        else:
            raise TypeError(
                f"{_place(where)}: a value of type {kind.__module__}.{kind.__qualname__} has no stable form; no fingerprint"
            )

    def _array(self, value: Any, where: Where, depth: int) -> None:
        self.emit("[")
        for index, item in enumerate(value):
            if index:
                self.emit(",")
            self.write(item, (index, where), depth + 1)
        self.emit("]")

    def _object(self, value: dict[Any, Any], where: Where, depth: int) -> None:
        for key in value:
            if type(key) is not str:
                raise TypeError(f"{_place(where)}: the key {key!r} is not text; no fingerprint")
        self.emit("{")
        for index, key in enumerate(sorted(value)):
            if index:
                self.emit(",")
            self.emit(encode_basestring(key))
            self.emit(":")
            self.write(value[key], (key, where), depth + 1)
        self.emit("}")


def _place(where: Where) -> str:
    """The path as text: $.key[3]."""
    part, before = where
    if before is None:
        return str(part)
    return f"{_place(before)}[{part}]" if isinstance(part, int) else f"{_place(before)}.{part}"


def _number(value: float, where: Where) -> str:
    if not math.isfinite(value):
        raise TypeError(f"{_place(where)}: {value} has no stable form; no fingerprint")
    if value.is_integer() and abs(value) < _EXACT_INTEGERS:
        return str(int(value))
    return repr(value)
