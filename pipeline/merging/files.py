"""Merging files on disk, as `temporal-merge merge` does, with what makes the result apart from how it is carried out.

Invariant: an input is never overwritten, and nothing in `Execution` changes a byte of the result.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_service.errors import UserError

if TYPE_CHECKING:
    from merge_service.merge import MergeReport


@dataclass(frozen=True)
class FileMerge:
    """What is merged: a technique with its parameters, a base (or none), and experts, oldest first, into `out`.

    `parity` names whose terms `params` are in (`merge_service.parity`). `ids` name the experts, whose names otherwise come from their
    content. `strip_prefix` is taken off tensor names that begin with it; with `any_base` experts that cannot have been trained from the
    base are merged all the same.
    """

    technique: str
    params: Mapping[str, Any]
    base: Path | None
    experts: Sequence[Path]
    out: Path
    parity: str | None = None
    ids: Sequence[str | None] | None = None
    strip_prefix: str | None = None
    any_base: bool = False


@dataclass(frozen=True)
class Execution:
    """How a merge is carried out: by `threads` here (all cores by default), by `workers` of the Ray cluster at `address`, or on a torch
    `device`; in shards of `shard_size` at most, and whether thresholds are kept beside the experts."""

    threads: int | None = None
    workers: int = 1
    address: str | None = None
    device: str | None = None
    shard_size: str | None = None
    keep_thresholds: bool = False


def merge_files(what: FileMerge, how: Execution = Execution()) -> "MergeReport":
    """Merge files. Raises UserError, also if `out` is an input."""
    from merge_service.checkpoints import bytes_of, overwrites
    from merge_service.merge import merge as combine
    from merge_service.merging import Rules
    from merge_service.timelines import translate_merge

    for path in (*what.experts, *([what.base] if what.base else [])):
        if overwrites(what.out, path):
            raise UserError(f"--out {what.out} is one of the inputs and would be lost; give another --out")
    split = None
    if how.workers > 1 or how.address:
        from pipeline.merging.split import split_over

        split = split_over(how.address or "local", how.workers, how.threads or 1)
    return combine(
        what.technique,
        translate_merge(what.technique, what.params, what.parity, len(what.experts)),
        what.base,
        what.experts,
        what.out,
        ids=what.ids,
        lineage=True,
        rules=Rules(what.any_base, what.strip_prefix),
        threads=how.threads or (len(os.sched_getaffinity(0)) if split is None else 1),
        split=split,
        device=how.device,
        keep_limits=how.keep_thresholds,
        shard_bytes=bytes_of(how.shard_size) if how.shard_size else None,
    )


def ids_from(named: Sequence[str], experts: Sequence[Path]) -> list[str | None]:
    """The ids that NAME=FILE pairs give these experts, None for the others. Raises UserError for a file that is none of them."""
    ids: list[str | None] = [None] * len(experts)
    for pair in named:
        name, _, file = pair.partition("=")
        if not name.strip() or not file:
            raise UserError(f"--id {pair!r}: write NAME=FILE, e.g. --id animals=animals.safetensors")
        places = [at for at, expert in enumerate(experts) if expert == Path(file) and ids[at] is None]
        if not places:
            given = ", ".join(str(expert) for expert in experts[:5])
            raise UserError(
                f"--id {pair!r}: {file} is none of the experts that have no id yet ({given}); write it as there"
            )
        ids[places[0]] = name.strip()
    return ids
