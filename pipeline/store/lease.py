"""Leases: which driver carries out which step of a store now, so that drivers that share a store repeat no work.

A lease is a small file (or object) named after the step. It names its owner, which renews a second file, its heartbeat.
A lease is free if it does not exist, if its owner was a process of this host that has ended, or if its heartbeat has
not changed for `SILENT_SECONDS` on the clock of the reader: clocks of two hosts are never compared.
Invariant: a lease saves work and never decides a result. An owner that was suspended and resumes commits the same bytes
or gets the store's NondeterminismError, as it would without leases. A driver holds leases only on steps that it is
carrying out, so two drivers never wait for each other.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from merge_service.faults import point
from merge_service.files import replace_whole
from pipeline.errors import StoreError, StoreUnwritable
from pipeline.files.disk import room_for
from pipeline.files.ownership import is_abandoned, locked, owner_mark

BEAT_SECONDS, SILENT_SECONDS = 5.0, 30.0
ROOM, OWNERS = ".leases", ".leases/owners"
_FOREVER = 0.0
"""The age passed for an owner on another host: age alone never ends its lease, its heartbeat decides."""


class Shelf(Protocol):
    """Where leases are stored: the directory of the store, or its URL."""

    def read(self, key: str) -> bytes | None: ...
    def write(self, key: str, data: bytes) -> None: ...
    def create(self, key: str, data: bytes) -> bool: ...
    def remove(self, key: str) -> None: ...
    def sizes(self, prefix: str) -> dict[str, int]: ...


class Leasable(Protocol):
    """The part of a store that leases need."""

    @property
    def root(self) -> Path: ...
    @property
    def shelf(self) -> Shelf: ...


@dataclass(frozen=True)
class Files:
    """Small files below a directory, as `objects.Objects` has small objects below a URL."""

    root: Path

    def read(self, key: str) -> bytes | None:
        try:
            return (self.root / key).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, key: str, data: bytes) -> None:
        (self.root / key).parent.mkdir(parents=True, exist_ok=True)
        replace_whole(self.root / key, data, sync=False)

    def create(self, key: str, data: bytes) -> bool:
        (self.root / key).parent.mkdir(parents=True, exist_ok=True)
        try:
            with (self.root / key).open("xb") as stream:
                stream.write(data)
        except FileExistsError:
            return self.read(key) == data
        return True

    def remove(self, key: str) -> None:
        (self.root / key).unlink(missing_ok=True)

    def sizes(self, prefix: str) -> dict[str, int]:
        return {
            path.relative_to(self.root).as_posix(): 0
            for path in (self.root / prefix).rglob("*")
            if path.is_file() and not path.name.startswith(".")
        }


@dataclass(frozen=True)
class Holder:
    """The owner of a lease. `key` is unique to it; `mark` identifies its process (`owner_mark`)."""

    key: str
    mark: str
    study: str
    out: str
    host: str
    pid: int

    def __str__(self) -> str:
        return f"study {self.study} in {self.out} (process {self.pid} on {self.host})"


class Leases:
    """The leases of one driver on the steps of a store; leaving the context gives all of them back.

    `now` is a monotonic clock. Raises StoreError, StorageFull.
    """

    def __init__(
        self, store: Leasable, study: str, out: Path, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._shelf, self._lock, self._now = store.shelf, store.root / ".lock", now
        key = f"{owner_mark()}.{uuid.uuid4().hex[:8]}"
        self.holder = Holder(key, owner_mark(), study, str(out.absolute()), socket.gethostname(), os.getpid())
        self._text = json.dumps(vars(self.holder)).encode()
        self._held: set[str] = set()
        self._heard: dict[str, tuple[bytes | None, float]] = {}
        self._stop, self._beats = threading.Event(), 0
        self._thread = threading.Thread(target=self._keep_beating, name="leases", daemon=True)

    def __enter__(self) -> Self:
        self._sweep()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=1.0)
        with contextlib.suppress(StoreError, OSError):
            for fingerprint in list(self._held):
                self.give_back(fingerprint)
            self._shelf.remove(f"{OWNERS}/{self.holder.key}")

    def take(self, fingerprint: str) -> Holder | None:
        """Lease a step. None if this driver now holds the lease, else the driver that carries the step out."""
        key = f"{ROOM}/{fingerprint}"
        with self._guarded():
            if not self._beats:
                self._beat()
            for _ in range(3):  # it may be given back between create and read
                if self._shelf.create(key, self._text):
                    break
                text = self._shelf.read(key)
                if text is None:
                    continue
                holder = _holder(text, fingerprint)
                if self._is_alive(holder, text) or not self._take_over(key, text):
                    return _holder(self._shelf.read(key) or text, fingerprint)
                break
        self._held.add(fingerprint)
        point("lease.after_take")
        return None

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            with room_for("lease of a step", self._lock.parent):
                yield
        except OSError as error:
            raise StoreUnwritable(
                f"{self._lock.parent / ROOM} cannot be written ({error.strerror or error}); all who share a store must be "
                "allowed to write all of it: correct its permissions or choose another storage.store"
            ) from error

    def give_back(self, fingerprint: str) -> None:
        """End the lease of a step that is no longer carried out here, whether it was completed or not."""
        self._held.discard(fingerprint)
        if self._shelf.read(f"{ROOM}/{fingerprint}") == self._text:
            self._shelf.remove(f"{ROOM}/{fingerprint}")

    def holder_of(self, fingerprint: str) -> Holder | None:
        """The driver that carries out a step that was leased before; None if the step is free."""
        text = self._shelf.read(f"{ROOM}/{fingerprint}")
        if text is None:
            return None
        holder = _holder(text, fingerprint)
        return holder if self._is_alive(holder, text) else None

    def _take_over(self, key: str, text: bytes) -> bool:
        """Replace the lease of an owner that has ended, unless another driver has just done so."""
        with locked(self._lock):
            if self._shelf.read(key) != text:
                return False
            self._shelf.write(key, self._text)
        return self._shelf.read(key) == self._text

    def _is_alive(self, holder: Holder, text: bytes) -> bool:
        if holder.mark and is_abandoned(holder.mark, _FOREVER):
            return False
        beat = self._shelf.read(f"{OWNERS}/{holder.key}") if holder.mark else text
        heard, since = self._heard.get(holder.key, (b"", 0.0))
        if holder.key not in self._heard or heard != beat:
            self._heard[holder.key] = beat, self._now()
            return True
        return self._now() - since < SILENT_SECONDS

    def _beat(self) -> None:
        self._beats += 1
        self._shelf.write(f"{OWNERS}/{self.holder.key}", str(self._beats).encode())

    def _keep_beating(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            if self._beats:
                # A driver that waits takes over after missed heartbeats; no result is lost.
                with contextlib.suppress(StoreError, OSError):
                    self._beat()

    def _sweep(self) -> None:
        """Remove leases and heartbeats of processes of this host that have ended."""
        with contextlib.suppress(StoreError, OSError):
            for key in self._shelf.sizes(ROOM):
                text = self._shelf.read(key) or b""
                mark = (
                    key.rpartition("/")[2].split(".")[0]
                    if key.startswith(f"{OWNERS}/")
                    else _holder(text, key).mark
                )
                if mark and is_abandoned(mark, _FOREVER):
                    self._shelf.remove(key)


def _holder(text: bytes, fingerprint: str) -> Holder:
    """The owner that a lease names. A lease that was cut during writing gets an owner without a name or heartbeat."""
    with contextlib.suppress(ValueError, TypeError):
        body: dict[str, Any] = json.loads(text)
        return Holder(**body)
    return Holder(fingerprint, "", "?", "?", "?", 0)
