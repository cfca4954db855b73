"""Tools of all tests of the fault matrix: placing faults, checking that they fired, and checking that they had no effect.

"Same" is meant strictly: identical sha256 of every weights file and identical scores; the same runs, parameters and
metrics in MLflow (except durations and speeds); `verify` clean; no stages, temporary files or worker processes left.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.store.local import Store
from pipeline.tracking.mlflow.export import export
from pipeline.workspace.lock import is_held
from tests.world import Cluster, artifacts, command

TIMED = ("seconds", "samples_per_second", "throughput", "memory", "rate")
"""Parts of metric names in which two runs of the same study may differ."""
WORKER_POINTS = (
    "train.start", "train.after_step", "train.after_ckpt", "train.before_commit", "train.after_commit",
    "store.after_stage", "store.after_fsync", "store.before_record", "store.after_rename",
    "merge.start", "merge.before_commit", "merge.after_commit", "evaluate.start", "evaluate.after_commit",
)  # fmt: skip
DRIVER_POINTS = ("driver.after_commit", "outbox.after_append", "tracking.after_send")
PATIENCE = 240.0
"""After how many seconds a test ends that waits for what should happen. What is waited for is much faster on an idle machine."""


class Faults:
    """Faults placed at named points, each with a marker file that says whether it has fired."""

    def __init__(self, room: Path) -> None:
        self.room, self.placed, self.markers = room, dict[str, list[dict[str, Any]]](), list[Path]()

    def at(self, point: str, nth: int = 1, do: str = "kill", times: int = 1, **more: Any) -> "Faults":
        """Have `do` happen at the nth passing of a point, in so many processes one after the other."""
        for _ in range(times):
            marker = self.room / f"fault-{len(self.markers)}-{point}"
            self.markers.append(marker)
            self.placed.setdefault(point, []).append({"at": nth, "do": do, "marker": str(marker), **more})
        return self

    def counted(self, point: str) -> int:
        """How often all processes together passed a point, which must have been placed with `do="count"`."""
        placed = next(fault for fault in self.placed[point] if fault["do"] == "count")
        return len(Path(placed["marker"]).read_text().splitlines())

    @property
    def missed(self) -> list[str]:
        """Faults that have not fired."""
        return [marker.name for marker in self.markers if not marker.exists()]


def run(study: Path, out: Path, cluster: Cluster, faults: Faults | None = None) -> Any:
    """Run a study on the warm cluster to its end; every fault must fire."""
    placed = faults.placed if faults else None
    answer = command("run", study, "--out", out, "--address", cluster.address, faults=placed)
    if faults:
        assert not faults.missed, f"never fired: {faults.missed}: {answer.stderr}"
    return answer


def must_go_on(
    study: Path, out: Path, undisturbed: Path, address: str, cluster: Cluster | None = None
) -> None:
    """Repeat the command of a run that ended early: finished steps are not repeated, and the result is the same."""
    before = created(out)
    answer = command("run", study, "--out", out, "--address", address)
    assert answer.returncode == 0, answer.stderr
    assert before.items() <= created(out).items(), "a finished step was done again"
    must_be_same(out, undisturbed, cluster)


def must_be_same(
    out: Path, undisturbed: Path, cluster: Cluster | None = None, tracker: str | None = None
) -> None:
    """Raise AssertionError unless the result of a run equals that of the undisturbed one, with nothing left behind.

    `tracker` is the address of its MLflow server, if it is not the file in OUT.
    """
    assert artifacts(out) == artifacts(undisturbed)
    assert tracked(tracker or out) == tracked(undisturbed)
    assert Store(out / "store").verify() == []
    assert leftovers(out) == []
    assert not is_held(out), "somebody still holds the driver's lock"
    wait_until(lambda: not handles(out), "files of a finished run are held open")
    if cluster is not None:
        wait_until(lambda: not workers_of(cluster), "workers of a finished run live on")


def tracked(where: Path | str) -> str:
    """The content of MLflow for the run in OUT, or at a server: runs, models, parameters, metrics; of durations only
    the names.
    """
    kept = []
    for entry in export(
        where if isinstance(where, str) else f"sqlite:///{where / 'mlflow.db'}", "temporal-merge"
    ):
        who = entry.get("run") or entry.get("model")
        metrics = [
            (key, *([None] if any(part in key for part in TIMED) else rest))
            for key, *rest in entry.get("metrics", ())
        ]
        kept.append([who, sorted(metrics, key=str), _params(entry)])
    return json.dumps(sorted(kept, key=str), indent=1)


def _params(entry: dict[str, Any]) -> list[Any]:
    """Parameters without scheduling, library versions and the address of the tracker, on which no result depends."""
    params = entry.get("params") or {}
    return sorted(
        pair for pair in params.items() if not pair[0].startswith(("schedule.", "resources.", "tracking."))
    )


def leftovers(out: Path) -> list[str]:
    """Stages, temporary files and scratch that a finished run should not have."""
    found = [
        *(out / "store" / ".stage").glob("*"),
        *out.rglob("*.tmp"),
        *(out / "scratch").glob("*/checkpoints"),
    ]
    return sorted(str(path.relative_to(out)) for path in found)


def handles(out: Path) -> list[str]:
    """Files of a run that a process has open, without those that the tests open to read MLflow."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if link.parts[2] == str(os.getpid()):
                continue
            target = str(link.readlink())
            found += [target] if target.startswith(f"{out}/") else []
    return found


def created(out: Path) -> dict[str, int]:
    """The commit time of each artifact, to see that none was made again; stages are left out."""
    return {
        path.parent.name: json.loads(path.read_text())["created_ms"]
        for path in (out / "store").glob("[!.]*/*/record.json")
    }


def results(out: Path, kind: str) -> list[dict[str, Any]]:
    """The results in the records of a kind."""
    return [json.loads(path.read_text())["result"] for path in (out / "store" / kind).glob("*/record.json")]


def workers_of(cluster: Cluster) -> list[int]:
    """Process ids of the actors of a test cluster: children of a raylet of its session that are not idle."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            title = (entry / "cmdline").read_bytes()
            ours = int(process_facts(int(entry.name))[3]) == cluster.process.pid
            if ours and title.startswith((b"ray::Worker", b"ray::Merger")):
                found.append(int(entry.name))
    return found


def process_facts(pid: int) -> list[str]:
    """State, parent, group, session and so on of a process, as the kernel lists them. Raises OSError if it has ended."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def wait_until(true: Callable[[], Any], what: str, seconds: float = PATIENCE) -> float:
    """Wait for a condition and return the seconds. Raises AssertionError with `what` after `seconds`."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds, f"{what} after {seconds:g} s"
        time.sleep(0.1)
    return time.monotonic() - began
