"""The digest of this project's sources, so that every step runs the same code as its driver.

Invariant: equal digests mean equal sources of this project. Versions of installed libraries are in the records.
"""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

PACKAGES = ("cluster", "merge_service", "pipeline", "workers")


class CodeMismatch(ValueError):
    """A worker runs other sources of this project than its driver."""

    exit_code = 2

    @classmethod
    def found(cls, what: str) -> "CodeMismatch":
        """The error for the observation `what`, with the remedy."""
        return cls(
            f"{what}; install the same version on every node, or use `temporal-merge submit`, which sends it. If it was edited "
            "while the study ran, give the same command again: finished steps are kept"
        )


@cache
def code_digest() -> str:
    """sha256 over the Python sources of this project, in the directory that this process imports them from."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for package in PACKAGES:
        for source in sorted((root / package).rglob("*.py")):
            body = hashlib.sha256(source.read_bytes()).hexdigest()
            digest.update(f"{source.relative_to(root)} {body}\n".encode())
    return digest.hexdigest()


def check_code(expected: str, where: str) -> None:
    """Raise CodeMismatch unless this process, which runs on node `where`, has the sources with the digest `expected`."""
    found = code_digest()
    if found != expected:
        root = Path(__file__).parent.parent
        raise CodeMismatch.found(
            f"{where}: the worker's code in {root} ({found[:12]}) is not the driver's ({expected[:12]})"
        )


def own_code_first(root: str | None, *, keep_path: bool = False) -> Callable[[], None]:
    """A function that makes a process import this project's packages from one place, whatever its import path holds.

    After that function has run, these packages are looked up only in `root`. Without a root, they are looked up in the
    first directory of the import path that holds all of them. With `keep_path`, every other name is first looked up on
    the import path as it was before. Workers need both: Ray puts the current directory of the driver first on their
    import path, where a `workers.py` or a `torch.py` would shadow the installed package. The function is
    self-contained, because a worker calls it before it can import this project.
    """
    packages = (*PACKAGES, "temporal_merge")

    def prepare() -> None:
        import sys
        from importlib.machinery import ModuleSpec, PathFinder
        from pathlib import Path

        if any(getattr(finder, "__name__", "") == "OwnCodeFirst" for finder in sys.meta_path):
            return
        path = list(sys.path)

        def whole(place: str) -> bool:
            parts = ("cluster/code.py", *(f"{name}/__init__.py" for name in packages[:-1]))
            return all((Path(place) / part).is_file() for part in parts)

        def editable() -> str | None:
            for finder in sys.meta_path:
                found = None if finder is PathFinder else finder.find_spec(packages[0], None)
                if found is not None and found.origin:
                    return str(Path(found.origin).parent.parent)
            return None

        home = root or next(filter(whole, path), None) or editable()

        class OwnCodeFirst:
            @classmethod
            def find_spec(cls, name: str, path_of: object = None, target: object = None) -> ModuleSpec | None:
                if path_of is not None:
                    return None
                if name in packages and home is not None:
                    return PathFinder.find_spec(name, [home])
                return PathFinder.find_spec(name, path) if keep_path else None

        sys.meta_path.insert(sys.meta_path.index(PathFinder), OwnCodeFirst)

    return prepare
