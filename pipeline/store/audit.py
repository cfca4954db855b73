"""Verification of a whole store: every byte, every record, every lineage edge.

Invariant: an audit changes nothing and may run while others write; what they move or add meanwhile is not a problem.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from pipeline.errors import CorruptArtifact
from pipeline.identity import step_fingerprint
from pipeline.store.artifact import PACKED, Record, difference, list_files, read_record


class Readable(Protocol):
    """The part of a store that an audit needs."""

    @property
    def root(self) -> Path: ...
    def find(self, fingerprint: str) -> Record | None: ...


def problems(
    store: Readable, kinds: Sequence[str], progress: Callable[[Path], None] | None = None
) -> list[str]:
    """All problems of a store, each naming a path; empty if it is sound. `progress` is called with each artifact."""
    found: list[str] = []
    if not store.root.is_dir():
        return [f"{store.root} does not exist: there is no store"]
    for kind in kinds:
        for directory in sorted((store.root / kind).glob("*")):
            if progress is not None:
                progress(directory)
            wrong = list(_artifact(store, kind, directory))
            if wrong and directory.exists():
                found.extend(wrong)
    return found


def _artifact(store: Readable, kind: str, directory: Path) -> Iterator[str]:
    if not directory.is_dir() or directory.is_symlink():
        yield f"{directory} does not belong in a store"
        return
    try:
        record = read_record(directory)
        present = set(list_files(directory))
    except CorruptArtifact as error:
        yield str(error)
        return
    yield from _identity(record, kind, directory)
    for name, entry in record.files.items():
        if record.is_made and name in record.droppable and name not in present:
            continue  # it can be made again as long as its inputs are whole, which their own checks and `lineage` say
        problem = difference(directory, name, entry)
        if problem is not None:
            yield problem
    packed = {name for name in present if name.startswith(PACKED)} if record.held == "packed" else set[str]()
    if record.held == "packed" and not packed:
        yield f"{directory}: its weights are packed, and the packed file is gone"
    for name in sorted(present - set(record.files) - packed):
        yield f"{directory / name} is not in the artifact's record"
    yield from lineage(store, record)


def _identity(record: Record, kind: str, directory: Path) -> Iterator[str]:
    if record.kind != kind:
        yield f"{directory} lies under {kind}, its record says {record.kind}"
    if directory.name != f"{record.slug}-{record.fingerprint[:16]}":
        yield f"{directory} is not named after its record ({record.slug}-{record.fingerprint[:16]})"
    if step_fingerprint(record.kind, record.spec) != record.fingerprint:
        yield f"{directory}: its fingerprint is not that of the spec in its record"


def lineage(store: Readable, record: Record) -> Iterator[str]:
    """The problems of the inputs that a record names."""
    for role, fingerprint in record.inputs.items():
        source = store.find(fingerprint)
        if source is None:
            yield f"{record.path}: its input {role} ({fingerprint[:16]}) is not in the store"
        elif record.input_digests.get(role, source.digest) != source.digest:
            yield f"{record.path}: its input {role} has other bytes now ({source.path}) than when it was made"
