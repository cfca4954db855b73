"""A file of coefficients: factors of the experts' task vectors by tensor name or pattern, one per expert in their order.

A person's own table becomes parameters of the merge. A learned file goes to the technique that it was learned for, with the
parameters that it was learned with.

Invariant: what a merge depends on are the numbers, not the name or the place of the file.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge_service.checkpoints import Checkpoint
from merge_service.errors import UserError
from merge_service.files import absence
from merge_service.statistics import COEFFICIENTS, Statistics
from merge_service.techniques import get
from pipeline.study.yaml_input import parse

MOST = (1 << 24, 1 << 21)
"""Bytes and values of a file that is text."""


def read_coefficients(file: Path, technique: str) -> dict[str, list[float]]:
    """The table of a file: safetensors with tensors [N] by name or pattern, or YAML or JSON with lists. Raises UserError, also for one
    that was learned for another technique, whose rules for names without coefficients are not these.
    """
    if not file.is_file():
        raise UserError(f"{file} {absence(file)}; give a file of coefficients (.safetensors, .yaml or .json)")
    if file.suffix == ".safetensors":
        return _of_tensors(file, technique)
    if file.stat().st_size > MOST[0]:
        raise UserError(f"{file} is too large for a file of coefficients; check the path")
    try:
        text = file.read_text(encoding="utf-8")
        found: Any = (
            json.loads(text, object_pairs_hook=_once)
            if file.suffix == ".json"
            else parse(text, str(file), MOST)
        )
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} cannot be read as coefficients: {str(error).splitlines()[0]}") from None
    if not isinstance(found, dict):
        raise UserError(
            f"{file} must hold lists of numbers by tensor name or pattern, such as '*': [0.3, 0.3]"
        )
    return {str(key): value for key, value in found.items()}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises ValueError for a key that is given twice, of which the first would be lost."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is given twice")
        found[key] = value
    return found


def _of_tensors(file: Path, technique: str) -> dict[str, list[float]]:
    with Checkpoint.open(file) as held:
        if held.metadata.get("statistics") == COEFFICIENTS:
            with Statistics(file) as learned:
                raise UserError(
                    f"{file} was learned for {learned.about.technique}, so {technique} cannot read it: names without coefficients count "
                    f"otherwise there. Merge with {learned.about.technique}, or give {technique} a table of your own"
                )
        for name, info in held.tensors.items():
            if len(info.shape) != 1 or not info.kind.is_float:
                raise UserError(
                    f"{file}: {name} is {info.dtype} {list(info.shape)}; coefficients are one float per expert, [N]"
                )
        return {name: [float(one) for one in held.read(name)] for name in held.tensors}


def with_learned(
    technique: str, params: Mapping[str, Any], experts: int
) -> tuple[dict[str, Any], list[Path | str | None]]:
    """Parameters and statistics of a merge with a learned file (`params["coefficients"]`): what it was learned with is filled in.

    Raises UserError if there is no such file, or a parameter contradicts it.
    """
    file = Path(params["coefficients"])
    left = {key: value for key, value in params.items() if key != "coefficients"}
    if not file.is_file():
        raise UserError(
            f"{file} {absence(file)}; learn it: `temporal-merge learn {technique} EXPERT... --out {file}`"
        )
    known = {one.name for one in get(technique).params}
    with Statistics(file) as held:
        learned = {key: value for key, value in held.about.parameters.items() if key in known}
    for key, value in learned.items():
        if key in left and left[key] != value:
            raise UserError(
                f"{technique}: {key} = {left[key]!r}, and {file} was learned with {value!r}; leave {key} out, or learn again"
            )
    return {**learned, **left}, [file] * experts
