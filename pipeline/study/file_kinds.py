"""The kinds of YAML files that users have, so that an error can name a file that is of the wrong kind for a command.

Invariant: a file is refused here only for keys that the other kind has and the expected kind never has.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import ConfigError

Kind = Literal["study", "suite", "recipe"]

_NAMES = {"study": "a study", "suite": "a suite of datasets", "recipe": "a merge recipe of another tool"}
_WAYS = {
    "study": "`temporal-merge plan` checks a study and the data that it names, `temporal-merge run` runs it",
    "suite": "`temporal-merge check SUITE.yaml --root DIR` takes it, and a study names it under data.suite",
    "recipe": "write its method and parameters as `temporal-merge merge --technique NAME --set p=v --base B --out M E1 E2`",
}


def expect(kind: Kind, raw: Mapping[str, Any], path: Path) -> None:
    """Raise `ConfigError` if a file that should be of `kind` is clearly of another."""
    found = _kind(raw.keys())
    if found is not None and found != kind:
        raise ConfigError(f"{path} is {_NAMES[found]}, not {_NAMES[kind]}: {_WAYS[found]}")


def _kind(keys: Any) -> Kind | None:
    if "merge_method" in keys:
        return "recipe"
    if "datasets" in keys and not keys & {"grid", "model", "budget"}:
        return "suite"
    return "study" if {"model", "grid"} <= keys and "datasets" not in keys else None
