"""Untrusted YAML as plain values, under limits: no code, no aliases, no deep nesting.

Invariant: the result is a tree of dict (text keys), list, str, int, finite float, bool and None; anything else is a
`ConfigError` with its place. Numbers follow YAML 1.2 (1e-5 is a number), repeated keys are refused, and whole numbers
are ints however they are written.
"""

import math
import re
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import ConfigError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 20
MAX_VALUES = 20_000
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_DOCUMENT = re.compile(r"^---[ \t]*(?:#.*)?$", re.MULTILINE)
_INT = r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"


class _Loader(_Base):
    """The safe loader with YAML 1.2 numbers, without dates, merge keys and repeated keys."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        mapping: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.YAMLError(
                    f"the key {key!r} in line {key_node.start_mark.line + 1} is not text; quote it"
                )
            if key in mapping:
                raise yaml.YAMLError(
                    f"the key {key!r} is given twice, again in line {key_node.start_mark.line + 1}"
                )
            mapping[key] = self.construct_object(value_node, deep=True)
        return mapping


def _whole_number(loader: Any, node: Any) -> int:
    text = node.value
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    if len(text) > 300:
        raise yaml.YAMLError(f"the number in line {node.start_mark.line + 1} has {len(text)} digits")
    return int(text.removeprefix("0o").removeprefix("0x"), base)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)
_Loader.add_constructor(
    "tag:yaml.org,2002:map", lambda loader, node: loader.construct_mapping(node, deep=True)
)


def read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError, which names the file."""
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror or error}; give the path of a file in YAML"
        ) from None
    value = parse(data, str(path))
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path} must hold a mapping (name: ..., model: ..., grid: ...), not {_kind(value)}"
        )
    return value


def parse(data: bytes | str, where: str, most: tuple[int, int] = (MAX_BYTES, MAX_VALUES)) -> Any:
    """The value of one YAML document within the limits: at most so many bytes and values. Raises ConfigError."""
    size, values = most
    if len(data) > size:
        raise ConfigError(f"{where} is larger than {size // 1024} kB; such a file is small, check the path")
    text = ""
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        _check_events(text, where, values)
        loader = _Loader(text)
        try:
            value = loader.get_single_data()
        finally:
            loader.dispose()
    except UnicodeDecodeError:
        raise ConfigError(f"{where} is not UTF-8 text") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{where} is not valid YAML: {_explain(error)}{_about_variables(error, text)}"
        ) from None
    problems = list(_check_values(value, "", where))
    if problems:
        raise ConfigError(problems)
    return _whole(value)


def read_all(path: Path) -> list[dict[str, Any]]:
    """The mappings in the documents of a YAML file, at least one. Raises ConfigError, which names the file."""
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
        text = data.decode("utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror or error}; give the path of a recipe"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text") from None
    found = []
    for part in _DOCUMENT.split(text):
        if any(line.strip() and not line.lstrip().startswith("#") for line in part.splitlines()):
            value = parse(part, str(path))
            if not isinstance(value, dict):
                raise ConfigError(f"{path} must hold a mapping of keys to values, not {_kind(value)}")
            found.append(value)
    if not found:
        raise ConfigError(f"{path} is empty; write a recipe")
    return found


def override(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set `key.path` in a tree, creating mappings as needed. Raises ConfigError if a part of the path is not a mapping."""
    parts = key.split(".")
    if not all(parts):
        raise ConfigError(f"--set {key}: write key.path=value, for instance recipe.lr=1e-4")
    for depth, part in enumerate(parts[:-1]):
        below = tree.setdefault(part, {})
        if not isinstance(below, dict):
            found = ".".join(parts[: depth + 1])
            raise ConfigError(
                f"--set {key}: {found} is {_kind(below)}, it has no key {parts[depth + 1]!r}; set {found} as a whole"
            )
        tree = below
    tree[parts[-1]] = value


def split_override(text: str) -> tuple[str, Any]:
    """The key path and the parsed value of `key.path=value`. Raises ConfigError."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text}: write key.path=value, for instance recipe.lr=1e-4")
    return key.strip(), parse(value, f"--set {key.strip()}")


def _check_events(text: str, where: str, most: int) -> None:
    """Refuse aliases, tags, deep nesting and several documents before any value is built."""
    depth, documents = 0, 0
    for count, event in enumerate(yaml.parse(text, Loader=_Base)):
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ConfigError(
                f"{where}, line {line}: anchors and aliases (& and *) are not allowed; write the value out"
            )
        tag = getattr(event, "tag", None)
        if tag not in (None, "!"):
            raise ConfigError(f"{where}, line {line}: the tag {tag} is not allowed; write a plain value")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ConfigError(f"{where}, line {line}: nested deeper than {MAX_DEPTH} levels")
        if count > most:
            raise ConfigError(f"{where}, line {line}: holds more than {most} values; such a file is small")
        documents += isinstance(event, yaml.DocumentStartEvent)
        if documents > 1:
            raise ConfigError(f"{where}, line {line}: holds more than one document (---); keep the first")


def _check_values(value: Any, key: str, where: str) -> Iterable[str]:
    place = f"{where}: {key}" if key else where
    if isinstance(value, dict):
        for name, item in value.items():
            if not _is_text(name):
                yield f"{place}: the key {name!r} holds characters that are not text; remove them"
            else:
                yield from _check_values(item, f"{key}.{name}" if key else name, where)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _check_values(item, f"{key}[{index}]", where)
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{place}: {value} is not a number one can compute with; give a finite one"
    elif isinstance(value, str) and not _is_text(value):
        yield f"{place}: {value[:40]!r} holds characters that are not text; remove them"
    elif not isinstance(value, str | int | float | None):
        yield f"{place}: a value of type {type(value).__name__} is not allowed; write a number or text"


def _is_text(value: str) -> bool:
    return not any((c < " " and c not in "\n\t") or "\ud800" <= c <= "\udfff" for c in value)


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def _kind(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", bool: "true or false", type(None): "empty"}
    return names.get(type(value), "a number")


def _explain(error: BaseException) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None)
    text = f"line {mark.line + 1}: {problem}" if mark is not None and problem else str(error)
    return " ".join(text.split())[:300]


def _about_variables(error: BaseException, text: str) -> str:
    """A hint if the line holds a variable: within { } and [ ], YAML reads the braces of a variable as its own."""
    mark, lines = getattr(error, "problem_mark", None), text.splitlines()
    near = lines[max(0, mark.line - 1) : mark.line + 1] if mark is not None else []
    found = next((found for line in near for found in re.findall(r"\$\{[^}]*\}[^,}\]\s]*", line)), None)
    return f'; put the value with the environment variable into quotes: "{found}"' if found else ""
