"""Which averages are made of which checkpoints of a run, as values.

Invariant: checkpoints are in the order of training, and an average never reaches beyond the first of them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from merge_service.errors import TechniqueError
from merge_service.trajectories.shapes import weights_of


@dataclass(frozen=True)
class Average:
    """An average of `window` checkpoints that ends with the one at place `end`; `name` is that of its file or folder."""

    name: str
    shape: str
    window: int
    end: int

    @property
    def weights(self) -> tuple[float, ...]:
        """One for each checkpoint, oldest first."""
        return weights_of(self.shape, self.window)

    @property
    def places(self) -> range:
        """The places of its checkpoints."""
        return range(self.end - self.window + 1, self.end + 1)


def step_of(path: Path) -> int | None:
    """The training step that the name of a checkpoint states: its last number, without a suffix. None without one."""
    numbers = re.findall(r"\d+", re.sub(r"\.safetensors(\.index\.json)?$", "", path.name))
    return int(numbers[-1]) if numbers else None


def in_order(paths: Sequence[Path]) -> list[Path]:
    """Checkpoints in the order of training: by the step in their names if each has one, else as given.

    A shell lists checkpoint-1000 before checkpoint-200. Raises `TechniqueError` for two checkpoints of one step.
    """
    steps = [step_of(path) for path in paths]
    if None in steps:
        return list(paths)
    found = sorted(paths, key=lambda path: step_of(path) or 0)
    for one, other in pairwise(found):
        if step_of(one) == step_of(other):
            raise TechniqueError(
                f"{one} and {other} are both of step {step_of(one)}; give one checkpoint for each step"
            )
    return found


def averages_of(
    paths: Sequence[Path], windows: Sequence[int], shapes: Sequence[str], every: bool = False
) -> list[Average]:
    """One average for each window and shape, which ends with the last checkpoint; with `every`, with each at which the window is full.

    Raises `TechniqueError` for a window that is given twice or longer than the run.
    """
    if not windows or not shapes:
        raise TechniqueError("give at least one window and one shape")
    for what, given in (("window", [str(one) for one in windows]), ("shape", list(shapes))):
        twice = next((one for one in given if given.count(one) > 1), None)
        if twice is not None:
            raise TechniqueError(f"the {what} {twice} is given twice")
    found = []
    for window in windows:
        if window > len(paths):
            raise TechniqueError(
                f"a window of {window} needs {window} checkpoints, and there are {len(paths)}"
            )
        for end in range(window - 1 if every else len(paths) - 1, len(paths)):
            for shape in shapes:
                weights_of(shape, window)
                name = f"{shape.replace(':', '-')}-{window}"
                step = step_of(paths[end])
                at = f"-at-{end + 1 if step is None else step}" if every else ""
                found.append(Average(f"{name}{at}", shape, window, end))
    return found
