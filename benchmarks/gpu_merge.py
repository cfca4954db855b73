"""Merging on a device beside the CPU: seconds, the copy over the bus alone, and whether the bytes are the same.

`gpu.py` prints its rows. It needs torch, numpy and safetensors alone: without numba the CPU runs the rules with torch as well, and
techniques that need the compiled loops are left out by name.

Invariant: every technique that promises the same bytes on a device is compared by the sha256 of its file.
"""

import hashlib
import importlib.util
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from inputs import Inputs, make_inputs

from merge_service.blocks.device import DEVICE_BLOCK
from merge_service.merge import merge

TECHNIQUES: dict[str, dict[str, Any]] = {
    "average": {},
    "task_arithmetic": {"scale": 0.3},
    "magmax": {},
    "ties": {},
    "dare_ties": {},
    "breadcrumbs_ties": {},
    "slerp": {},
}


def merges(device: str, size: str, experts: int, threads: int, deadline: float) -> dict[str, Any]:
    """A row per technique, as far as the time (a `time.monotonic`) allows; `copied_s` is the copy of all inputs to the device and of
    one output back, from pinned memory."""
    compiled = _has("numba")
    host = None if compiled else "cpu"
    with tempfile.TemporaryDirectory(prefix="gpu-merge-") as work:
        inputs = make_inputs(Path(work), size, experts)
        rows: dict[str, Any] = {}
        for name, params in TECHNIQUES.items():
            if time.monotonic() > deadline:
                rows[name] = {"left_out": "no time"}
                continue
            try:
                rows[name] = _row(name, params, inputs, (device, host), threads)
            except ModuleNotFoundError as error:
                rows[name] = {"left_out": f"needs {error.name}"}
        return {
            "size": size,
            "experts": experts,
            "threads": threads,
            "bytes": inputs.nbytes * (experts + 2),
            "cpu": "compiled loops" if compiled else "the rules with torch",
            "copied_s": _copied(inputs.nbytes * (experts + 2), device),
            "techniques": rows,
        }


def _row(
    name: str, params: dict[str, Any], inputs: Inputs, places: tuple[str, str | None], threads: int
) -> dict[str, Any]:
    """`places` are the device and the host's own, as `merge` takes them."""
    experts = inputs.experts[: 2 if name == "slerp" else None]
    seconds: dict[str, float] = {}
    digests = set()
    for where, at in zip(("device", "cpu"), places):
        out = inputs.base.parent / f"merged-{where}.safetensors"
        for _ in range(2):  # the first one warms up
            began = time.perf_counter()
            merge(name, params, inputs.base, experts, out, ids=_ids(experts), threads=threads, device=at)
            seconds[where] = time.perf_counter() - began
        digests.add(hashlib.sha256(out.read_bytes()).hexdigest())
        out.unlink()
    return {"device_s": seconds["device"], "cpu_s": seconds["cpu"], "same_bytes": len(digests) == 1}


def _has(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _ids(experts: Any) -> list[str]:
    return [f"t{number}" for number in range(len(experts))]


def _copied(total: int, device: str) -> float | None:
    """Seconds that the bus takes for so many bytes; None on a CPU."""
    if device == "cpu":
        return None
    block = torch.empty(4 * DEVICE_BLOCK, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(block, device=device)
    there.copy_(block, non_blocking=True)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(16):
        there.copy_(block, non_blocking=True)
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / 16 / block.numel() * total
