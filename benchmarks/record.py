"""The results of a benchmark as one JSON file: the values of every run, the machine, the code and the libraries.

`results/` holds the files that the documentation's figures come from (`page.py`).

Invariant: a file states the measured commit and the load of the machine by other processes, so that no figure loses its
circumstances.
"""

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
CODE = ("benchmarks/*.py", "pipeline", "workers", "merge_service", "cluster", "configs")
PACKAGES = (
    "temporal-merge", "numpy", "numba", "torch", "safetensors", "open_clip_torch", "ray", "mlflow", "deepspeed",
    "webdataset",
)  # fmt: skip


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option that every benchmark has."""
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the values of every run to this file"
    )


def save(path: Path | None, settings: Mapping[str, Any], found: Mapping[str, Any], **peers: Any) -> None:
    """Write what was `found` under these `settings`, with the circumstances; `peers` are versions of other tools.

    No path, no file. Six digits are more than any of these clocks can tell apart.
    """
    if path is None:
        return
    whole = {
        "benchmark": Path(sys.argv[0]).stem,
        "command": ["python", *_placeless(sys.argv)],
        "date": datetime.fromtimestamp(START["time"], UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "changed_since": _git("diff", "--name-only", "HEAD", "--", *CODE).splitlines(),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **_versions(), **peers},
        "settings": dict(settings),
        "found": _rounded(found),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_text(whole))
    print(f"every number: {path}")


def machine() -> dict[str, Any]:
    """The processor, and how many of its cores other processes used since this one began, on average.

    A process that outlives its parent counts among the others, as Ray's do; so there the figure is too high.
    """
    now = _moment()
    wall = max(now["time"] - START["time"], 1e-9)
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    others = max(0.0, (now["busy"] - START["busy"] - (now["own"] - START["own"])) / wall)
    return {
        "cpu": cpu.partition(": ")[2],
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "seconds": round(wall, 1),
        "cores_used_by_others": round(others, 2),
        "shared_with_other_work": others > 0.1,
    }


def _moment() -> dict[str, float]:
    """Seconds: the time, what all processes have used of all cores, what this one and its dead children have."""
    fields = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    busy = sum(fields) - fields[3] - fields[4]  # all but idle and waiting for a disk
    own = sum(
        usage.ru_utime + usage.ru_stime
        for usage in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )
    return {"time": time.time(), "busy": busy / os.sysconf("SC_CLK_TCK"), "own": own}


START = _moment()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str:
    answer = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return answer.stdout.strip()


def _placeless(words: list[str]) -> list[str]:
    """A command line without the places of this machine: files by their names, this project's by their paths in it."""
    home = f"{ROOT}{os.sep}"
    return [
        Path(word).name if word.startswith("/") else word for word in (w.removeprefix(home) for w in words)
    ]


def _text(whole: Mapping[str, Any]) -> str:
    """JSON in which a list of plain values takes one line."""
    return (
        re.sub(r"\[\s+[^][{}]*\]", lambda found: " ".join(found[0].split()), json.dumps(whole, indent=1))
        + "\n"
    )


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
