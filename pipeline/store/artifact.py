"""An artifact: a directory with a `record.json`, written last, that states what every other file in it must be.

Invariant: a record is trusted only if it carries the digest of its own content, and a file only if it has the sha256
that its record states. Reading never changes anything.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypedDict, get_args

from pipeline.errors import CorruptArtifact, NondeterminismError
from pipeline.identity import fingerprint

RECORD_FILE = "record.json"
WEIGHTS_SUFFIX = ".safetensors"
FORMAT = 1
AtCommit = Literal["files", "recipe", "adapter"]
Held = Literal["files", "recipe", "packed", "adapter"]
PACKED = "packed-"
"""How the name of the file begins that holds packed weights, beside the others; the fingerprint of their base follows."""
ADAPTER = "adapter/"
"""How the names of the files begin that are an expert's adapter (`merge_service.checkpoints.ADAPTER_FOLDER`)."""
_MAX_RECORD_BYTES = 64 * 2**20


class FileEntry(TypedDict):
    """What a record states of one file."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Record:
    """The description of one committed artifact.

    `files` has an entry for each file, by its path relative to the directory. `inputs` maps each role to the fingerprint of
    the step it came from, and `input_digests` to the digest of the bytes that were there. `created_ms` is Unix time in
    milliseconds, `seconds` the time the step took. `path` is the directory it was read from. `held` says whether the files are
    kept ("files"), made again from the inputs whenever they are wanted ("recipe"), or kept as their difference from the base ("packed")
    or from the weights that training began with ("adapter"); small files are kept either way.
    """

    kind: str
    fingerprint: str
    slug: str
    spec: dict[str, Any]
    inputs: dict[str, str]
    input_digests: dict[str, str]
    files: dict[str, FileEntry]
    result: dict[str, Any]
    created_ms: int
    seconds: float
    versions: dict[str, str]
    path: Path
    held: Held = "files"

    @property
    def is_recipe(self) -> bool:
        """Whether the weights are made again from the inputs when they are not there."""
        return self.held == "recipe"

    @property
    def is_made(self) -> bool:
        """Whether the weights are made when they are wanted, be it from a recipe, a packed file or an adapter."""
        return self.held != "files"

    @property
    def digest(self) -> str:
        """sha256 over all files: the identity of the bytes, independent of what made them."""
        return fingerprint({name: entry["sha256"] for name, entry in self.files.items()})

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(int(entry["bytes"]) for entry in self.files.values())

    @property
    def droppable(self) -> tuple[str, ...]:
        """The files that are made when they are wanted: the weights."""
        return tuple(filter(is_whole, self.files))

    def sha256(self, name: str) -> str | None:
        """sha256 of one file; None if the artifact has no such file."""
        entry = self.files.get(name)
        return None if entry is None else str(entry["sha256"])


def is_whole(name: str) -> bool:
    """Whether a file of an artifact holds whole weights, which an adapter does not."""
    return name.endswith(WEIGHTS_SUFFIX) and not name.startswith(ADAPTER)


def write_record(record: Record, directory: Path, name: str = RECORD_FILE) -> None:
    """Write a record with the digest of its own content, and force it to disk. Raises FileExistsError if the file is there."""
    with (directory / name).open("x", encoding="utf-8") as stream:
        stream.write(record_text(record))
        stream.flush()
        os.fsync(stream.fileno())


def record_text(record: Record) -> str:
    """What `record.json` holds; `held` only where it says more than it always did."""
    body = {**asdict(record), "format": FORMAT}
    del body["path"]
    if not record.is_made:
        del body["held"]
    body = json.loads(json.dumps(body, allow_nan=False))
    body["record_sha256"] = _self_digest(body)
    return json.dumps(body, indent=1, sort_keys=True, allow_nan=False) + "\n"


def read_record(directory: Path) -> Record:
    """The record of an artifact. Raises CorruptArtifact if it is missing, cut, altered or malformed."""
    path = directory / RECORD_FILE
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise CorruptArtifact(f"{path} is not a regular file")
        if found.st_size > _MAX_RECORD_BYTES:
            raise CorruptArtifact(f"{path} is larger than any record")
        return parse_record(path.read_bytes(), str(path), directory)
    except OSError as error:
        raise CorruptArtifact(f"{path} cannot be read: {error.strerror or error}") from error


def parse_record(text: bytes, path: str, directory: Path) -> Record:
    """The record in `text`, which `path` names in messages; its files are in `directory`. Raises CorruptArtifact."""
    try:
        body = json.loads(text)
        stated = body.pop("record_sha256")
        if stated != _self_digest(body):
            raise CorruptArtifact(f"{path} was altered: its content does not match its own sha256")
        if body.pop("format") != FORMAT:
            raise CorruptArtifact(f"{path} has a format this version does not read")
        record = Record(**body, path=directory)
        _check_types(record)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptArtifact(f"{path} is not a record: {error}") from error
    for name in record.files:
        if not _inside(name):
            raise CorruptArtifact(f"{path} names {name!r}, which is not a file inside the artifact")
    return record


def differences(one: Record, two: Record) -> list[str]:
    """What differs between two results of one step: names of files, and "scores"."""
    differing = sorted(name for name in {*one.files, *two.files} if one.sha256(name) != two.sha256(name))
    return [*differing, "scores"] if one.result.get("scores") != two.result.get("scores") else differing


def conflict(label: str, differing: list[str], first: str, second: str) -> NondeterminismError:
    """The error for two results of one step, kept at `first` and `second`."""
    return NondeterminismError(
        f"{label}: computed twice with different results ({', '.join(differing)}). The first is {first}, the "
        f"second was kept at {second}. Compare them; likely causes: another thread or world size, device, or library version",
        first,
        second,
    )


def list_files(directory: Path) -> Iterator[str]:
    """Relative names of all files of an artifact except its record, sorted. Raises CorruptArtifact on links and devices."""
    found = []
    for path in directory.rglob("*"):
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            continue
        if not stat.S_ISREG(mode):
            raise CorruptArtifact(f"{path} is not a regular file; an artifact holds regular files only")
        found.append(path.relative_to(directory).as_posix())
    return iter(sorted(name for name in found if name != RECORD_FILE))


def hash_file(path: Path) -> str:
    """sha256 of a file as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def difference(directory: Path, name: str, entry: FileEntry) -> str | None:
    """How a file differs from its entry in the record, None if it does not. The file is read only if its size is right."""
    path = directory / name
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            return f"{path} is not a regular file"
        if found.st_size != entry["bytes"]:
            return f"{path} has {found.st_size} bytes, its record states {entry['bytes']}"
        if hash_file(path) != entry["sha256"]:
            return f"{path} does not have the sha256 its record states"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror or error}"
    return None


def _self_digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _check_types(record: Record) -> None:
    """Raise TypeError for a field of the wrong type: a writer may compute the digest without knowing the format."""
    texts = (record.kind, record.fingerprint, record.slug)
    maps = (record.inputs, record.input_digests, record.versions)
    numbers = (record.created_ms, record.seconds)
    if not all(isinstance(text, str) for text in texts) or not all(type(n) in (int, float) for n in numbers):
        raise TypeError("kind, fingerprint and slug must be text, created_ms and seconds numbers")
    if record.held not in get_args(Held):
        raise TypeError(f"held must be one of {', '.join(get_args(Held))}")
    if not isinstance(record.spec, dict) or not isinstance(record.result, dict):
        raise TypeError("spec and result must be mappings")
    if not all(isinstance(one, dict) and all(isinstance(v, str) for v in one.values()) for one in maps):
        raise TypeError("inputs, input_digests and versions must map text to text")
    if not isinstance(record.files, dict) or not all(_is_entry(entry) for entry in record.files.values()):
        raise TypeError("files must map each name to sha256 and bytes")


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and type(entry.get("bytes")) is int
    )


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    plain = path.as_posix() == name and "\0" not in name and not any("\ud800" <= c <= "\udfff" for c in name)
    return plain and bool(path.parts) and not path.is_absolute() and ".." not in path.parts
