"""The store on object storage, with the same guarantees as on a file system but without renames.

Layout: `URL/<kind>/<fingerprint>/record.json`, with the files in `URL/<kind>/<fingerprint>/<digest of all files>/`, so
that equal results share keys and different results never do. Files are uploaded first. The record is created last and
exclusively; it is the commit. A copy under `results/`, written just before it, reveals a rival result where creation is
not exclusive.
Invariant: an artifact is what the record at its one key says, and every byte read is checked against it. The local
mirror at `root` (the same path on every node) holds only copies, which are made again when missing or wrong.
"""

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import ClassVar

from merge_service.faults import point
from merge_service.files import Made
from pipeline.errors import CorruptArtifact, StoreError, StoreUnwritable
from pipeline.files.ownership import locked, owner_mark
from pipeline.identity import fingerprint as digest_of
from pipeline.kinds.table import KINDS
from pipeline.store import audit
from pipeline.store.artifact import (
    RECORD_FILE,
    AtCommit,
    Record,
    conflict,
    difference,
    differences,
    parse_record,
    read_record,
    write_record,
)
from pipeline.store.lease import Shelf
from pipeline.store.local import StepLike, Store
from pipeline.store.names import DIGITS
from pipeline.store.objects import Objects

MIRROR = "TEMPORAL_MERGE_MIRROR"
_FETCH_SECONDS = 6 * 3600.0


@dataclass(frozen=True)
class ObjectStore(Store):
    """A store at `url`, mirrored at `root`. `always` are fingerprints that every step reads besides its inputs (the base).

    It holds two locations and no secret, so it can be pickled.
    """

    url: str
    always: tuple[str, ...] = ()
    poll_seconds: ClassVar[float] = 5.0

    @classmethod
    def at(cls, url: str, always: tuple[str, ...] = ()) -> "ObjectStore":
        """The store at a URL, with its mirror below TEMPORAL_MERGE_MIRROR or the temporary directory of this node."""
        url = url.rstrip("/")
        home = os.environ.get(MIRROR) or Path(tempfile.gettempdir()) / f"temporal-merge-{os.getuid()}"
        return cls(Path(home) / sha256(url.encode()).hexdigest()[:16], url, always)

    @cached_property
    def objects(self) -> Objects:
        return Objects(self.url)

    @property
    def shelf(self) -> Shelf:
        return self.objects

    @property
    def where(self) -> str:
        return self.url

    def prepare(self) -> None:
        """Check that the URL and the mirror are writable, and remove stages of dead writers from the mirror."""
        self._open_mirror()
        key = f".stage/probe.{owner_mark()}.{uuid.uuid4().hex[:8]}"
        try:
            self.objects.write(key, b"probe")
            self.objects.remove(key)
        except FileNotFoundError as error:
            raise StoreUnwritable(
                f"{self.url} cannot be written: there is no such bucket ({error})"
            ) from error

    def has(self, kind: str, fingerprint: str) -> bool:
        return self.record(kind, fingerprint) is not None

    def record(self, kind: str, fingerprint: str) -> Record | None:
        text = self.objects.read(_key(kind, fingerprint))
        if text is None:
            return None
        try:
            record = parse_record(
                text, f"{self.url}/{_key(kind, fingerprint)}", self._own_path(kind, fingerprint, "-")
            )
        except CorruptArtifact:
            return None
        return record if (record.kind, record.fingerprint) == (kind, fingerprint) else None

    def find(self, fingerprint: str) -> Record | None:
        found = (self.record(kind, fingerprint) for kind in KINDS)
        return next((record for record in found if record is not None), None)

    def records(self, kind: str) -> Iterator[Record]:
        for key in sorted(self.objects.sizes(kind)):
            if key.endswith(f"/{RECORD_FILE}") and key.count("/") == 2:
                record = self.record(kind, key.split("/")[1])
                if record is not None:
                    yield record

    def open_verified(self, record: Record) -> Path:
        """The artifact's directory in this node's mirror, fetched if needed, with every file checked against the record."""
        home = self._own_path(record.kind, record.fingerprint, "-")
        local = replace(record, path=home)
        self._open_mirror()
        with self._guarded(home.name, record.bytes), locked(self.root / ".fetch" / home.name, _FETCH_SECONDS):
            if not self._is_whole(local):
                self._fetch(local)
        return home

    def make(
        self, step: StepLike, work: Callable[[Path], Mapping[str, object] | Made], *, held: AtCommit = "files"
    ) -> Record:
        """Like that of a local store; every file is kept, weights that could be made again too."""
        return super().make(step, work)

    def open_inputs(self, step: StepLike, held: contextlib.ExitStack | None = None) -> dict[str, Path]:
        for fingerprint in self.always if step.fingerprint not in self.always else ():  # a base needs no base
            record = self.find(fingerprint)
            if record is None:
                raise CorruptArtifact(
                    f"{step.label}: the base ({fingerprint[:16]}) is not in {self.url}; run again"
                )
            self.open_verified(record)
        return super().open_inputs(step, held)

    def check_room(self, what: str, needed: int) -> None:
        """Do nothing: a bucket has no limit. The free space of the mirror is checked when a step writes or reads."""

    def free_bytes(self) -> int | None:
        return None

    def verify(self, progress: Callable[[Path], None] | None = None) -> list[str]:
        """Like that of a local store; reads every byte at the URL and nothing of the mirror."""
        found: list[str] = []
        for kind in KINDS:
            for key in sorted(self.objects.sizes(kind)):
                if key.endswith(f"/{RECORD_FILE}") and key.count("/") == 2:
                    if progress is not None:
                        progress(Path(key).parent)
                    found.extend(self._problems(kind, key))
        return found

    def _problems(self, kind: str, key: str) -> Iterator[str]:
        place = f"{self.url}/{key.rpartition('/')[0]}"
        text = self.objects.read(key)
        if text is None:
            return
        try:
            record = parse_record(text, f"{self.url}/{key}", self.root / kind)
        except CorruptArtifact as error:
            yield str(error)
            return
        if _key(record.kind, record.fingerprint) != key:
            yield f"{place} is not named after its record ({record.kind}/{record.fingerprint})"
        for name, entry in record.files.items():
            if self.objects.digest(_file(record, name)) != (entry["sha256"], entry["bytes"]):
                yield f"{self.url}/{_file(record, name)} does not have the sha256 its record states, or is gone"
        yield from audit.lineage(self, record)

    def _home(self, step: StepLike) -> Path:
        self._own_path(step.kind, step.fingerprint, step.slug)
        return self._own_path(step.kind, step.fingerprint, "-")

    def _own_path(self, kind: str, fingerprint: str, slug: str) -> Path:
        """One path for all slugs of a step, so that the driver can name it for every node."""
        return self.root / kind / super()._own_path(kind, fingerprint, slug).name[-DIGITS:]

    def _locate(self, fingerprint: str, kind: str | None = None) -> Path | None:
        return None

    def _place(self, record: Record, stage: Path, step: StepLike) -> Record:
        """Upload a finished stage, unless the artifact exists already; then add it to the mirror."""
        self._open_mirror()
        existing = self._existing(record)
        if existing is None:
            for name in record.files:
                self.objects.upload(stage / name, _file(record, name))
            point("store.after_upload")
            text = (stage / RECORD_FILE).read_bytes()
            self.objects.write(_claim(record), text)
            for _ in range(3):
                if self.objects.create(_key(record.kind, record.fingerprint), text):
                    point("store.after_rename")
                    self._refuse_rivals(record, step)
                    self._keep(record, stage)
                    return record
                existing = self._existing(record)
                if existing is not None:
                    break
            else:
                raise StoreError(
                    f"{step.label}: {self.url}/{_key(record.kind, record.fingerprint)} was not kept; run again"
                )
        assert existing is not None
        differing = differences(existing, record)
        if not differing:
            self._keep(existing, stage)
            return existing
        kept = f".conflicts/{step.kind}-{step.fingerprint[:DIGITS]}.{uuid.uuid4().hex[:8]}"
        for name in (*record.files, RECORD_FILE):
            self.objects.upload(stage / name, f"{kept}/{name}")
        first = f"{self.url}/{_key(record.kind, record.fingerprint).rpartition('/')[0]}"
        raise conflict(step.label, differing, first, f"{self.url}/{kept}")

    def _refuse_rivals(self, record: Record, step: StepLike) -> None:
        """Raise NondeterminismError if another result of this step was ready as well.

        Both writers claim before they commit and check after it. So at least one sees the other, even where a backend
        lets both create.
        """
        rivals = sorted(set(self._claims(record.kind, record.fingerprint)) - {_claim(record)})
        if rivals:
            raise conflict(
                step.label, ["see both records"], f"{self.url}/{_claim(record)}", f"{self.url}/{rivals[0]}"
            )

    def _claims(self, kind: str, fingerprint: str) -> list[str]:
        return list(self.objects.sizes(f"{kind}/{fingerprint}/results"))

    def _existing(self, record: Record) -> Record | None:
        """The artifact that exists already. Anything else at the key of its record is moved aside."""
        key = _key(record.kind, record.fingerprint)
        there = self.record(record.kind, record.fingerprint)
        if there is None and self.objects.read(key) is not None:
            self._set_record_aside(record.kind, record.fingerprint)
        return there

    def _set_record_aside(self, kind: str, fingerprint: str) -> str:
        """Move a record below `.corrupt`, which removes the artifact; its files stay for inspection."""
        text = self.objects.read(_key(kind, fingerprint))
        target = f".corrupt/{kind}-{fingerprint[:DIGITS]}.{uuid.uuid4().hex[:8]}/{RECORD_FILE}"
        if text is not None:
            self.objects.write(target, text)
            self.objects.remove(_key(kind, fingerprint))
            for key in self._claims(kind, fingerprint):
                self.objects.remove(key)
        return f"{self.url}/{target}"

    def _fetch(self, record: Record) -> None:
        """Copy an artifact into the mirror. If its bytes are wrong, remove the artifact and raise CorruptArtifact."""
        self._check_free(f"mirror of {record.kind} {record.fingerprint[:DIGITS]}", record.bytes)
        with self.staged() as stage:
            for name, entry in record.files.items():
                (stage / name).parent.mkdir(parents=True, exist_ok=True)
                for _ in range(2):  # a transfer may fail although the object is sound
                    if self.objects.download(_file(record, name), stage / name):
                        problem = difference(stage, name, entry)
                        if problem is None:
                            break
                else:
                    place = f"{self.url}/{_file(record, name)}"
                    if self.record(record.kind, record.fingerprint) != record:
                        raise CorruptArtifact(f"{place} changed while it was read; run again")
                    moved = self._set_record_aside(record.kind, record.fingerprint)
                    raise CorruptArtifact(
                        f"{place} is gone or does not have the sha256 its record states; the record was moved to {moved}; "
                        "run again to recompute it"
                    )
            write_record(record, stage)
            self._keep(record, stage)

    def _keep(self, record: Record, stage: Path) -> None:
        """Make a stage the mirror's copy of an artifact, unless the mirror has one of the same bytes."""
        with locked(self.root / ".lock"):
            record.path.parent.mkdir(parents=True, exist_ok=True)
            if record.path.exists():
                if self._is_whole(record):
                    return
                shutil.rmtree(self._move(record.path, ".stage"), ignore_errors=True)
            stage.rename(record.path)

    def _is_whole(self, record: Record) -> bool:
        """Whether the mirror has every file of a record as the record states it."""
        try:
            same = read_record(record.path).files == record.files
            super().open_verified(record) if same else None
        except CorruptArtifact:
            return False
        return same

    def _set_aside(self, directory: Path, inode: int) -> str:
        shutil.rmtree(directory, ignore_errors=True)
        return "the copy was dropped"

    def _open_mirror(self) -> None:
        """Create the mirror for this user only, and remove stages whose writers have ended."""
        with self._guarded("mirror", 0):
            self.root.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            for name in (".stage", ".fetch"):
                (self.root / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        if self.root.stat().st_uid != os.getuid():
            raise StoreUnwritable(
                f"{self.root} belongs to another user; set {MIRROR} to a directory of your own"
            )
        with contextlib.suppress(OSError):
            self.sweep()


def _key(kind: str, fingerprint: str) -> str:
    return f"{kind}/{fingerprint}/{RECORD_FILE}"


def _claim(record: Record) -> str:
    """The key of the note that this result was ready to be committed."""
    result = digest_of({"files": record.digest, "scores": record.result.get("scores")})
    return f"{record.kind}/{record.fingerprint}/results/{result[:32]}.json"


def _file(record: Record, name: str) -> str:
    return f"{record.kind}/{record.fingerprint}/{record.digest[:32]}/{name}"
