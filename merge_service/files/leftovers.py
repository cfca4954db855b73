"""Temporary files: written beside their final name, renamed when complete, and removed once their writer is dead.

The name of a temporary file identifies its writer: host, process id and start time, so that a reused id is not taken for the
writer. Processes on other hosts cannot be checked, so their files stay until they are a week old.

Invariant: a file of a live process is never removed.
"""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import socket
import time
from functools import cache
from pathlib import Path

_FOREIGN_AGE = 7 * 24 * 3600.0
_FAMILY = re.compile(r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json|\.limits\.json)?$")

_PARTS = re.compile(r"\.(.+)\.[0-9a-f]{16}\.parts")
OWNER = "owner"
"""The file in a folder of parts that says whose it is."""
_TEMPORARY = re.compile(r"\..+\.([^.]+)\.[^.]+\.tmp")


def temporary(path: Path) -> Path:
    """A new name beside `path` for the file until it is complete."""
    return path.with_name(f".{path.name}.{owner_mark()}.{secrets.token_hex(4)}.tmp")


def sweep(path: Path) -> None:
    """Remove temporary files of dead writers beside `path`: of the file itself, of its shards and of its index."""
    stem = _FAMILY.sub("", path.name)
    shape = re.compile(
        rf"\.({re.escape(path.name)}|{re.escape(stem)}{_FAMILY.pattern[:-1]})\.([^.]+)\.[^.]+\.tmp"
    )
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            found = shape.fullmatch(entry.name)
            if found and is_abandoned(found.group(4), time.time() - entry.stat().st_mtime):
                Path(entry.path).unlink(missing_ok=True)


def parts_folder(path: Path, identity: str) -> Path:
    """The hidden folder beside `path` in which the parts of a file NAME.safetensors are made; `identity` is a digest of 16 digits."""
    return path.with_name(f".{path.name.removesuffix('.safetensors')}.{identity}.parts")


def is_parts_folder(path: Path) -> bool:
    """Whether this is such a folder."""
    return _PARTS.fullmatch(path.name) is not None and path.is_dir()


def sweep_parts(path: Path, keep: Path | None = None) -> None:
    """Remove the folders of parts of `path` whose makers are dead, except one that is to be gone on with."""
    stem = path.name.removesuffix(".safetensors")
    for found in list(path.parent.iterdir()) if path.parent.is_dir() else ():
        named = _PARTS.fullmatch(found.name)
        if named and named[1] == stem and found != keep and found.is_dir():
            with contextlib.suppress(OSError):
                if is_abandoned((found / OWNER).read_text(), 0.0):
                    shutil.rmtree(found, ignore_errors=True)


def sweep_directory(place: Path) -> None:
    """Remove temporary files of dead writers in a directory, of any file."""
    with contextlib.suppress(OSError), os.scandir(place) as entries:
        for entry in entries:
            found = _TEMPORARY.fullmatch(entry.name)
            if found and is_abandoned(found.group(1), time.time() - entry.stat().st_mtime):
                Path(entry.path).unlink(missing_ok=True)


def owner_mark() -> str:
    """Text that identifies this process: host, process id and start time (so that a reused id differs)."""
    pid = os.getpid()
    return f"{_host()}-{pid}-{_started(pid) or 0}"


def is_abandoned(mark: str, age: float) -> bool:
    """Whether the owner of a mark `age` seconds old is gone: dead on this host, or on another host with a mark above a week old."""
    host, _, rest = mark.partition("-")
    pid, _, started = rest.partition("-")
    if host != _host() or not pid.isdigit() or not started.isdigit():
        return age > _FOREIGN_AGE
    return _started(int(pid)) != int(started)


@cache
def _host() -> str:
    """Text for host, boot and process-id namespace: processes with the same text can check each other's ids."""
    parts = [socket.gethostname()]
    for source in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with contextlib.suppress(OSError):
            path = Path(source)
            parts.append(str(path.readlink()) if path.is_symlink() else path.read_text().strip())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _started(pid: int) -> int | None:
    """Start time of a live process in clock ticks since boot, 0 if /proc does not give it, None if the process is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, IndexError, ValueError):
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return 0
