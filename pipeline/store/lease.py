"""Which driver carries out which step of a store just now: so that drivers that share a store do no step twice.

A lease is a small file (or object) named by the step; it names its owner, who renews a second file, its heartbeat. A lease is
free when it is not there, when its owner was a process of this host that is gone, or when its heartbeat has not changed for
`SILENT_SECONDS` by the watch of whoever looks: no two clocks are ever compared.
Invariant: a lease saves work and decides no result. An owner that was suspended and comes back commits the same bytes or
gets the store's NondeterminismError, as if there were no leases. A driver holds leases only on steps that it is carrying out, so
two drivers never wait for each other.
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
from merge_service.files import temporary
from pipeline.errors import StoreError, StoreUnwritable
from pipeline.files.disk import room_for
from pipeline.files.ownership import is_abandoned, locked, owner_mark

BEAT_SECONDS, SILENT_SECONDS = 5.0, 30.0
ROOM, OWNERS = ".leases", ".leases/owners"
_FOREVER = 0.0
"""The age by which an owner on another host is judged: never gone by that alone, its heartbeat tells."""


class Shelf(Protocol):
    """Where leases lie: the store's directory, or its URL."""

    def read(self, key: str) -> bytes | None: ...
    def write(self, key: str, data: bytes) -> None: ...
    def create(self, key: str, data: bytes) -> bool: ...
    def remove(self, key: str) -> None: ...
    def sizes(self, prefix: str) -> dict[str, int]: ...


class Leasable(Protocol):
    """What leases need of a store."""

    @property
    def root(self) -> Path: ...
    @property
    def shelf(self) -> Shelf: ...


@dataclass(frozen=True)
class Files:
    """Small files below a directory, as `store_objects.Objects` has small objects below a URL."""

    root: Path

    def read(self, key: str) -> bytes | None:
        try:
            return (self.root / key).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, key: str, data: bytes) -> None:
        target = temporary(self.root / key)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.write_bytes(data)
            target.replace(self.root / key)
        finally:
            target.unlink(missing_ok=True)

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
    """The owner of a lease. `key` tells it from all others; `mark` is that of its process (`owner_mark`)."""

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

    `now` is a clock that only goes forward. Raises StoreError, StorageFull.
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
        self._thread = threading.Thread(target=self._beat_on, name="leases", daemon=True)

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
        """Lease a step: None when it is this driver's now, else who carries it out."""
        key = f"{ROOM}/{fingerprint}"
        with self._guarded():
            if not self._beats:
                self._beat()
            for _ in range(3):  # it may be given back between two looks
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
                f"{self._lock.parent / ROOM} cannot be written ({error.strerror or error}); whoever shares a store must be "
                "allowed to write all of it: mend its permissions or choose another storage.store"
            ) from error

    def give_back(self, fingerprint: str) -> None:
        """The step is no longer being carried out here, however it ended."""
        self._held.discard(fingerprint)
        if self._shelf.read(f"{ROOM}/{fingerprint}") == self._text:
            self._shelf.remove(f"{ROOM}/{fingerprint}")

    def holder_of(self, fingerprint: str) -> Holder | None:
        """Who carries out a step that another driver had; None when it may be taken."""
        text = self._shelf.read(f"{ROOM}/{fingerprint}")
        if text is None:
            return None
        holder = _holder(text, fingerprint)
        return holder if self._is_alive(holder, text) else None

    def _take_over(self, key: str, text: bytes) -> bool:
        """Replace the lease of an owner that is gone, unless another driver has just done so."""
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

    def _beat_on(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            if self._beats:
                with contextlib.suppress(
                    StoreError, OSError
                ):  # whoever waits takes over, and nothing is lost
                    self._beat()

    def _sweep(self) -> None:
        """Remove leases and heartbeats of processes of this host that are gone."""
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
    """The owner that a lease names; of one that was cut while it was written, an owner without a name or heartbeat."""
    with contextlib.suppress(ValueError, TypeError):
        body: dict[str, Any] = json.loads(text)
        return Holder(**body)
    return Holder(fingerprint, "", "?", "?", "?", 0)
