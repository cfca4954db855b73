"""Uploads on disk: files of strangers that come in parts, in any order and as often as they like, until they are whole.

Layout: `<id>/upload.json` says what was announced, `<id>/data/<i>` holds the bytes of file i at their places, `<id>/parts/<i>-<n>` the
sha256 of part n once its bytes are on disk. An upload is named by its token, its task and its files, so whoever announces the same
files again is given the same upload, and with it what is missing.

Invariant: a part that is there has the bytes of its digest, on disk, and is never written again. A sender's names of files become names
on disk only in a folder of their own, and only after they matched `NAME`.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from merge_service.checkpoints import ADAPTER_FILES
from merge_service.errors import CheckpointError
from merge_service.faults import point
from merge_service.files import make_directory, replace_whole, sync_directory, sync_file, temporary
from merge_service.live import Refused, digest
from pipeline.files.disk import free_bytes, room_for
from pipeline.service.experts import Experts, Start, Taken
from pipeline.service.home import Home

PART_BYTES = 8 << 20
KEPT_SECONDS = 48 * 3600.0
"""An upload whose last part came so long ago is abandoned."""
FOLDER = "uploads"
"""Where they are, in the place of a service."""
MOST_FILES = 500
MOST_INDEX_BYTES = 32 << 20
WEIGHTS, INDEX = ".safetensors", ".safetensors.index.json"
ADAPTER_CONFIG = ADAPTER_FILES[0]
MOST_CONFIG_BYTES = 1 << 20
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
ID = "u-[0-9a-f]{24}"
_SAID, _TAKEN = "upload.json", "taken.json"


@dataclass(frozen=True)
class Announced:
    """A file that will come."""

    name: str
    bytes: int
    sha256: str

    @property
    def parts(self) -> int:
        """How many parts it has; all but the last have `PART_BYTES`."""
        return -(-self.bytes // PART_BYTES)


@dataclass(frozen=True)
class Upload:
    """What was announced, by the token with the id `token`."""

    id: str
    token: str
    task: str
    files: tuple[Announced, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(one.bytes for one in self.files)

    @property
    def part_bytes(self) -> int:
        """Bytes of every part but the last of a file."""
        return PART_BYTES

    @property
    def is_adapter(self) -> bool:
        """Whether its files are an adapter's."""
        return any(one.name == ADAPTER_CONFIG for one in self.files)

    def needs(self, expert: int) -> int:
        """Bytes of disk until its arrival is taken: shards are joined into one file, an adapter becomes an expert of `expert` bytes."""
        if self.is_adapter:
            return self.bytes + expert
        return self.bytes if len(self.files) == 1 else 2 * self.bytes


@dataclass(frozen=True)
class Room:
    """What uploads may take: bytes of one, how many at a time, and bytes of the disk that stay free. An expert has `expert` bytes."""

    bytes: int
    uploads: int
    reserve: int
    expert: int

    @classmethod
    def of(cls, home: Home) -> "Room":
        """As the configuration of a service allows."""
        config = home.config
        return cls(config.admission.max_bytes, config.limits.uploads, config.limits.reserve, home.base.bytes)


@dataclass
class Taking:
    """An upload on its way into an arrival, which whoever takes it states."""

    taken: Taken
    arrival: str = ""


class Uploads:
    """The uploads below one folder. Several processes may use it at a time."""

    def __init__(self, folder: Path, room: Room) -> None:
        self._folder, self._room = folder, room

    def open(self, token: str, task: str, files: Sequence[Announced]) -> tuple[Upload, bool]:
        """The upload of these files, and whether it is new. Raises Refused: what is too much is refused before any byte comes."""
        _check_files(files)
        number = digest([token, task, [asdict(one) for one in files]])[:24]
        upload = Upload(f"u-{number}", token, task, tuple(files))
        if upload.bytes > self._room.bytes:
            raise Refused(
                "upload.too_large",
                f"the files have {upload.bytes:,} bytes; admission.max_bytes allows {self._room.bytes:,}",
            )
        make_directory(self._folder)
        with _locked(self._folder / ".lock"):
            self.sweep()
            if self._read(self._folder / upload.id) is not None:
                return upload, False
            self._check_room(upload)
            shutil.rmtree(self._folder / upload.id, ignore_errors=True)
            self._create(upload)
        return upload, True

    def get(self, number: str, token: str) -> Upload:
        """An upload of this token. Raises Refused."""
        found = self._read(self._folder / number)
        if found is None or found.token != token:
            raise Refused(
                "upload.unknown", "this token has no such upload; it may have been taken or abandoned"
            )
        return found

    def missing(self, upload: Upload) -> dict[str, list[tuple[int, int]]]:
        """For each file that is not whole, the parts that are missing, as ranges: first and last."""
        there = self._there(upload)
        found = {}
        for at, file in enumerate(upload.files):
            gaps = _ranges([n for n in range(file.parts) if (at, n) not in there])
            if gaps:
                found[file.name] = gaps
        return found

    def put(self, upload: Upload, name: str, part: int, data: bytes) -> None:
        """Write a part; when this returns it is on disk. Raises Refused for one that does not fit, or that is there with other bytes."""
        at = next((at for at, one in enumerate(upload.files) if one.name == name), None)
        if at is None:
            raise Refused("upload.part", "no such file was announced")
        expected = min(PART_BYTES, upload.files[at].bytes - part * PART_BYTES)
        if len(data) != expected or expected < 1:
            said = f"part {part} of it has {expected:,} bytes" if expected > 0 else f"it has no part {part}"
            raise Refused("upload.part", f"{len(data):,} bytes came; {said}")
        place, sha256 = self._folder / upload.id, hashlib.sha256(data).hexdigest()
        mark = place / "parts" / f"{at}-{part}"
        with self._working(upload):
            if mark.exists():
                if mark.read_text() != sha256:
                    raise Refused(
                        "upload.conflict", f"part {part} of {name} is there already, with other bytes"
                    )
                return
            with room_for(f"part {part}", place):
                _write(place / "data" / str(at), part * PART_BYTES, data)
                point("upload.part")
                replace_whole(mark, sha256)

    def taken(self, number: str, token: str, request: str) -> str | None:
        """The arrival that this upload of this token became by the same request, for two days."""
        try:
            found = json.loads((self._folder / number / _TAKEN).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return str(found["arrival"]) if (found["token"], found["request"]) == (token, request) else None

    @contextlib.contextmanager
    def taking(
        self,
        upload: Upload,
        experts: Experts,
        request: str,
        start: Start,
    ) -> Iterator[Taking]:
        """The bytes of a whole upload, as one file among those that come in; the upload is gone at the end, unless an error is raised.
        An adapter becomes what it makes of the weights in `start()`.

        What it became (`Taking.arrival`) is kept, since the answer to `request`, a digest, may be lost.
        Raises Refused if a part is missing, a file is not what was announced, or another request takes the same upload.
        """
        with self._working(upload, wait=False):
            if self.missing(upload):
                raise Refused("upload.incomplete", "parts are missing; GET the upload to see which")
            taken = self._taken(upload, experts, start)
            point("upload.complete")
            found = Taking(taken)
            yield found
            if not experts.is_there(
                taken.sha256
            ):  # swept between the two, by a worker that had not read the arrival yet
                self._taken(upload, experts, start)
            place = self._folder / upload.id
            body = {"token": upload.token, "request": request, "arrival": found.arrival}
            with _locked(self._folder / ".lock"):
                self._remove(place)
                place.mkdir()
                replace_whole(place / _TAKEN, json.dumps(body))

    def drop(self, upload: Upload) -> None:
        """Forget an upload and its bytes."""
        with self._working(upload, wait=False):
            self._remove(self._folder / upload.id)

    def sweep(self, now: float | None = None) -> None:
        """Remove uploads that were abandoned, and what was left of others."""
        for place in self._folder.glob("*") if self._folder.is_dir() else ():
            with contextlib.suppress(OSError):
                newest = max(one.stat().st_mtime for one in (place, place / "parts") if one.exists())
                if place.is_dir() and (time.time() if now is None else now) - newest > KEPT_SECONDS:
                    with contextlib.suppress(BlockingIOError), _locked(place / ".lock", wait=False):
                        self._remove(place)

    def _taken(self, upload: Upload, experts: Experts, start: Start) -> Taken:
        place = self._folder / upload.id
        for at, file in enumerate(upload.files):
            if _sha256(place / "data" / str(at)) != file.sha256:
                raise Refused(
                    "upload.digest", f"the bytes of {file.name} do not have the sha256 that was announced"
                )
        if len(upload.files) == 1:
            return experts.adopt_link(place / "data" / "0", upload.files[0].sha256)
        joined = place / "joined"
        shutil.rmtree(joined, ignore_errors=True)
        joined.mkdir()
        for at, file in enumerate(upload.files):
            os.link(place / "data" / str(at), joined / file.name)
        index = next((one.name for one in upload.files if one.name.endswith(INDEX)), "")
        try:
            return experts.take(joined / index, self._room.bytes, start)
        except CheckpointError as error:
            said = experts.public(error).replace(f"{joined}/", "").replace(str(joined), "the upload")
            raise Refused("upload.unfit", said) from None

    def _check_room(self, upload: Upload) -> None:
        """Raise Refused if there are too many, or if the disk would not hold all that was announced."""
        others = [found for place in self._folder.glob("u-*") if (found := self._read(place)) is not None]
        if len(others) >= self._room.uploads:
            raise Refused(
                "limit.uploads",
                f"{len(others)} uploads are open; limits.uploads allows {self._room.uploads} at a time",
            )
        promised = sum(max(0, one.needs(self._room.expert) - self._held(one)) for one in others)
        free, needed = (
            free_bytes(self._folder) - promised - self._room.reserve,
            upload.needs(self._room.expert),
        )
        if needed > free:
            raise Refused("service.full", f"{needed:,} bytes are needed, and {max(0, free):,} may be used")

    def _held(self, upload: Upload) -> int:
        place = self._folder / upload.id / "data"
        return sum(one.stat().st_blocks * 512 for one in place.iterdir()) if place.is_dir() else 0

    def _create(self, upload: Upload) -> None:
        target = self._folder / upload.id
        partial = temporary(target)
        with room_for("an upload", self._folder):
            try:
                (partial / "parts").mkdir(parents=True)
                (partial / "data").mkdir()
                for at, file in enumerate(upload.files):
                    with (partial / "data" / str(at)).open("xb") as stream:
                        stream.truncate(file.bytes)
                (partial / _SAID).write_text(json.dumps(asdict(upload)), encoding="utf-8")
                for path in (partial / _SAID, *(partial / "data").iterdir()):
                    sync_file(path)
                for path in (partial / "data", partial / "parts", partial):
                    sync_directory(path)
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        sync_directory(self._folder)

    def _read(self, place: Path) -> Upload | None:
        try:
            found: Mapping[str, object] = json.loads((place / _SAID).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        files = tuple(Announced(**one) for one in found["files"])  # type: ignore[attr-defined]
        return Upload(str(found["id"]), str(found["token"]), str(found["task"]), files)

    def _there(self, upload: Upload) -> set[tuple[int, int]]:
        place = self._folder / upload.id / "parts"
        names = (one.name.partition("-") for one in os.scandir(place) if one.name[0] != ".")
        return {(int(at), int(part)) for at, _, part in names}

    def _remove(self, place: Path) -> None:
        """Its announcement goes first, also on the disk, so that half of an upload is never found."""
        (place / _SAID).unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            sync_directory(place)
        shutil.rmtree(place, ignore_errors=True)

    @contextlib.contextmanager
    def _working(self, upload: Upload, wait: bool = True) -> Iterator[None]:
        """Be the only one at an upload. Raises Refused if it has gone, or if another request is at it and `wait` is false."""
        try:
            with _locked(self._folder / upload.id / ".lock", wait):
                if self._read(self._folder / upload.id) is None:
                    raise FileNotFoundError
                yield
        except FileNotFoundError:
            raise Refused("upload.unknown", "the upload was taken or abandoned") from None
        except BlockingIOError:
            raise Refused("upload.busy", "another request works on this upload; try again") from None


def _check_files(files: Sequence[Announced]) -> None:
    """Raise Refused unless these are the files of one checkpoint: a safetensors file, shards with their index, or an adapter."""
    names = [one.name for one in files]
    wrong = [name for name in names if not NAME.fullmatch(name) or not name.endswith((WEIGHTS, INDEX))]
    indexes = [one for one in files if one.name.endswith(INDEX)]
    if ADAPTER_CONFIG in names:
        if sorted(names) == sorted(ADAPTER_FILES) and all(
            one.bytes <= MOST_CONFIG_BYTES for one in files if one.name == ADAPTER_CONFIG
        ):
            return
        text = f"{' with '.join(ADAPTER_FILES)}, the first of at most {MOST_CONFIG_BYTES:,} bytes,"
    elif wrong:
        text = f"files are named *{WEIGHTS} or *{INDEX}, by letters, digits, dots and dashes"
    elif len(set(names)) != len(names) or len(names) > MOST_FILES:
        text = f"at most {MOST_FILES} files, each name once"
    elif len(indexes) != (len(files) > 1):
        text = f"one *{WEIGHTS}, or shards with their one *{INDEX}"
    elif any(one.bytes > MOST_INDEX_BYTES for one in indexes):
        text = f"an index has at most {MOST_INDEX_BYTES:,} bytes"
    else:
        return
    raise Refused("upload.files", f"{text} are taken")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _ranges(numbers: Sequence[int]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


def _write(path: Path, offset: int, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        view = memoryview(data)
        while view:
            written = os.pwrite(handle, view, offset)
            offset, view = offset + written, view[written:]
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold a lock file. Raises FileNotFoundError if its folder is gone, BlockingIOError if another holds it and `wait` is false."""
    handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(handle)
