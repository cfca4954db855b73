"""The files of a checkpoint on their way to a service, in parts, that go on where they were broken off.

Invariant: nothing is kept on this side. The service names an upload by its files, so the same files again are the same upload.
"""

import base64
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from merge_service.checkpoints import Checkpoint, adapter_files, locate
from merge_service.errors import UserError
from pipeline.service.client.connection import Exchange, Peer, Sent, ServiceError
from pipeline.service.http.live.schemas import UploadShown
from pipeline.service.http.schemas import File

_PIECE = 8 << 20
Progress = Callable[[int, int], None]
"""Called with the bytes that are there, and all."""


@dataclass(frozen=True)
class Source:
    """A file to send."""

    path: Path
    bytes: int
    sha256: str


def sources(checkpoint: Path) -> list[Source]:
    """The weights file of a checkpoint, its index and shards, or the two files of an adapter. Raises UserError for what is none."""
    files = adapter_files(checkpoint) or [locate(checkpoint)]
    if (weights := files[0]).name.endswith(".index.json"):
        with Checkpoint.open(weights) as opened:
            files += opened.files
    found = []
    for path in files:
        with path.open("rb") as stream:
            found.append(Source(path, path.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest()))
    return found


def upload(peer: Peer, task: str, files: list[Source], progress: Progress = lambda *_: None) -> Exchange[str]:
    """Send what is missing of these files; the id of the upload, which is whole then. Raises ServiceError."""
    body = {
        "task": task,
        "files": [{"name": one.path.name, "bytes": one.bytes, "sha256": one.sha256} for one in files],
    }
    shown = yield from peer.read(UploadShown, "POST", "/v1/uploads", Sent(json=body))
    every, size = sum(one.bytes for one in files), shown.part_bytes
    missing = [(one, part) for one in files for part in _parts(shown, one.path.name)]
    there = every - sum(min(size, one.bytes - part * size) for one, part in missing)
    progress(there, every)
    for one, part in missing:
        with one.path.open("rb") as stream:
            stream.seek(part * size)
            data = stream.read(size)
        there += len(data)
        yield from _put(peer, f"/v1/uploads/{shown.id}/parts/{one.path.name}/{part}", data, one)
        progress(there, every)
    return shown.id


def download(peer: Peer, address: str, path: Path, file: File) -> Exchange[None]:
    """A file from a service, from where an earlier download of it ended. Raises ServiceError."""
    partial = path.with_name(f"{path.name}.{file.sha256[:16]}.part")
    with partial.open("ab") as stream:
        while (there := stream.tell()) < file.bytes:
            last = min(there + _PIECE, file.bytes) - 1
            answer = yield from peer.ask("GET", address, Sent(headers={"range": f"bytes={there}-{last}"}))
            stream.write(answer.content if answer.status_code == 206 else answer.content[there:])
            stream.flush()
            if stream.tell() == there:
                raise ServiceError(
                    "answer.unknown", answer.status_code, f"{address} gave no bytes from {there} on"
                )
    with partial.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != file.sha256:
        partial.unlink()
        raise ServiceError("answer.unknown", 0, f"{address} has the sha256 {found}, not {file.sha256}")
    partial.replace(path)


def _parts(shown: UploadShown, name: str) -> Iterator[int]:
    for first, last in shown.missing.get(name, []):
        yield from range(first, last + 1)


def _put(peer: Peer, address: str, data: bytes, source: Source) -> Exchange[None]:
    stated = base64.b64encode(hashlib.sha256(data).digest()).decode()
    headers = {"content-digest": f"sha-256=:{stated}:", "content-type": "application/octet-stream"}
    try:
        yield from peer.ask("PUT", address, Sent(content=data, headers=headers))
    except ServiceError as error:
        if error.code in ("upload.part", "upload.conflict"):
            raise UserError(f"{source.path} has changed while it was sent; send it again") from error
        raise
