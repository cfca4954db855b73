"""One merge by this project in a process of its own.

    python benchmarks/ours.py '{"technique": "ties", "form": "merge", "params": {}, "options": {}, "base": ..., ...}'

Prints one JSON line: the seconds of `MergeReport`, those of them spent syncing the output to the disk (which the other
tools do not do), and the seconds of the import before it.
"""

import json
import os
import sys
import time
from typing import Any


def main(job: dict[str, Any]) -> dict[str, float]:
    """Merge or fold as the job says."""
    began = time.perf_counter()
    from merge_service.merge import fold, merge

    imported, syncs = time.perf_counter(), _timed_syncs()
    options = {"threads": job["threads"], **job["options"]}
    base, experts, out = job["base"], job["experts"], job["out"]
    if job["form"] == "fold":
        running, new = experts
        report = fold(job["technique"], job["params"], base, running, new, out, **options)
    else:
        report = merge(job["technique"], job["params"], base, experts, out, **options)
    return {"seconds": report.seconds, "sync": sum(syncs), "import": imported - began}


def _timed_syncs() -> list[float]:
    """Seconds of every fsync from now on."""
    seconds: list[float] = []
    original = os.fsync

    def fsync(handle: int) -> None:
        began = time.perf_counter()
        original(handle)
        seconds.append(time.perf_counter() - began)

    os.fsync = fsync  # type: ignore[assignment]
    return seconds


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
