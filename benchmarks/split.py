"""Speed of a merge by two Ray workers beside one, with one thread each, and whether they write the same bytes.

    python benchmarks/split.py --size vit-l-14 --experts 4

In one Ray session, for every technique and repeat, one worker merges and then two, with the inputs in the page cache. The
clock starts when the workers have merged something small and opened their files, so start-up is not measured. Prints medians
and the coordinator's shares of the time: questions about whole groups, blocks made and written, and the sync to the disk,
which two workers cannot shorten.

Invariant: every output is hashed, and a difference ends the run.
"""

import argparse
import hashlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import record
from inputs import SIZES, Inputs, make_inputs

from cluster.capacity import Shape
from cluster.pool import Pool
from cluster.session import connect
from merge_service.engine import Part, PartWorker, Split
from merge_service.merge import merge

PARAMS: dict[str, dict[str, Any]] = {"task_arithmetic": {"scale": 0.3}}
PHASES = {"questions": ("answer",), "blocks": ("write",), "sync": ("settle", "fsync")}


class Clock:
    """Seconds of one merge: in all, and in each call to its workers."""

    def __init__(self) -> None:
        self.began = 0.0
        self.spent: dict[str, float] = {}

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.spent[what] = self.spent.get(what, 0.0) + time.perf_counter() - began

    def split(self, workers: int, tiny: Inputs, scratch: Path) -> Split:
        """So many workers of one thread, which start the clock once they have opened their files."""

        @contextmanager
        def hire(parts: Sequence[Part]) -> Iterator[Callable[..., list[Any]]]:
            pool = Pool(
                "merge",
                WarmWorker,
                lambda actor, rank: actor.remote(parts[rank], tiny, scratch),
                Shape(workers),
            )

            def call(method: str, *arguments: Any) -> list[Any]:
                with self.timed(method):
                    answers = pool.call(method, *arguments).results()
                if method == "open":
                    self.began = time.perf_counter()
                return answers

            try:
                yield call
            finally:
                pool.close()

        return Split(workers, hire)


class WarmWorker(PartWorker):
    """A worker that has merged before, so that nothing is left to be loaded."""

    def __init__(self, part: Part, tiny: Inputs, scratch: Path) -> None:
        super().__init__(part)
        self.tiny, self.scratch = tiny, scratch

    def open(self) -> None:
        """Merge something small in this process, then open the files of the part."""
        out = self.scratch / f"warm-{os.getpid()}.safetensors"
        merge(self.part.technique, self.part.params, self.tiny.base, self.tiny.experts, out)
        out.unlink()
        super().open()


def main(args: argparse.Namespace) -> None:
    """Measure, print, write."""
    tiny, inputs = make_inputs(args.work, "tiny", 2), make_inputs(args.work, args.size, args.experts)
    inputs.warm([inputs.base, *inputs.experts])
    out = args.place / f"split-{os.getpid()}.safetensors"
    results = {}
    with connect("local", threads=1, cpus=args.workers):
        for technique in args.techniques:
            runs: dict[int, list[dict[str, Any]]] = {1: [], args.workers: []}
            for _ in range(args.repeats):
                for workers, done in runs.items():
                    done.append(_once(technique, workers, inputs, tiny, out))
            digests = {run.pop("sha256") for done in runs.values() for run in done}
            if len(digests) > 1:
                raise SystemExit(f"{technique}: outputs differ: {sorted(digests)}")
            results[technique] = {"sha256": digests.pop(), "runs": runs}
            _show(technique, runs, results[technique]["sha256"])
    out.unlink()
    settings = {name: getattr(args, name) for name in ("size", "experts", "workers", "repeats")}
    record.save(args.json, settings | {"output_in_memory": str(args.place).startswith("/dev/shm")}, results)


def _once(technique: str, workers: int, inputs: Inputs, tiny: Inputs, out: Path) -> dict[str, Any]:
    """Seconds of one merge, and the sha256 of what it wrote."""
    out.unlink(missing_ok=True)
    os.sync()
    clock, fsync = Clock(), os.fsync

    def timed_sync(handle: int) -> None:
        with clock.timed("fsync"):
            fsync(handle)

    os.fsync = timed_sync  # type: ignore[assignment]
    try:
        split = clock.split(workers, tiny, out.parent)
        merge(technique, PARAMS.get(technique, {}), inputs.base, inputs.experts, out, split=split)
    finally:
        os.fsync = fsync  # type: ignore[assignment]
    total = time.perf_counter() - clock.began
    phases = {name: sum(clock.spent.get(part, 0.0) for part in parts) for name, parts in PHASES.items()}
    with out.open("rb") as file:
        return {"seconds": total, **phases, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _show(technique: str, runs: dict[int, list[dict[str, Any]]], sha256: str) -> None:
    columns = ("seconds", *PHASES)
    medians = {n: {c: statistics.median(run[c] for run in done) for c in columns} for n, done in runs.items()}
    for workers, row in medians.items():
        print(
            f"{technique:18} {workers} workers  " + "  ".join(f"{c} {row[c]:6.2f}" for c in columns),
            flush=True,
        )
    one, more = medians.values()
    unsynced = (one["seconds"] - one["sync"]) / (more["seconds"] - more["sync"])
    print(
        f"{technique:18} {one['seconds'] / more['seconds']:.2f} times as fast, {unsynced:.2f} times without the sync; "
        f"sha256 {sha256[:16]} in all runs",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="vit-l-14")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--techniques", nargs="+", default=["task_arithmetic", "ties"])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "temporal-merge-bench")
    parser.add_argument("--place", type=Path, help="where outputs go; default --work")
    record.add_json(parser)
    parsed = parser.parse_args()
    parsed.place = parsed.place or parsed.work
    main(parsed)
