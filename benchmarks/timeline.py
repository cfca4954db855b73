"""The timeline of a run as a figure, and how busy its cores were.

    python benchmarks/timeline.py OUT [--png FILE]

One lane per worker, one bar per step from its start to its end. Busy is the CPU time of all steps, divided by the time of all
cores between the first step's start and the last step's end. Of a resumed run only the last part counts.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import record

from pipeline.run.trace import read_timeline

COLOURS = {"train": "#0072B2", "merge": "#D55E00", "evaluate": "#009E73"}
"""Okabe and Ito's palette, which people with any common colour blindness can tell apart."""


def last_run(lines: list[dict[str, Any]]) -> tuple[float, list[dict[str, Any]]]:
    """(cores, finished steps) since the driver last started."""
    starts = [number for number, line in enumerate(lines) if line.get("event") == "start"]
    recent = lines[starts[-1] :] if starts else lines
    ready = next((line for line in recent if line.get("event") == "ready"), None)
    if ready is None:
        raise SystemExit("the last run started no cluster: everything was in the store already")
    return ready["cores"], [line for line in recent if "fingerprint" in line]


def busy(cores: float, steps: list[dict[str, Any]]) -> dict[str, float]:
    """Wall seconds from the first step to the last, CPU seconds of all steps, and their share of the cores."""
    wall = max(step["end"] for step in steps) - min(step["start"] for step in steps)
    cpu = sum(step["cpu_seconds"] for step in steps)
    occupied = sum(step["end"] - step["start"] for step in steps if step["kind"] != "merge")
    return {
        "wall": wall,
        "cpu": cpu,
        "busy": cpu / (cores * wall),
        "occupied": occupied / (cores * wall),
        "steps": len(steps),
    }


def by_kind(steps: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each kind of step: how many, and their CPU and wall seconds together."""
    found = {}
    for kind in COLOURS:
        mine = [step for step in steps if step["kind"] == kind]
        cpu, wall = (
            sum(step["cpu_seconds"] for step in mine),
            sum(step["end"] - step["start"] for step in mine),
        )
        if mine:
            found[kind] = {"steps": len(mine), "cpu": cpu, "wall": wall}
    return found


def draw(steps: list[dict[str, Any]], title: str, target: Path) -> None:
    """One lane per worker, merge actors last."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    origin = min(step["start"] for step in steps)
    workers = sorted({step["worker"] for step in steps}, key=_by_number)
    figure, axes = pyplot.subplots(figsize=(11, 1.2 + 0.45 * len(workers)), layout="constrained")
    for lane, worker in enumerate(workers):
        mine = [step for step in steps if step["worker"] == worker]
        bars = [(step["start"] - origin, step["end"] - step["start"]) for step in mine]
        axes.broken_barh(bars, (lane - 0.4, 0.8), facecolors=[COLOURS[step["kind"]] for step in mine])
    axes.set_yticks(range(len(workers)), workers)
    axes.invert_yaxis()
    axes.set_xlabel("seconds since the first step")
    axes.set_title(title, loc="left", fontsize=10)
    handles = [Patch(color=colour, label=kind) for kind, colour in COLOURS.items()]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(target, dpi=150)


def _by_number(worker: str) -> tuple[bool, str, int]:
    name, _, number = worker.rpartition("-")
    return (not name.startswith("worker"), name, int(number))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--png", type=Path)
    record.add_json(parser)
    options = parser.parse_args()
    cores, steps = last_run(read_timeline(options.out))
    found = busy(cores, steps)
    title = (
        f"{found['steps']:.0f} steps in {found['wall']:.0f} s on {cores:g} cores: CPU time of steps / (cores x wall) = "
        f"{found['busy']:.2f}"
    )
    print(title)
    print(f"a step was under way on a worker {found['occupied']:.3f} of the time")
    kinds = by_kind(steps)
    for kind, of in kinds.items():
        each = 1000 * of["wall"] / of["steps"]
        print(
            f"{kind:9} {of['steps']:5} steps, {of['cpu']:8.1f} s CPU, {of['wall']:8.1f} s wall, {each:7.0f} ms each"
        )
    record.save(options.json, {"cores": cores}, {**found, "kinds": kinds})
    target = options.png or options.out / "timeline.png"
    draw(steps, title, target)
    print(target)


if __name__ == "__main__":
    main()
