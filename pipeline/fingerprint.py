"""Identity of values: equal meaning gives equal sha256, on any machine, in any process, whatever the order of keys.

Invariant: a value has a fingerprint only if its text can never change by itself. Everything else (NaN, sets, objects,
paths, numpy scalars, keys that are not text) raises `TypeError` naming where in the value it stands.

The text is JSON in the manner of RFC 8785: keys sorted, no spaces, and one spelling per number, so 1 and 1.0 agree.
"""

import hashlib
import math
from json.encoder import encode_basestring
from typing import Any

_EXACT_INTEGERS = 2**53
_MAX_DEPTH = 64


def fingerprint(value: Any) -> str:
    """sha256, as 64 hex digits, of the canonical text of `value`. Raises `TypeError` on values with no stable form."""
    return hashlib.sha256(_bytes(value)).hexdigest()


def step_fingerprint(kind: str, spec: dict[str, Any]) -> str:
    """Fingerprint of a step: its kind and the spec of all that bears on its result, nothing else."""
    return fingerprint({"kind": kind, "spec": spec})


def canonical(value: Any) -> str:
    """The canonical text itself. Raises `TypeError` on values with no stable form."""
    return _bytes(value).decode("utf-8")


def _bytes(value: Any) -> bytes:
    parts: list[str] = []
    _write(value, "$", 0, parts.append)
    try:
        return "".join(parts).encode("utf-8")
    except UnicodeEncodeError:
        raise TypeError("$: text with a lone surrogate has no stable form; no fingerprint") from None


def _write(value: Any, where: str, depth: int, emit: Any) -> None:
    if depth > _MAX_DEPTH:
        raise TypeError(f"{where}: nested deeper than {_MAX_DEPTH} levels; no fingerprint")
    kind = type(value)
    if kind is str:
        emit(encode_basestring(value))
    elif value is None or kind is bool:
        emit("null" if value is None else "true" if value else "false")
    elif kind is int:
        emit(str(value))
    elif kind is float:
        emit(_number(value, where))
    elif kind is dict:
        _write_object(value, where, depth, emit)
    elif kind is list or kind is tuple:
        emit("[")
        for index, item in enumerate(value):
            if index:
                emit(",")
            _write(item, f"{where}[{index}]", depth + 1, emit)
        emit("]")
    else:
        raise TypeError(
            f"{where}: a value of type {kind.__module__}.{kind.__qualname__} has no stable form; no fingerprint"
        )


def _write_object(value: dict[Any, Any], where: str, depth: int, emit: Any) -> None:
    for key in value:
        if type(key) is not str:
            raise TypeError(f"{where}: the key {key!r} is not text; no fingerprint")
    emit("{")
    for index, key in enumerate(sorted(value)):
        if index:
            emit(",")
        emit(encode_basestring(key))
        emit(":")
        _write(value[key], f"{where}.{key}", depth + 1, emit)
    emit("}")


def _number(value: float, where: str) -> str:
    if not math.isfinite(value):
        raise TypeError(f"{where}: {value} has no stable form; no fingerprint")
    if value.is_integer() and abs(value) < _EXACT_INTEGERS:
        return str(int(value))
    return repr(value)
