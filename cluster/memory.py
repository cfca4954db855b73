"""How much memory a step needed at most, as the operating system counts it.

Invariant: measuring never fails a step; what the machine does not tell is 0.
"""

import contextlib
import re
import resource
import sys
from pathlib import Path
from typing import Any

_OWN = Path("/proc/self")


def reset_peaks() -> None:
    """Begin to measure anew. Where the kernel does not allow that, peaks are those of the process's life so far."""
    with contextlib.suppress(OSError):
        (_OWN / "clear_refs").write_text("5")
    with contextlib.suppress(Exception):
        _on_gpu().reset_peak_memory_stats()


def peak_resident() -> int:
    """Largest resident memory since the last reset in bytes, mapped files included."""
    with contextlib.suppress(OSError):
        found = re.search(r"^VmHWM:\s+(\d+) kB", (_OWN / "status").read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
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
