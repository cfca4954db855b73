"""Merging files on disk, as `temporal-merge merge` does, with what determines the result apart from execution options.

Invariant: an input is never overwritten, and nothing in `Execution` changes a byte of the result.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_service.errors import UserError

if TYPE_CHECKING:
    from merge_service.merge import MergeReport


@dataclass(frozen=True)
class FileMerge:
    """What is merged: a technique with its parameters, a base (or none), and experts, oldest first, into `out`.

    `parity` names the definitions in which `params` are given (`merge_service.parity`). `ids` name the experts; otherwise ids are
    derived from content. `strip_prefix` is removed from tensor names that begin with it. `any_base` also merges experts that
    cannot have been trained from the base. `statistics` are the files of what was measured of each expert. Without `replace`, an existing
    `out` is an error. `dtype` is that of the floats in the output, by default the base's. `texts` are files by name that a Hugging Face
    folder gets beside the weights. `as_study` names experts t1, t2, ... and records their sha256 alone: the file is then that of a
    study, or of a live service, to the byte.
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
    statistics: Sequence[Path | str | None] | None = None
    replace: bool = True
    dtype: str | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    as_study: bool = False


@dataclass(frozen=True)
class Execution:
    """Execution options; they never affect the result: `threads` here (all cores by default), `workers` of the Ray cluster at
    `address`, or a torch `device`; shards of at most `shard_size`, and whether thresholds are kept beside the experts.
    """

    threads: int | None = None
    workers: int = 1
    address: str | None = None
    device: str | None = None
    shard_size: str | None = None
    keep_thresholds: bool = False


@contextmanager
def nearby(what: FileMerge, how: Execution = Execution()) -> Iterator[FileMerge]:
    """The merge with folders of this machine in the place of remote inputs (`hf://`, `s3://`), for the length of a `with` block.

    Raises UserError for what cannot be reached, and for workers, which would each fetch for themselves.
    """
    paths = [*what.experts, *([what.base] if what.base else [])]
    if not any(":/" in str(path) for path in paths):
        yield what
        return
    from merge_service.techniques import get
    from pipeline.merging.remote.near import near

    get(what.technique)  # a misspelt name is found before anything is fetched
    with near(paths) as places:
        if places and (how.workers > 1 or how.address):
            raise UserError(
                "remote inputs are fetched by one process; leave --workers out, or load the models first"
            )
        found = {path: Path(places.get(str(path), path)) for path in paths}
        base = None if what.base is None else found[what.base]
        yield replace(what, base=base, experts=[found[path] for path in what.experts])


def merge_files(what: FileMerge, how: Execution = Execution()) -> "MergeReport":
    """Merge files, also remote ones. Raises UserError, also if `out` is an input, or exists and may not be replaced."""
    with nearby(what, how) as near:
        return _merged(near, how)


def _merged(what: FileMerge, how: Execution) -> "MergeReport":
    """Merge files of this machine. Raises UserError, also if `out` is an input, or exists and may not be replaced."""
    from merge_service.checkpoints import bytes_of, sha256_of
    from merge_service.merge import merge as combine
    from merge_service.merging import Rules
    from merge_service.timelines import translate_merge

    what = checked(what)
    split = None
    if how.workers > 1 or how.address:
        from pipeline.merging.split import split_over

        split = split_over(how.address or "local", how.workers, how.threads or 1)
    ids: Sequence[str | None] | None = what.ids
    sha256: dict[str, str] | None = None
    if what.as_study:
        if any(what.ids or ()):
            raise UserError("--as-study names the experts t1, t2, ...; leave --id out")
        names = [f"t{t}" for t in range(1, len(what.experts) + 1)]
        ids, sha256 = names, dict(zip(names, map(sha256_of, what.experts)))
    return combine(
        what.technique,
        translate_merge(what.technique, what.params, what.parity, len(what.experts)),
        what.base,
        what.experts,
        what.out,
        ids=ids,
        sha256=sha256,
        statistics=what.statistics,
        lineage=not what.as_study,
        rules=Rules(what.any_base, what.strip_prefix),
        threads=how.threads or (len(os.sched_getaffinity(0)) if split is None else 1),
        split=split,
        device=how.device,
        keep_thresholds=how.keep_thresholds,
        shard_bytes=bytes_of(how.shard_size) if how.shard_size else None,
        dtype=what.dtype,
        texts=what.texts,
    )


def checked(what: FileMerge) -> FileMerge:
    """The merge, settled. Raises UserError if `out` is an input, or exists and may not be replaced."""
    from merge_service.checkpoints import overwrites

    for path in (*what.experts, *([what.base] if what.base else [])):
        if overwrites(what.out, path):
            raise UserError(f"--out {what.out} is one of the inputs and would be lost; give another --out")
    measured = what.statistics if isinstance(what.statistics, list | tuple) else [what.statistics]
    read = [one for one in (*measured, what.params.get("coefficients")) if isinstance(one, str | Path)]
    if any(what.out.resolve() == Path(one).resolve() for one in read):
        raise UserError(f"--out {what.out} is one of the inputs and would be lost; give another --out")
    if not what.replace:
        refuse_to_replace(what.out)
    return settled(what)


def settled(what: FileMerge) -> FileMerge:
    """The merge with what its file of coefficients says in place of the file; any other merge as it is. Raises UserError."""
    given = what.params.get("coefficients")
    if not isinstance(given, str | Path):
        return what
    from merge_service.techniques import get
    from pipeline.merging.coefficients import read_coefficients, with_learned

    if get(what.technique).learned:
        params, files = with_learned(what.technique, what.params, len(what.experts))
        return replace(what, params=params, statistics=files)
    return replace(
        what, params={**what.params, "coefficients": read_coefficients(Path(given), what.technique)}
    )


def refuse_to_replace(out: Path) -> None:
    """Raise UserError if something exists at `out`: a file, a directory that is not empty, shards with their index.

    A directory in which a merge into shards was stopped before it had an index may be gone on with.
    """
    from merge_service.files import is_parts_folder

    index = out.parent / f"{out.name}.index.json"
    there = next((path for path in (out, index) if path.exists()), None)
    if there is None or (there.is_dir() and not any(there.iterdir())):
        return
    held = list(there.iterdir()) if there.is_dir() else []
    if any(map(is_parts_folder, held)) and not any(_is_whole(one.name) for one in held):
        return
    raise UserError(f"--out {there} is there already; give another --out, or replace it with --force")


def _is_whole(name: str) -> bool:
    """Whether a file of this name makes a directory a model."""
    return name.endswith(".index.json") or (name.endswith(".safetensors") and "-of-" not in name)


def ids_from(named: Sequence[str], experts: Sequence[Path]) -> list[str | None]:
    """The ids that NAME=FILE pairs give these experts, None for the others. Raises UserError for a file that is not among them."""
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
