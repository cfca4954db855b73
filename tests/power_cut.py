"""What a power cut would leave on a disk, derived from the calls that a process really makes.

`recorded` runs Python code with `power_cut.c` preloaded, a shim that records every change of a file and every call that forces
one to disk. `Disk` follows these calls as the strictest file system would: content is safe only after `fsync` of the file, a name
only after `fsync` of its directory. `Remains` follows them with the bytes, and writes out what such a file system may hold after a cut.

Invariant: nothing of Python or of the product is replaced, so a call that the product omits is missing here.
"""

import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
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
    kept: Path | None = None
    """A copy of the file as it is after the call, where copies are kept."""


def recorded(code: str, root: Path, *arguments: object, kept: Path | None = None) -> list[Event]:
    """The calls below `root` that `python -c code root *arguments` makes, in order; it must end with 0. With a folder `kept`, copies of
    the files are kept there."""
    log = root.with_name(f"{root.name}.calls")
    environment = {"LD_PRELOAD": str(_shim()), "POWER_CUT_ROOT": str(root), "POWER_CUT_LOG": str(log)}
    if kept is not None:
        environment["POWER_CUT_KEPT"] = str(kept)
    answer = subprocess.run(
        [sys.executable, "-c", code, str(root), *map(str, arguments)],
        env=os.environ | environment | {"PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    events = []
    for line in log.read_text().splitlines():
        call, path, to, number = line.split("\t")
        copy = kept / number if kept is not None and number else None
        events.append(Event(call, Path(path), Path(to) if to else None, copy))
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


@dataclass
class _File:
    """Content by its copies: what is safe, and what was written since, any of which may be on the disk."""

    safe: Path | None = None
    later: list[Path] = field(default_factory=list)


@dataclass
class _Folder:
    """Names: those that are safe, the changes since, each of which may be on the disk without the others; and those of now."""

    safe: dict[str, "_File | _Folder"] = field(default_factory=dict)
    later: list[tuple[str, "_File | _Folder | None"]] = field(default_factory=list)
    now: dict[str, "_File | _Folder"] = field(default_factory=dict)

    def change(self, name: str, to: "_File | _Folder | None") -> None:
        self.later.append((name, to))
        if to is None:
            self.now.pop(name, None)
        else:
            self.now[name] = to


class Remains:
    """A file system with root `root`, after the calls that were taken; they must have been recorded with copies."""

    def __init__(self, root: Path) -> None:
        self._root, self._top = root, _Folder()

    def take(self, event: Event) -> None:
        """A call happens."""
        if event.path == self._root and event.call == "mkdir":
            return
        if event.call == "sync":
            self._sync(event)
            return
        folder, name = self._place(event.path)
        if event.call == "mkdir":
            folder.change(name, _Folder())
        elif event.call == "unlink":
            folder.change(name, None)
        elif event.call == "write":
            if name not in folder.now:
                folder.change(name, _File())
            file = folder.now[name]
            assert isinstance(file, _File)
            if event.kept is not None:
                file.later.append(event.kept)
        elif event.to is not None:
            moved = folder.now[name]
            if event.call == "rename":
                folder.change(name, None)
            other, new = self._place(event.to)
            other.change(new, moved)

    def write_out(self, place: Path, luck: random.Random | None) -> None:
        """Make the directory `place` what is on the disk after a power cut now: without `luck` only what is safe; else some of the changes
        since, and of files that were not synced an older content, or a part."""
        self._write(self._top, place, luck)

    def _write(self, node: _File | _Folder, place: Path, luck: random.Random | None) -> None:
        if isinstance(node, _File):
            choices = [node.safe, *node.later]
            chosen = node.safe if luck is None else luck.choice(choices)
            data = chosen.read_bytes() if chosen is not None else b""
            if luck is not None and chosen is not node.safe and luck.random() < 0.3:
                data = data[: luck.randrange(len(data) + 1)]
            place.write_bytes(data)
            return
        names = dict(node.safe)
        for name, to in node.later if luck is not None else ():
            if luck is not None and luck.random() < 0.5:
                names.pop(name, None)
                if to is not None:
                    names[name] = to
        place.mkdir()
        for name, one in names.items():
            self._write(one, place / name, luck)

    def _sync(self, event: Event) -> None:
        folder, name = (self._top, "") if event.path == self._root else self._place(event.path)
        node = folder.now[name] if name else self._top
        if isinstance(node, _Folder):
            node.safe, node.later = dict(node.now), []
        else:
            node.safe, node.later = event.kept, []

    def _place(self, path: Path) -> tuple[_Folder, str]:
        folder = self._top
        for part in path.relative_to(self._root).parts[:-1]:
            below = folder.now[part]
            assert isinstance(below, _Folder)
            folder = below
        return folder, path.name


@cache
def _shim() -> Path:
    assert COMPILER, NEEDS
    library = Path(_room.name) / "power_cut.so"
    source = Path(__file__).with_suffix(".c")
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return library
