"""Peak memory of a step as counted by the operating system, and its memory limit.

A worker that exceeds its budget gets a clear error before the machine, and other work on it, runs out of memory.
Invariant: measuring never fails a step; a value that the system does not report is 0.
"""

import contextlib
import re
import resource
import sys
from pathlib import Path
from typing import Any

_OWN, _KERNEL = Path("/proc/self"), Path("/proc/vmstat")
_WORDS = re.compile(
    r"can't allocate memory|not enough memory|out of memory|cannot allocate memory", re.IGNORECASE
)
"""Out-of-memory messages of torch, CUDA and the C library."""


MORE_MEMORY = (
    "let fewer steps run at a time (resources.experts.groups, resources.evaluation.actors, schedule.max_running), lower "
    "recipe.batch_size or evaluation.batch_size, set resources.experts.memory so that a worker which takes too much fails "
    "alone, or give the node more memory"
)
"""What to change where the memory of a whole node runs out."""


class OutOfMemory(Exception):
    """A worker exceeded the memory of its budget, its GPU or its machine."""


def limit_memory(budget: int) -> None:
    """Limit the private memory of this process to `budget` bytes; mapped files do not count.

    The kernel limits address space, not resident memory. So memory that is reserved but not used yet is added to the
    limit.
    """
    reserved, used = _status("VmData"), _status("RssAnon")
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (reserved + max(0, budget - used), most))


def out_of_memory(error: BaseException, budget: int | None) -> OutOfMemory | None:
    """The OutOfMemory to raise in place of `error` if `error` means that memory ran out, else None."""
    if not (
        isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _WORDS.search(str(error)))
    ):
        return None
    allowed = "no budget is set" if budget is None else f"its budget is {budget:,} bytes"
    first = (str(error).strip().splitlines() or ["no more is known"])[0]
    return OutOfMemory(
        f"out of memory (OOM): the worker had {peak_resident():,} bytes, {allowed} (resources: memory); give it more, or "
        f"lower the batch size; {type(error).__name__}: {first}"
    )


def is_about_memory(text: str) -> bool:
    """Whether a message from Ray says that its memory monitor ended a process."""
    return "running low on memory" in text or "memory monitor" in text.lower()


def kernel_kills() -> int:
    """How many processes the kernel has killed on this machine since boot because memory ran out; 0 if it does not
    report that.
    """
    with contextlib.suppress(OSError):
        if found := re.search(r"^oom_kill (\d+)$", _KERNEL.read_text(), re.MULTILINE):
            return int(found[1])
    return 0


def _status(name: str) -> int:
    """A memory value of this process in /proc/self/status, in bytes; 0 if it is absent. Raises OSError."""
    found = re.search(rf"^{name}:\s+(\d+) kB", (_OWN / "status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def reset_peaks() -> None:
    """Reset the peaks. Where the kernel does not allow that, they are those of the whole life of the process."""
    with contextlib.suppress(OSError):
        (_OWN / "clear_refs").write_text("5")
    with contextlib.suppress(Exception):
        _on_gpu().reset_peak_memory_stats()


def peak_resident() -> int:
    """Peak resident memory since the last reset in bytes, mapped files included."""
    with contextlib.suppress(OSError):
        if peak := _status("VmHWM"):
            return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_on_gpu() -> int:
    """Peak memory that torch held on its current GPU since the last reset in bytes; 0 without a GPU."""
    with contextlib.suppress(Exception):
        return int(_on_gpu().max_memory_allocated())
    return 0


def _on_gpu() -> Any:
    """torch.cuda if this process has initialized it. Raises LookupError otherwise."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        raise LookupError
    return torch.cuda
