"""How similar experts are: cosine and sign conflict of their task vectors, over the model, a tower or a transformer block.

Experts whose task vectors are opposed or disagree in sign lose what they learned when they are averaged (TIES-Merging, arXiv
2306.01708, section 3), so users compare them before they choose a technique.

Signs are compared where both experts moved a weight by more than the root mean square of their task vector in its tower. Weight
decay alone moves every weight a little, and moves weights that no task uses all in the same direction, which tells nothing about
tasks. (TIES compares what its trim keeps, for the same reason; this threshold needs no sorting.)

Invariant: checkpoints are read twice (magnitudes, then the rest), grain by grain through memory maps; memory is one grain per
expert, for any size of model.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from merge_service.anatomy.structure import anatomy_of
from merge_service.blocks.spans import GRAIN, spans
from merge_service.checkpoints.adapters.opening import open_weights
from merge_service.checkpoints.admission import admit
from merge_service.checkpoints.buffers import buffers
from merge_service.checkpoints.ties import Ties, tie
from merge_service.checkpoints.weights import Weights
from merge_service.errors import CheckpointError

CLASH_COSINE, CLASH_CONFLICT = -0.1, 0.55
"""Clearly worse than unrelated task vectors, which have cosine 0 and conflict 0.5."""
Part = tuple[str, int | None]
"""A tower and the number of a transformer block in it, None for tensors outside blocks."""


@dataclass
class _Overlap:
    """Sums over the elements of one part, [experts, experts] each."""

    dot: np.ndarray
    both: np.ndarray
    agreement: np.ndarray

    @classmethod
    def none(cls, experts: int) -> "_Overlap":
        return cls(*(np.zeros((experts, experts)) for _ in range(3)))

    def add(self, deltas: np.ndarray, least: np.ndarray) -> None:
        """One grain of task vectors, [experts, elements] float64, and the magnitude that counts as moved, [experts, 1]."""
        signs = np.where(np.abs(deltas) > least, np.sign(deltas), 0.0)
        moved = np.abs(signs)
        self.dot += deltas @ deltas.T
        self.both += moved @ moved.T
        self.agreement += signs @ signs.T

    def __iadd__(self, other: "_Overlap") -> "_Overlap":
        self.dot += other.dot
        self.both += other.both
        self.agreement += other.agreement
        return self


@dataclass(frozen=True)
class Clash:
    """Two experts whose task vectors are opposed over the whole model."""

    one: str
    other: str
    cosine: float
    conflict: float


@dataclass(frozen=True)
class Similarity:
    """Pairwise sums per part; `names` are the experts in the order of every matrix."""

    names: tuple[str, ...]
    parts: Mapping[Part, _Overlap]

    def cosine(self, tower: str | None = None, layer: int | None = None) -> np.ndarray:
        """[experts, experts] cosine of task vectors; NaN where an expert did not move. Whole model by default."""
        dot = self._over(tower, layer).dot
        norms = np.sqrt(np.diag(dot))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.clip(dot / np.outer(norms, norms), -1, 1)

    def norms(self) -> np.ndarray:
        """[experts] L2 norms of the task vectors over the whole model."""
        return np.sqrt(np.diag(self._over(None, None).dot))

    def conflict(self, tower: str | None = None, layer: int | None = None) -> np.ndarray:
        """[experts, experts] share of the weights that both moved (see above) whose signs differ, in [0, 1]; NaN where there are
        none. The diagonal is 0.
        """
        overlap = self._over(tower, layer)
        with np.errstate(invalid="ignore"):
            return (overlap.both - overlap.agreement) / 2 / overlap.both

    def clashes(self, cosine: float = CLASH_COSINE, conflict: float = CLASH_CONFLICT) -> list[Clash]:
        """Pairs with a cosine below `cosine` or a conflict above `conflict`, the lowest cosine first."""
        cosines, conflicts = self.cosine(), self.conflict()
        pairs = [
            Clash(one, other, float(cosines[i, j]), float(conflicts[i, j]))
            for i, one in enumerate(self.names)
            for j, other in enumerate(self.names)
            if i < j and (cosines[i, j] < cosine or conflicts[i, j] > conflict)
        ]
        return sorted(pairs, key=lambda pair: pair.cosine)

    def _over(self, tower: str | None, layer: int | None) -> _Overlap:
        chosen = [
            overlap
            for (of_tower, of_layer), overlap in self.parts.items()
            if tower in (None, of_tower) and layer in (None, of_layer)
        ]
        if not chosen:
            raise ValueError(f"no tensors in tower {tower}, block {layer}")
        total = _Overlap.none(len(self.names))
        for overlap in chosen:
            total += overlap
        return total


def similarity(base: Path | str, experts: Mapping[str, Path | str]) -> Similarity:
    """Compare the task vectors of named expert checkpoints, in float64 over all float tensors.

    Raises CheckpointError for fewer than two experts, and what `admit` raises for a checkpoint of another architecture.
    """
    if len(experts) < 2:
        raise CheckpointError(f"similarity compares at least two experts, and {len(experts)} were given")
    with ExitStack() as stack:
        origin = stack.enter_context(open_weights(base))
        opened = [stack.enter_context(open_weights(path, base)) for path in experts.values()]
        ties = tie(origin, opened)
        for name, expert in zip(experts, opened, strict=True):
            admit(origin, expert, f"expert {name}")
        return Similarity(tuple(experts), _overlaps(origin, opened, ties))


def _overlaps(origin: Weights, experts: Sequence[Weights], ties: Ties) -> dict[Part, _Overlap]:
    anatomy = anatomy_of({name: info.shape for name, info in origin.tensors.items()})
    tower = anatomy.tower
    squares: dict[str, np.ndarray] = {}
    sizes: dict[str, int] = {}
    for name, deltas in _deltas(origin, experts, ties):
        squares[tower[name]] = squares.get(tower[name], 0.0) + np.sum(deltas * deltas, axis=1, keepdims=True)
        sizes[tower[name]] = sizes.get(tower[name], 0) + deltas.shape[1]
    least = {which: np.sqrt(total / sizes[which]) for which, total in squares.items()}
    parts: dict[Part, _Overlap] = {}
    for name, deltas in _deltas(origin, experts, ties):
        part = tower[name], anatomy.layer(name)
        if part not in parts:
            parts[part] = _Overlap.none(len(experts))
        parts[part].add(deltas, least[tower[name]])
    return parts


def _deltas(origin: Weights, experts: Sequence[Weights], ties: Ties) -> Iterator[tuple[str, np.ndarray]]:
    """The task vectors, grain by grain: the tensor's name, and [experts, elements] float64."""
    left_out = ties.keys() | buffers(origin)
    tensors = origin.tensors.items()
    sizes = [(name, info.numel) for name, info in tensors if info.kind.is_float and name not in left_out]
    for span in spans(sizes, GRAIN):
        start = origin.read(span.name, span.start, span.stop)
        deltas = np.empty((len(experts), span.size))
        for row, expert in zip(deltas, experts, strict=True):
            np.subtract(expert.read(span.name, span.start, span.stop), start, out=row, dtype=np.float64)
        yield span.name, deltas
