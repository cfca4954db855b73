"""The cost of the thousandth expert beside that of the second, for each technique that streams.

    python benchmarks/arrivals.py --techniques ties,average
    python benchmarks/arrivals.py --techniques ties --size tiny --plot arrivals.png
    python benchmarks/arrivals.py --techniques regmean,fisher --experts 200 --span 10

Every expert is its own file (a copy of one of a few). `advance` merges it into the running state. The file is deleted before the next
expert comes, so that no arrival can read an earlier one. Only `advance` is measured: opening, arithmetic, and writing both files. Techniques
that see data get a statistic that is made up, because no cost depends on its numbers.

Invariant: bytes read are those of every file that the arrival opened, whole; bytes written are those of the files that it left.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import record
from inputs import SIZES, make_inputs
from process import MIB, clear

LINES = (
    ("seconds", 1.0, "seconds"),
    ("cpu", 1.0, "CPU seconds"),
    ("read", MIB, "MiB read"),
    ("written", MIB, "MiB written"),
    ("memory", MIB, "MiB resident"),
)
DISTINCT = 16  # experts that are made; making a new one takes as long as merging it
SPAN = 20
"""Arrivals that a ratio is taken over by default: the last ones of the stream beside the 2nd to the 21st of a new one."""
Arrival = dict[str, float]


class Opened:
    """The files below a directory that this process opens, by the interpreter's audit events."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.paths = str(directory.resolve()), set[str]()
        self._watching = False
        sys.addaudithook(self._hook)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Start afresh, and collect until the end of the block."""
        self.paths.clear()
        self._watching = True
        try:
            yield
        finally:
            self._watching = False

    def _hook(self, event: str, args: tuple) -> None:
        if self._watching and event == "open" and isinstance(args[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(args[0]))
            if path.startswith(self.directory):
                self.paths.add(path)


class Stream:
    """Experts that arrive one after another at one technique, in a folder of its own."""

    def __init__(self, technique: str, size: str, threads: int, folder: Path, opened: Opened) -> None:
        self.technique, self.size, self.threads, self.opened = technique, size, threads, opened
        inputs = make_inputs(folder.parent, size, DISTINCT)
        self.base, self.experts, self.folder = inputs.base, inputs.experts, clear(folder)
        self.statistic = made_up_file(folder.parent, size, technique)
        self.arrivals: list[Arrival] = []

    def arrive(self) -> Arrival:
        """Seconds, CPU seconds, bytes read and written, and most resident bytes of one more arrival."""
        number = len(self.arrivals) + 1
        expert, merged, before, after = (
            self.folder / f"{name}.safetensors"
            for name in (f"expert-{number}", "merged", f"state-{number - 1}", f"state-{number}")
        )
        shutil.copyfile(self.experts[number % DISTINCT], expert)
        inputs = [
            self.base,
            expert,
            *([before] if number > 1 else []),
            *([self.statistic] if self.statistic else []),
        ]
        with self.opened.watch():
            found = self._advance(expert, merged, before if number > 1 else None, after)
        opened = {Path(path).name for path in self.opened.paths}
        allowed = {path.name for path in (*inputs, after, merged)}
        if unexpected := {path.name for path in self.folder.iterdir()} & opened - allowed:
            sys.exit(f"arrival {number} opened {sorted(unexpected)}")
        found["read"] = sum(path.stat().st_size for path in inputs if path.name in opened)
        found["written"] = sum(path.stat().st_size for path in (after, merged))
        expert.unlink()
        before.unlink(missing_ok=True)
        self.arrivals.append(found)
        return found

    def _advance(self, expert: Path, merged: Path, before: Path | None, after: Path) -> Arrival:
        from merge_service.merge import advance

        Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory starts anew
        began, cpu = time.perf_counter(), time.process_time()
        advance(
            self.technique, {}, self.base, expert, merged, expert_id=expert.stem, state_in=before,
            state_out=after, threads=self.threads, statistics=self.statistic,
        )  # fmt: skip
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        return {"seconds": seconds, "cpu": cpu, "memory": _peak_resident()}


def made_up_file(place: Path, size: str, technique: str) -> Path | None:
    """A statistic that the technique needs of an expert of this size; None if it needs none."""
    import numpy as np
    from evidence import made_up

    from merge_service import techniques
    from merge_service.statistics import About, write

    one = techniques.get(technique)
    needed = one.asked(one.resolve({}, "merge"))
    if needed is None:
        return None
    file = place / size / f"{needed.kind}.safetensors"
    if not file.exists():
        shapes, rng = SIZES[size].shapes(), np.random.default_rng(0)
        write(file, dict(made_up(needed.kind, shapes, rng)), About(needed.kind, {}, 1))
    return file


def _peak_resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def measure(technique: str, args: argparse.Namespace, opened: Opened) -> dict[str, Any]:
    """A long stream; its last arrivals alternate with the first ones of a new stream, on an equally busy machine.

    Memory is compared with the long stream's own first arrivals: the new stream runs in the same process and would count the same leak.
    """
    long, young = (
        Stream(technique, args.size, args.threads, args.work / f"{name}-{os.getpid()}", opened)
        for name in ("long", "young")
    )
    while len(long.arrivals) < args.experts - args.span:
        long.arrive()
    young.arrive()
    pairs = [(long.arrive(), young.arrive()) for _ in range(args.span)]
    own = long.arrivals[1 : args.span + 1]
    late, early = (_columns([pair[side] for pair in pairs]) for side in (0, 1))
    early["memory"] = [arrival["memory"] for arrival in own]
    for stream in (long, young):
        clear(stream.folder).rmdir()
    return {
        "ratios": {key: median(a / b for a, b in zip(late[key], early[key])) for key in late},
        "late": late,
        "early": early,
        "all": _columns(long.arrivals) if args.all else None,
    }


def plot(columns: dict[str, list[float]], title: str, path: Path) -> None:
    """Time above, bytes below, both from zero."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 1, sharex=True, figsize=(7, 5), layout="constrained")
    for index, (key, unit, label) in enumerate(LINES):
        values = [value / unit for value in columns[key]]
        axes[index > 1].plot(range(1, len(values) + 1), values, label=label, linewidth=1)
    for axis, label in zip(axes, ("seconds", "MiB")):
        axis.set(ylim=(0, None), ylabel=label)
        axis.legend(loc="lower right", frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_title(title, loc="left")
    axes[1].set_xlabel("arrival")
    figure.savefig(path, dpi=150)


def streaming() -> list[str]:
    """Every technique that has a stream form and needs no statistics of data."""
    from merge_service import techniques

    every = map(techniques.get, techniques.names())
    return [
        one.name for one in every if "stream" in one.forms and one.asked(one.resolve({}, "merge")) is None
    ]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--techniques", metavar="a,b,...", help="default: all that stream")
    parser.add_argument("--experts", type=int, default=1000)
    parser.add_argument("--span", type=int, default=SPAN, help="arrivals that a ratio is taken over")
    parser.add_argument("--size", choices=SIZES, default="micro")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "temporal-merge-bench")
    parser.add_argument("--all", action="store_true", help="keep the figures of every arrival")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="the same drawn, of the last technique")
    record.add_json(parser)
    args = parser.parse_args(arguments)
    if args.experts < 2 * args.span + 1:
        parser.error(
            f"--experts must be at least {2 * args.span + 1}: early arrivals are compared with late ones"
        )
    args.techniques = args.techniques.split(",") if args.techniques else streaming()
    return args


def main() -> None:
    """Stream, print the ratios, plot, save."""
    args = parse()
    opened, found = Opened(args.work), {}
    for technique in args.techniques:
        found[technique] = measure(technique, args, opened)
        print(f"{technique}: {json.dumps(found[technique]['ratios'])}", flush=True)
    if args.plot:
        plot(found[technique]["all"], f"{technique}, {args.size} model: one arrival after another", args.plot)
    settings = {name: getattr(args, name) for name in ("size", "experts", "threads", "span")}
    nbytes = make_inputs(args.work, args.size, 0).nbytes
    record.save(args.json, settings | {"checkpoint_bytes": nbytes}, found)


def _columns(arrivals: list[Arrival]) -> dict[str, list[float]]:
    return {key: [arrival[key] for arrival in arrivals] for key, *_ in LINES}


if __name__ == "__main__":
    main()
