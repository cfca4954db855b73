"""How much memory a step needed at most, as the operating system counts it, and how much it may have.

Invariant: measuring never fails a step; what the machine does not tell is 0. A worker over its budget gets an error that
says so instead of taking the machine, and everybody else's work, down with it.
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
"""What torch, CUDA and the C library say when memory is short."""


MORE_MEMORY = (
    "let fewer steps run at a time (resources.experts.groups, resources.evaluation.actors, schedule.max_running), lower "
    "recipe.batch_size or evaluation.batch_size, set resources.experts.memory so that a worker which takes too much fails "
    "alone, or give the node more memory"
)
"""What to change where the memory of a whole node runs out."""


class OutOfMemory(Exception):
    """A worker needed more memory than its budget, its GPU or its machine has."""


def limit_memory(budget: int) -> None:
    """Let this process have `budget` bytes of memory of its own from now on; mapped files do not count.

    The kernel limits address space, not what is resident: what the process has reserved so far without using it is allowed
    on top.
    """
    reserved, used = _status("VmData"), _status("RssAnon")
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (reserved + max(0, budget - used), most))


def out_of_memory(error: BaseException, budget: int | None) -> OutOfMemory | None:
    """The error to raise instead, if `error` means that memory ran out."""
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
    """Whether a message of Ray's says that its memory monitor has ended a process."""
    return "running low on memory" in text or "memory monitor" in text.lower()


def kernel_kills() -> int:
    """How many processes of this machine the kernel has killed for want of memory since it started; 0 where it does not say."""
    with contextlib.suppress(OSError):
        if found := re.search(r"^oom_kill (\d+)$", _KERNEL.read_text(), re.MULTILINE):
            return int(found[1])
    return 0


def _status(name: str) -> int:
    """What the kernel says of this process's memory under a name, in bytes; 0 where it does not say. Raises OSError."""
    found = re.search(rf"^{name}:\s+(\d+) kB", (_OWN / "status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def reset_peaks() -> None:
    """Begin to measure anew. Where the kernel does not allow that, peaks are those of the process's life so far."""
    with contextlib.suppress(OSError):
        (_OWN / "clear_refs").write_text("5")
    with contextlib.suppress(Exception):
        _on_gpu().reset_peak_memory_stats()


def peak_resident() -> int:
    """Largest resident memory since the last reset in bytes, mapped files included."""
    with contextlib.suppress(OSError):
        if peak := _status("VmHWM"):
            return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_on_gpu() -> int:
    """Largest memory that torch held on its current GPU since the last reset in bytes; 0 without one."""
    with contextlib.suppress(Exception):
        return int(_on_gpu().max_memory_allocated())
    return 0


def _on_gpu() -> Any:
    """torch.cuda, if this process has used it. Raises LookupError otherwise."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        raise LookupError
    return torch.cuda
