"""Comparison of the task vectors of a merge: their norms, their directions, and their sign conflicts.

Invariant: a comparison changes nothing, and no merge fails because its inputs could not be compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_service.checkpoints import parts_of
from merge_service.errors import UserError
from pipeline.merging.files import FileMerge

MERGED = "merged"
LARGE_BYTES = 4 * 10**9
"""Checkpoints of more bytes together are compared only on request."""


@dataclass(frozen=True)
class Comparison:
    """`names` are the experts, oldest first, then "merged". `norms` are L2 norms of the task vectors; `cosines` and `conflicts`
    (the share of weights that both moved and whose signs differ) have a row for each name, None if one of the two did not move.
    """

    names: tuple[str, ...]
    norms: tuple[float, ...]
    cosines: tuple[tuple[float | None, ...], ...]
    conflicts: tuple[tuple[float | None, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "names": list(self.names),
            "norms": list(self.norms),
            "cosines": [list(row) for row in self.cosines],
            "sign_conflicts": [list(row) for row in self.conflicts],
        }


def compared(what: FileMerge, merged: Path, asked: bool | None = None) -> tuple[Comparison | None, str]:
    """The comparison of a merge that was written to `merged`, and a note if it is left out.

    Without a base there are no task vectors. `asked` None: only if the checkpoints are small.
    """
    if asked is False or what.base is None:
        note = (
            ""
            if asked is not True
            else "not compared: task vectors are differences from a base, and none was given"
        )
        return None, note
    files = [*what.experts, merged]
    size = sum(_bytes(part) for path in files for part in parts_of(path))
    if asked is None and size > LARGE_BYTES:
        return None, f"not compared: {size / 1e9:,.0f} GB would be read twice more (--compare does)"
    try:
        return _comparison(what.base, _named(what.experts), merged), ""
    except (UserError, ValueError) as error:
        return None, f"not compared: {error}"


def _comparison(base: Path, experts: dict[str, Path], merged: Path) -> Comparison:
    from merge_service.similarity import similarity

    found = similarity(base, {**experts, MERGED: merged})
    cosines, conflicts = found.cosine(), found.conflict()
    return Comparison(found.names, tuple(map(float, found.norms())), _rows(cosines), _rows(conflicts))


def _rows(matrix: Any) -> tuple[tuple[float | None, ...], ...]:
    return tuple(tuple(None if value != value else float(value) for value in row) for row in matrix)


def _named(experts: Sequence[Path]) -> dict[str, Path]:
    """Experts by the shortest ends of their paths that are unique, without the name of the file if it is that of all."""
    parts = 1
    while parts < 8 and len({path.parts[-parts:] for path in experts}) < len({*experts}):
        parts += 1
    end = -1 if parts > 1 and len({path.name for path in experts}) == 1 else None
    return {"/".join(path.parts[-parts:end]): path for path in experts}


def _bytes(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.glob("*.safetensors"))
    if path.name.endswith(".index.json"):
        stem = path.name.removesuffix(".safetensors.index.json")
        return sum(file.stat().st_size for file in path.parent.glob(f"{stem}-*-of-*.safetensors"))
    return path.stat().st_size if path.exists() else 0
