"""A callback for training loops: every saved state becomes a checkpoint in a directory, and averages of the last ones follow.

Invariant: what `add` has returned for is on disk, whole; adding the same state again changes nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_service.checkpoints import written
from merge_service.errors import UserError
from merge_service.trajectories import Places, average_along, averages_of, step_of, weights_of
from pipeline.errors import speaks_python
from pipeline.merging.state_dicts import save


@dataclass(frozen=True)
class Arrived:
    """The file of a state, and the averages whose windows were full, by name (mean-4)."""

    checkpoint: Path
    averages: Mapping[str, Path]


class Arrivals:
    """Checkpoints of one run as they come, in `out`/checkpoints, and averages of the last ones in `out`/averages.

    `windows` count checkpoints; the longest one says how many are kept. `shapes` are as of `temporal-merge trajectory`. `dtype` is
    that of the floats in averages (the checkpoints' own by default). In a run of several processes one of them adds.
    """

    @speaks_python
    def __init__(
        self,
        out: Path | str,
        windows: Sequence[int] = (4, 8, 16),
        shapes: Sequence[str] = ("mean", "1-sqrt"),
        dtype: str | None = None,
        threads: int | None = None,
    ) -> None:
        """Raises UserError for an unknown shape or dtype, or windows of nothing."""
        if not windows or not shapes:
            raise UserError("give at least one window and one shape")
        for window in windows:
            for shape in shapes:
                weights_of(shape, window)
        self.out, self._windows, self._shapes = Path(out), tuple(windows), tuple(shapes)
        self._dtype = None if dtype is None else written(dtype)
        self._threads = threads

    @speaks_python
    def add(self, state_dict: Mapping[str, Any], step: int) -> Arrived:
        """Keep the state of a training step, and average. Tensors of torch or numpy; names that share memory stay tied.

        Checkpoints after `step` are of a run that went back to before them: they are removed. Raises UserError for a state that has
        other tensors than the ones before it, or numbers that are not finite.
        """
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise UserError(f"step is {step!r}, not a number of steps: 0 or more")
        room = self.out / "checkpoints"
        room.mkdir(parents=True, exist_ok=True)
        for later in [path for path in self.checkpoints if (step_of(path) or 0) > step]:
            later.unlink()
        path = save(room / f"step-{step:09d}.safetensors", state_dict)
        held = self.checkpoints
        for old in held[: -max(self._windows)]:
            old.unlink()
        held = self.checkpoints
        full = [window for window in self._windows if window <= len(held)]
        if not full:
            return Arrived(path, {})
        averages = averages_of(held, full, self._shapes)
        made = average_along(held, averages, Places(self.out / "averages", dtype=self._dtype), self._threads)
        return Arrived(path, made.paths)

    @property
    def checkpoints(self) -> list[Path]:
        """The files that are kept, oldest first."""
        return sorted((self.out / "checkpoints").glob("step-*.safetensors"))
