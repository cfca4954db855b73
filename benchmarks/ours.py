"""One merge by this project in a process of its own.

    python benchmarks/ours.py '{"technique": "ties", "form": "merge", "params": {}, "options": {}, "base": ..., ...}'

Prints one JSON line: the seconds of `MergeReport`, the part of them spent syncing the output to the disk (which the other
tools do not do), the CPU seconds, and the seconds of start-up. Start-up is the imports and a first, tiny merge, which loads
the compiled loops. It counts in the whole process only, as the imports of the other tools do.
"""

import json
import os
import sys
import time
from typing import Any


def main(job: dict[str, Any]) -> dict[str, float]:
    """Merge or fold as the job says: first the two tiny checkpoints in job["first"], then what is measured."""
    began = time.perf_counter()
    import merge_service.merge  # noqa: F401

    imported = time.perf_counter()
    _merge(job | job["first"])
    loaded, syncs, cpu = time.perf_counter(), _timed_syncs(), time.process_time()
    answer = {
        "seconds": _merge(job),
        "sync": sum(syncs),
        "import": imported - began,
        "load": loaded - imported,
    }
    return answer | {"merge_cpu": time.process_time() - cpu}


def _merge(job: dict[str, Any]) -> float:
    from merge_service.merge import fold, merge

    options = {"threads": job["threads"], **job["options"]}
    base, experts, out = job["base"], job["experts"], job["out"]
    if job["form"] == "fold":
        running, new = experts
        return fold(job["technique"], job["params"], base, running, new, out, **options).seconds
    options["ids"] = [
        f"t{t}" for t in range(1, len(experts) + 1)
    ]  # as a study: names by content cost a hash of all
    return merge(job["technique"], job["params"], base, experts, out, **options).seconds


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
