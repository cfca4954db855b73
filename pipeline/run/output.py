"""Standard output and standard error that can neither end nor delay a study.

Their reader may disappear (`| head -1`, a pager, a closed session) or stop reading (a terminal held with Ctrl-S); the disk of a
log may be full.

Invariant: while a study runs, no write to either stream raises or waits. Unread output is kept up to a limit and then left out,
and a line says so as soon as the reader continues.
"""

import contextlib
import errno
import io
import os
import select
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

BACKLOG_BYTES = 2**20
FLUSH_SECONDS, LAST_SECONDS = 0.2, 2.0
"""How long a flush waits for a reader that has not stalled; and how long the end of the program waits."""
_PIECE_BYTES = 4096
_GONE = frozenset({errno.EPIPE, errno.EIO, errno.EBADF, errno.ECONNRESET, errno.ENXIO})


class ReaderGone(Exception):
    """Standard output has no reader any more, and only its text is left to write."""


class OutputLost(OSError):
    """Standard output cannot be written, for instance to a full disk."""

    exit_code = 2

    def __str__(self) -> str:
        return f"standard output cannot be written: {self.strerror}; send it to a place that has room"


class Steady(io.RawIOBase):
    """A file descriptor that is written to by its own thread.

    With `exacting`, as for standard output until a study begins, a write waits for its reader, raises ReaderGone if there is
    none, and OutputLost if the text cannot be written.
    """

    def __init__(self, fd: int, exacting: bool = False) -> None:
        super().__init__()
        self.exacting = exacting
        self._fd, self._pid = fd, os.getpid()
        self._changed = threading.Condition()
        self._backlog, self._left_out = bytearray(), 0
        self._stalled = False
        self._thread: threading.Thread | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def write(self, data: "ReadableBuffer", /) -> int:
        text = bytes(data)
        if self.exacting:
            self._write_now(text)
            return len(text)
        if os.getpid() != self._pid:  # a forked process has no thread
            with contextlib.suppress(OSError, ReaderGone):
                self._write_now(text)
            return len(text)
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="output", daemon=True)
                self._thread.start()
            if len(self._backlog) + len(text) > BACKLOG_BYTES:
                self._left_out += len(text)
            else:
                self._backlog += text
            self._changed.notify_all()
        return len(text)

    def flush(self) -> None:
        """Wait briefly for the reader; one that has stalled is not waited for again until it continues."""
        self.drain(FLUSH_SECONDS)

    def drain(self, seconds: float) -> None:
        """Wait until everything is written, `seconds` at most."""
        if os.getpid() != self._pid:
            return
        with self._changed:
            if not self._stalled:
                self._stalled = not self._changed.wait_for(lambda: not self._backlog, seconds)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._backlog)
                piece = bytes(self._backlog[:_PIECE_BYTES])
            written = self._write_some(piece)
            with self._changed:
                self._stalled = False
                del self._backlog[:written]
                if not self._backlog and self._left_out:
                    self._backlog += f"\n[{self._left_out} bytes that were not read are left out]\n".encode()
                    self._left_out = 0
                self._changed.notify_all()

    def _write_some(self, piece: bytes) -> int:
        """The number of bytes of a piece that are done; all of them, if they cannot be written."""
        try:
            return os.write(self._fd, piece)
        except BlockingIOError:
            select.select([], [self._fd], [])
            return 0
        except OSError as error:
            if error.errno in _GONE:
                self._silence()
            return len(piece)

    def _write_now(self, text: bytes) -> None:
        while text:
            try:
                text = text[os.write(self._fd, text) :]
            except BlockingIOError:
                select.select([], [self._fd], [])
            except OSError as error:
                self._silence()
                if error.errno in _GONE:
                    raise ReaderGone from None
                raise OutputLost(error.errno, error.strerror) from None

    def _silence(self) -> None:
        """Redirect the descriptor to /dev/null, for this process's libraries and its child processes as well."""
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._fd)
            os.close(nowhere)


@contextlib.contextmanager
def steady(exacting: bool = False) -> Iterator[None]:
    """Within the context, standard error, and unless `exacting` standard output, can neither end nor delay the work.

    Streams that other code has replaced (a notebook, a test) stay as they are.
    """
    mine = []
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        raw = getattr(stream, "buffer", None)
        if isinstance(raw, Steady):
            mine.append((name, stream, stream, raw.exacting))
            raw.exacting = raw.exacting and exacting
        elif stream is not None and stream is getattr(sys, f"__{name}__"):
            with contextlib.suppress(OSError, ValueError):
                made = _text(stream, Steady(stream.fileno(), exacting and name == "stdout"))
                mine.append((name, stream, made, False))
                setattr(sys, name, made)
    try:
        yield
    finally:
        for name, before, made, was_exacting in reversed(mine):
            raw = made.buffer
            raw.drain(LAST_SECONDS)
            if before is made:
                raw.exacting = was_exacting
            elif getattr(sys, name) is made:
                setattr(sys, name, before)


def _text(stream: io.TextIOWrapper, raw: Steady) -> io.TextIOWrapper:
    stream.flush()
    return io.TextIOWrapper(
        raw, stream.encoding, stream.errors, line_buffering=True, write_through=True  # type: ignore[arg-type]
    )  # fmt: skip
