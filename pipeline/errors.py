"""What goes wrong in the pipeline, as one small family.

Invariant: an error that its reader can mend (`ConfigError`, `PlanError`, `StoreUnwritable`) derives from `UserError`, so the
command line ends with exit code 2 and its one message; every error survives pickling between processes with its message.
"""

from collections.abc import Sequence

from merge_service.errors import UserError


class ConfigError(UserError):
    """A study file or an override is wrong. `problems` holds one message per mistake: what, where, what to do."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        listed = [problems] if isinstance(problems, str) else list(problems)
        super().__init__(listed)
        self.problems = listed

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        return "\n".join(
            [f"{len(self.problems)} problems:", *(f"  - {problem}" for problem in self.problems)]
        )


class PlanError(UserError):
    """A valid study that cannot be planned on these data: a dataset, split or budget that does not fit."""


class StoreError(Exception):
    """The store cannot do what was asked; the message names the path."""


class StoreUnwritable(StoreError, UserError):
    """The store's directory cannot be created or written; give another OUT or mend its permissions."""


class CorruptArtifact(StoreError):
    """A committed artifact no longer holds the bytes its record states. It has been moved aside: run the step again."""


class NondeterminismError(StoreError):
    """One step was computed twice with different bytes. Both results are kept, at `first` and `second`."""

    def __init__(self, message: str, first: str = "", second: str = "") -> None:
        super().__init__(message, first, second)
        self.first, self.second = first, second

    def __str__(self) -> str:
        return str(self.args[0])


class StorageFull(StoreError):
    """Not enough room for a step's output: `needed` bytes wanted (0 when unknown), `free` bytes left."""

    def __init__(self, message: str, needed: int = 0, free: int = 0) -> None:
        super().__init__(message, needed, free)
        self.needed, self.free = needed, free

    def __str__(self) -> str:
        return str(self.args[0])


class StepFailed(Exception):
    """A train, merge or evaluate step could not be completed; the message names the step, its task and t, and the cause."""


class StepTimeout(StepFailed):
    """A step showed no sign of life for longer than its `timeout`, again and again."""


class TrackingError(Exception):
    """The tracking server refused or garbled what was sent; the rows stay in the outbox."""
