"""Small files that appear whole: written beside their name, then renamed.

Every state, configuration and index of this project is written here, so one place decides what survives a power cut.

Invariant: a reader of the name finds the old file or the new one, never a part. With `sync` the new one is on disk, with its name, when
`replace_whole` returns.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from merge_service.files.leftovers import temporary
from merge_service.files.sync import sync_directory

Content = bytes | str | Iterable[str]
"""Bytes, or text in UTF-8, whole or in pieces."""
_BUFFER = 1 << 20


def replace_whole(path: Path, content: Content, *, sync: bool = True, mode: int = 0o666) -> None:
    """Replace a file, or make it, with the permissions `mode` less the umask. Raises OSError; the old file then stays."""
    with prepared(path, content, sync=sync, mode=mode) as made:
        made.replace(path)
    if sync:
        sync_directory(path.parent)


@contextlib.contextmanager
def prepared(path: Path, content: Content, *, sync: bool = True, mode: int = 0o666) -> Iterator[Path]:
    """A temporary file beside `path` with this content, on disk with `sync`; gone at the end unless it was renamed. Raises OSError."""
    target = temporary(path)
    pieces = [content] if isinstance(content, bytes | str) else content
    try:
        handle = os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
        with os.fdopen(handle, "wb", buffering=_BUFFER) as stream:
            for piece in pieces:
                stream.write(piece if isinstance(piece, bytes) else piece.encode())
            if sync:
                stream.flush()
                os.fsync(stream.fileno())
        yield target
    finally:
        target.unlink(missing_ok=True)
