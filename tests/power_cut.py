"""What a power cut would leave on a disk, derived from the calls that a process really makes.

`recorded` runs Python code with `power_cut.c` preloaded, a shim that records every change of a file and every call that forces
one to disk. `Disk` follows these calls as the strictest file system would: content is safe only after `fsync` of the file, a name
only after `fsync` of its directory.

Invariant: nothing of Python or of the product is replaced, so a call that the product omits is missing here.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tests.world import ROOT

COMPILER = shutil.which("cc") or shutil.which("gcc")
NEEDS = "to see the calls of the C library, a C compiler (cc) has to be installed"


_room = tempfile.TemporaryDirectory()


class Event(NamedTuple):
    """A call: `write`, `sync`, `mkdir`, `unlink` of a path, or `rename`, `link` from `path` to `to`."""

    call: str
    path: Path
    to: Path | None = None


def recorded(code: str, root: Path, *arguments: object) -> list[Event]:
    """The calls below `root` that `python -c code root *arguments` makes, in order; it must end with 0."""
    log = root.with_name(f"{root.name}.calls")
    environment = {"LD_PRELOAD": str(_shim()), "POWER_CUT_ROOT": str(root), "POWER_CUT_LOG": str(log)}
    answer = subprocess.run(
        [sys.executable, "-c", code, str(root), *map(str, arguments)],
        env=os.environ | environment | {"PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    events = []
    for line in log.read_text().splitlines():
        call, path, *to = line.split("\t")
        events.append(Event(call, Path(path), Path(to[0]) if to else None))
    return events


class Disk:
    """Which content and names are safe, after a sequence of events."""

    def __init__(self) -> None:
        self._known, self._content, self._names = set[Path](), set[Path](), set[Path]()

    def passing(self, events: list[Event]) -> Iterator[Event]:
        """Every event, before it happens; the disk has the state after the earlier ones."""
        for event in events:
            yield event
            self._take(event)

    def unsafe(self, place: Path) -> list[str]:
        """What a power cut now would remove: content and names at and below a place, relative to it, and its own name."""
        content = [
            f"content of {path.relative_to(place)}" for path in self._content if path.is_relative_to(place)
        ]
        names = [f"name {path.relative_to(place)}" for path in self._names if path.is_relative_to(place)]
        return sorted(content + names)

    def _take(self, event: Event) -> None:
        if event.call == "sync":
            self._content.discard(event.path)
            self._names = {path for path in self._names if path.parent != event.path}
        elif event.call in ("write", "mkdir"):
            if event.path not in self._known:
                self._known.add(event.path)
                self._names.add(event.path)
            if event.call == "write":
                self._content.add(event.path)
        elif event.call == "unlink":
            self._known.discard(event.path)
            self._content.discard(event.path)
            self._names.add(event.path)
        elif event.to is not None:
            self._move(event.path, event.to, keep=event.call == "link")

    def _move(self, old: Path, new: Path, keep: bool) -> None:
        for paths in (self._known, self._content, self._names):
            moved = {path for path in paths if path.is_relative_to(old)}
            paths -= set() if keep else moved
            paths |= {new / path.relative_to(old) for path in moved}
        self._names.add(new)


@cache
def _shim() -> Path:
    assert COMPILER, NEEDS
    library = Path(_room.name) / "power_cut.so"
    source = Path(__file__).with_suffix(".c")
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return library
