"""Tables of class frequencies, from which a stream in the order of frequency is made.

Invariant: a table that was read has every name once, with a finite count that is not negative; nothing is guessed.
"""

import csv
import io
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.study.mistakes import short
from pipeline.study.yaml_input import parse

READERS = ".csv, .json, .yaml or .yml"


def read_counts(path: Path) -> dict[str, float]:
    """Counts by name (a class, or DATASET+++class) from a CSV, JSON or YAML file.

    CSV: two columns, name and count; a first row whose count is not a number is the heading. JSON and YAML: one mapping
    of names to counts. YAML is read with the limits of study files and is for small tables. Raises ConfigError.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"stream.table: {path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"stream.table: {path} is not UTF-8 text") from None
    if path.suffix == ".csv":
        pairs: Iterable[tuple[str, Any]] = _rows(text, path)
    elif path.suffix == ".json":
        pairs = _json_pairs(text, path)
    elif path.suffix in (".yaml", ".yml"):
        pairs = _yaml_pairs(text, path)
    else:
        raise ConfigError(f"stream.table: {path} is of no known kind; write a {READERS} file")
    return _counts(pairs, path)


def _rows(text: str, path: Path) -> list[tuple[str, Any]]:
    try:
        rows = [(number, row) for number, row in enumerate(csv.reader(io.StringIO(text)), start=1) if row]
    except csv.Error as error:
        raise ConfigError(f"stream.table: {path} is not valid CSV: {error}") from None
    for number, row in rows:
        if len(row) != 2:
            raise ConfigError(
                f"stream.table: {path}, row {number}: {len(row)} columns; write name,count and put a name with a comma "
                'in "quotes"'
            )
    pairs = [(name, _number(count)) for _, (name, count) in rows]
    return pairs[1:] if pairs and isinstance(pairs[0][1], str) else pairs


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _json_pairs(text: str, path: Path) -> list[tuple[str, Any]]:
    try:
        pairs = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"stream.table: {path} is not valid JSON: {error}") from None
    if not text.lstrip().startswith("{"):
        raise ConfigError(f"stream.table: {path} must hold one mapping of names to counts")
    return pairs


def _yaml_pairs(text: str, path: Path) -> Iterable[tuple[str, Any]]:
    try:
        value = parse(text, str(path))
    except ConfigError as error:
        raise ConfigError(f"stream.table: {error} (a large table is better a .csv or .json file)") from None
    if not isinstance(value, dict):
        raise ConfigError(f"stream.table: {path} must hold one mapping of names to counts")
    return value.items()


def _counts(pairs: Iterable[tuple[str, Any]], path: Path) -> dict[str, float]:
    counts: dict[str, float] = {}
    for name, count in pairs:
        if name in counts:
            raise ConfigError(f"stream.table: {path} names {name!r} twice; remove one")
        if type(count) not in (int, float) or not math.isfinite(count) or count < 0:
            raise ConfigError(
                f"stream.table: {path}: the count of {name!r} is {short(count)}; it must be a number from 0 on"
            )
        counts[name] = float(count)
    return counts
