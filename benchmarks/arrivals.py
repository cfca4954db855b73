"""What does the 200th expert cost, compared to the 2nd? One stream of experts into one technique.

    python benchmarks/arrivals.py --technique ties --experts 200 --out arrivals.json --plot arrivals.png

Every expert is made, merged into the running state with `advance`, and deleted before the next one comes, so that no
arrival can read an earlier one. Times are of `advance` alone: opening, arithmetic, and both files written and synced.

Invariant: what is counted as read is every file that the arrival opened, whole; as written, the files that it left.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from inputs import SIZES, make_expert, make_inputs
from process import MIB, clear

LINES = (
    ("seconds", 1.0, "seconds"),
    ("cpu", 1.0, "CPU seconds"),
    ("read", MIB, "MiB read"),
    ("written", MIB, "MiB written"),
)


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


def stream(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds, CPU seconds, bytes read and bytes written of every arrival."""
    from merge_service.merge import advance

    base = make_inputs(args.work, args.size, 0).base
    place = clear(args.work / "stream")
    states, merged = (
        [place / "state-0.safetensors", place / "state-1.safetensors"],
        place / "merged.safetensors",
    )
    opened, arrivals = Opened(args.work), []
    for number in range(1, args.experts + 1):
        expert = place / f"expert-{number:04}.safetensors"
        make_expert(expert, args.size, number)
        before, after = states[(number - 1) % 2], states[number % 2]
        inputs = [base, expert, *([before] if number > 1 else [])]
        with opened.watch():
            began, cpu = time.perf_counter(), time.process_time()
            advance(
                args.technique,
                dict(args.set),
                base,
                expert,
                merged,
                expert_id=f"expert-{number}",
                state_in=before if number > 1 else None,
                state_out=after,
                threads=args.threads,
            )
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        unexpected = sorted(
            opened.paths & {str(path.resolve()) for path in place.iterdir()} - _names(inputs, after, merged)
        )
        if unexpected:
            sys.exit(f"arrival {number} opened {unexpected}")
        read, written = (
            _size(path for path in inputs if str(path.resolve()) in opened.paths),
            _size([after, merged]),
        )
        arrivals.append({"seconds": seconds, "cpu": cpu, "read": read, "written": written})
        expert.unlink()
        before.unlink(missing_ok=True)
    clear(place).rmdir()
    return arrivals


def ratios(arrivals: list[dict[str, Any]]) -> dict[str, float]:
    """Medians of the last ten arrivals over medians of ten early ones, the 2nd to the 11th."""
    early, late = arrivals[1:11], arrivals[-10:]
    return {key: median(a[key] for a in late) / median(a[key] for a in early) for key, *_ in LINES}


def plot(arrivals: list[dict[str, Any]], title: str, path: Path) -> None:
    """Time above, bytes below, both from zero."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 1, sharex=True, figsize=(7, 5), layout="constrained")
    numbers = range(1, len(arrivals) + 1)
    for index, (key, unit, label) in enumerate(LINES):
        values = [arrival[key] / unit for arrival in arrivals]
        axes[index // 2].plot(numbers, values, label=label, linewidth=1, color=("C0", "C1")[index % 2])
    for axis, label in zip(axes, ("seconds", "MiB")):
        axis.set(ylim=(0, None), ylabel=label)
        axis.legend(loc="lower right", frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_title(title, loc="left")
    axes[1].set_xlabel("arrival")
    figure.savefig(path, dpi=150)


def _names(inputs: list[Path], *outputs: Path) -> set[str]:
    return {str(path.resolve()) for path in (*inputs, *outputs)}


def _size(paths: Any) -> int:
    return sum(path.stat().st_size for path in paths)


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def main() -> None:
    """Stream, save, plot, and print the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--technique", default="ties")
    parser.add_argument("--set", action="append", default=[], type=_setting, metavar="p=v")
    parser.add_argument("--experts", type=int, default=200)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "temporal-merge-bench")
    parser.add_argument("--out", type=Path, default=Path("arrivals.json"))
    parser.add_argument("--plot", type=Path, default=Path("arrivals.png"))
    args = parser.parse_args()
    if args.experts < 21:
        parser.error("--experts must be at least 21: ten early arrivals are compared with ten late ones")
    arrivals = stream(args)
    found = {
        "technique": args.technique,
        "size": args.size,
        "threads": args.threads,
        "ratios": ratios(arrivals),
    }
    args.out.write_text(json.dumps({**found, "arrivals": arrivals}, indent=1))
    plot(arrivals, f"{args.technique}, {args.size} model: one arrival after the other", args.plot)
    last = f"arrivals {args.experts - 9}-{args.experts} over arrivals 2-11"
    print(f"{args.technique}, medians of {last}: {json.dumps(found['ratios'])}")
    print(f"every number: {args.out}; plot: {args.plot}")


if __name__ == "__main__":
    main()
