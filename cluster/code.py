"""Which code a process runs, so that no step is ever carried out by other code than its driver's.

Invariant: equal digests mean equal sources of this project; what is installed beside it is told by the records' versions.
"""

import hashlib
from functools import cache
from pathlib import Path

PACKAGES = ("cluster", "merge_service", "pipeline", "workers")


class CodeMismatch(ValueError):
    """A worker runs other sources of this project than its driver."""

    exit_code = 2

    @classmethod
    def found(cls, what: str) -> "CodeMismatch":
        """The error that says what was seen, and what to do."""
        return cls(
            f"{what}; install the same version on every node, or let `temporal-merge submit` send it along. If it was edited "
            "while the study ran, give the same command again: finished steps are kept"
        )


@cache
def code_digest() -> str:
    """sha256 over the Python sources of this project, wherever this process has them from."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for package in PACKAGES:
        for source in sorted((root / package).rglob("*.py")):
            body = hashlib.sha256(source.read_bytes()).hexdigest()
            digest.update(f"{source.relative_to(root)} {body}\n".encode())
    return digest.hexdigest()


def check_code(expected: str, where: str) -> None:
    """Raise CodeMismatch unless this process, which runs on `where`, has the sources of that digest."""
    found = code_digest()
    if found != expected:
        root = Path(__file__).parent.parent
        raise CodeMismatch.found(
            f"{where}: the worker's code in {root} ({found[:12]}) is not the driver's ({expected[:12]})"
        )
