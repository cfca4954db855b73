"""The limit of any merge: every input read once, one output written once, and no arithmetic at all.

    python benchmarks/limit.py '{"inputs": [...], "out": "...", "threads": 2}'

The threads divide the ranges of a checkpoint. For each range, a thread reads it from every input and writes one range of the
output. Reading is tried as a copy into a small buffer and as one pass over mapped pages, with small and large ranges. The way
with the lowest median over all repeats is the limit. Syncing the written file to the disk is timed separately. CPU seconds are
measured as well: on a machine that others use they are more reliable than wall time.

Invariant: nothing here knows about tensors, so no correct merge can do less.
"""

import json
import mmap
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

RANGES = (1 << 20, 1 << 22)  # bytes


def main(job: dict[str, Any]) -> dict[str, list[float]]:
    """By way of reading: [seconds to read and write, seconds to sync, CPU seconds of both]."""
    paths, out, threads = [Path(path) for path in job["inputs"]], Path(job["out"]), job["threads"]
    size = paths[0].stat().st_size
    return {
        f"{how.__name__[1:]} {step >> 20} MiB": _once(how, paths, out, size, step, threads)
        for step in RANGES
        for how in (_copy, _map)
    }


def _once(how: Callable, paths: list[Path], out: Path, size: int, step: int, threads: int) -> list[float]:
    """Seconds to read and write, then to sync, and CPU seconds. The files are opened and the output is created within the time."""
    began, cpu = time.perf_counter(), time.process_time()
    inputs = [os.open(path, os.O_RDONLY) for path in paths]
    target = os.open(out, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(how(inputs, target, size, step, threads), range(threads)))
    written = time.perf_counter()
    os.fsync(target)
    synced, spent = time.perf_counter(), time.process_time() - cpu
    for handle in (*inputs, target):
        os.close(handle)
    out.unlink()
    return [written - began, synced - written, spent]


def _copy(inputs: list[int], target: int, size: int, step: int, threads: int) -> Callable[[int], None]:
    """Read into one buffer that stays in the cache, and write that buffer."""

    def work(thread: int) -> None:
        buffer = memoryview(bytearray(step))
        for start in range(thread * step, size, threads * step):
            part = buffer[: min(step, size - start)]
            for handle in inputs:
                os.preadv(handle, [part], start)
            os.pwrite(target, part, start)

    return work


def _map(inputs: list[int], target: int, size: int, step: int, threads: int) -> Callable[[int], None]:
    """Touch every byte of the mapped inputs (a maximum over 64-bit words), and write from the last one's pages."""
    maps = [np.frombuffer(mmap.mmap(handle, 0, prot=mmap.PROT_READ), np.uint8) for handle in inputs]

    def work(thread: int) -> None:
        for start in range(thread * step, size, threads * step):
            stop = min(start + step, size)
            for view in maps:
                view[start : stop - (stop - start) % 8].view(np.uint64).max()
            os.pwrite(target, view[start:stop].data, start)

    return work


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
