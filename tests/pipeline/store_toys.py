"""Toy artifacts, and a program that commits them, ends on the way, or races another: `store_toys.py WORK ROOT ...`."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from merge_service.faults import VARIABLE
from pipeline.errors import NondeterminismError
from pipeline.files import ownership
from pipeline.identity import step_fingerprint
from pipeline.store.artifact import Record
from pipeline.store.local import Store
from pipeline.store.open import store_at


@dataclass(frozen=True)
class ToyStep:
    kind: str = "train"
    spec: dict[str, Any] = field(default_factory=lambda: {"version": 1, "toy": 1})
    slug: str = "t1-toy"
    label: str = "t1 toy: expert"
    inputs: dict[str, str] = field(default_factory=dict)
    disk_bytes: int = 0

    @property
    def fingerprint(self) -> str:
        return step_fingerprint(self.kind, self.spec)


CONTENT = {"weights.bin": bytes(range(256)) * 20, "config.json": b'{"a": 1}'}


def put(
    where: Store,
    step: ToyStep | None = None,
    content: dict[str, bytes] | None = None,
    result: dict[str, Any] | None = None,
) -> Record:
    """Commit a toy artifact."""
    step = step or ToyStep()
    with where.staged(step) as stage:
        for name, data in (CONTENT if content is None else content).items():
            (stage / name).parent.mkdir(exist_ok=True)
            (stage / name).write_bytes(data)
        return where.commit(step, stage, {"loss": 0.5} if result is None else result, seconds=1.5)


def numbered(number: int) -> ToyStep:
    return ToyStep(spec={"number": number})


def child(work: str, *arguments: Any, faults: dict[str, Any] | None = None) -> subprocess.Popen[bytes]:
    """This file as a process that does `work`, with faults placed at its points."""
    environment = {**os.environ, VARIABLE: json.dumps(faults or {})}
    return subprocess.Popen([sys.executable, __file__, work, *map(str, arguments)], env=environment)


def exit_code(work: str, *arguments: Any, faults: dict[str, Any] | None = None) -> int:
    """The exit code of `work`, negative for a signal."""
    return child(work, *arguments, faults=faults).wait(60)


def put_one(root: str) -> None:
    put(store_at(root, Path()))


def die_while_writing(root: str) -> None:
    with store_at(root, Path()).staged(ToyStep()) as stage:
        (stage / "weights.bin").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)


def die_holding(path: str) -> None:
    with ownership.locked(Path(path)):
        os._exit(0)


def put_at_once(root: str, gate: str, content: str) -> None:
    """Commit eight steps, each when its gate opens; the exit code is the number of conflicts."""
    conflicts = 0
    for number in range(8):
        while not Path(f"{gate}{number}").exists():
            time.sleep(0.0005)
        try:
            put(store_at(root, Path()), numbered(number), {"weights.bin": content.encode()})
        except NondeterminismError:
            conflicts += 1
        Path(f"{gate}{number}-{os.getpid()}").touch()
    sys.exit(conflicts)


def put_many(root: str, count: str) -> None:
    for number in range(int(count)):
        put(store_at(root, Path()), numbered(number))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
