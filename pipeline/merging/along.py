"""Averages along a training run as files: the command `trajectory`, and what it leaves beside the models.

OUT/trajectory.json says which checkpoints and options the models in OUT are of. The same command goes on with what is missing; other
windows and shapes of the same checkpoints are added; anything else needs to replace what is there.

Invariant: the record in OUT never mixes averages of different checkpoints.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from merge_service.checkpoints import bytes_of, written
from merge_service.errors import UserError
from merge_service.trajectories import Average, Made, Places, average_along, averages_of, in_order, step_of
from pipeline.files.disk import write_whole

RECORD = "trajectory.json"


@dataclass(frozen=True)
class Along:
    """What is averaged: checkpoints of one run, windows (numbers of checkpoints) and shapes of weights, into the directory `out`.

    `every`: at every checkpoint at which a window is full, not only at the last. Without `replace`, averages of other checkpoints
    in `out` are an error.
    """

    checkpoints: Sequence[Path]
    out: Path
    windows: Sequence[int] = (4, 8, 16)
    shapes: Sequence[str] = ("mean", "linear", "1-sqrt", "ema")
    every: bool = False
    dtype: str | None = None
    shard_size: str | None = None
    replace: bool = False


@dataclass(frozen=True)
class Averaged:
    """The averages that were asked for, what was made, and the record in OUT."""

    averages: Sequence[Average]
    made: Made
    record: Mapping[str, Any]


def merge_along(what: Along, threads: int | None = None) -> Averaged:
    """Make all averages in one pass. Raises UserError for checkpoints that do not fit each other, or an `out` that holds others'."""
    paths = in_order(what.checkpoints)
    averages = averages_of(paths, what.windows, what.shapes, what.every)
    dtype = None if what.dtype is None else written(what.dtype)
    shard_bytes = None if what.shard_size is None else bytes_of(what.shard_size)
    held = [{"path": str(path.absolute()), "step": step_of(path)} for path in paths]
    asked = {"checkpoints": held, "dtype": dtype, "shard_bytes": shard_bytes}
    known = _earlier(what, asked)
    texts = {one.name: {"README.md": _card(one, paths)} for one in averages}
    places = Places(what.out, shard_bytes, dtype, texts)
    what.out.mkdir(parents=True, exist_ok=True)
    _write(what.out, {**asked, "averages": known})
    made = average_along(paths, averages, places, threads)
    notes = made.notes
    if list(what.checkpoints) != paths:
        notes = (
            f"checkpoints are taken by the step in their names: {', '.join(path.name for path in paths)}",
            *notes,
        )
    for one in averages:
        known[one.name] = {
            "path": str(made.paths[one.name].relative_to(what.out)), "shape": one.shape, "window": one.window,
            "until": paths[one.end].name, "weights": list(one.weights),
        }  # fmt: skip
    record = {**asked, "averages": known}
    _write(what.out, record)
    return Averaged(
        averages, Made(made.paths, made.checkpoints, made.written, made.kept, made.seconds, notes), record
    )


def _earlier(what: Along, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The averages that OUT holds of the same checkpoints. Raises UserError if it holds something else and may not be replaced."""
    file = what.out / RECORD
    if what.out.exists() and not what.out.is_dir():
        raise UserError(f"--out {what.out} is a file; give a directory")
    if not file.is_file():
        if not what.replace and what.out.is_dir() and any(what.out.iterdir()):
            raise UserError(f"--out {what.out} holds other files; give an empty or new directory, or --force")
        return {}
    try:
        found = json.loads(file.read_bytes())
        same = {key: found[key] for key in asked} == asked
        averages = dict(found["averages"])
    except (ValueError, KeyError, TypeError):
        same, averages = False, {}
    if same:
        return averages
    if not what.replace:
        raise UserError(
            f"--out {what.out} holds averages of other checkpoints or in another form ({RECORD} there); give another --out, or "
            "replace them with --force"
        )
    return {}


def _write(out: Path, record: Mapping[str, Any]) -> None:
    write_whole(out / RECORD, json.dumps(record, indent=2) + "\n", sync=True)


def _card(one: Average, paths: Sequence[Path]) -> str:
    """The model card of an average: what it is made of, by name."""
    inputs = [paths[at].name for at in one.places]
    front = {
        "tags": ["merge", "temporal-merge", "checkpoint-averaging"],
        "base_model": inputs,
        "library_name": "transformers",
    }
    rows = "\n".join(f"| {name} | {weight:.6g} |" for name, weight in zip(inputs, one.weights))
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n# An average along a training run\n\n"
        f"The last {one.window} checkpoints until {inputs[-1]}, with weights of the shape `{one.shape}`, by temporal-merge "
        f"(`temporal-merge trajectory`).\n\n| checkpoint | weight |\n|---|---|\n{rows}\n"
    )
