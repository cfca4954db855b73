"""The errors of the pipeline.

Invariant: an error that the user can correct (`ConfigError`, `PlanError`, `StoreUnwritable`) derives from `UserError`,
so the command line prints its one message and exits with code 2. Every error keeps its message when pickled.
"""

import re
from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

from merge_service.errors import UserError

Given = ParamSpec("Given")
Answer = TypeVar("Answer")
ARGUMENTS = {
    "set": "overrides", "id": "ids",
    **{
        name: name.replace("-", "_")
        for name in (
            "address", "any-base", "base", "coefficients", "datasets", "device", "dtype", "keep-thresholds", "model", "out", "parity", "shard-size", "split", "statistics",
            "strict-versions", "strip-prefix", "threads", "workers",
            "name", "role", "template", "classnames", "val", "test", "seed", "equal", "unreadable", "image-column", "label-column",
            "caption-column", "split-column", "pretrained", "force", "details",
        )
    },
}  # fmt: skip
"""Options of the command line, and the arguments of the Python API that mean the same."""


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
    """A valid study that cannot be planned with these data: a dataset, split or budget does not fit."""


class StoreError(Exception):
    """An operation of the store failed; the message names the path."""


class StoreUnwritable(StoreError, UserError):
    """The store's directory cannot be created or written; choose another OUT or correct its permissions."""


class CorruptArtifact(StoreError):
    """A committed artifact no longer holds the bytes that its record states. It was moved aside: run the step again."""


class NondeterminismError(StoreError):
    """One step was computed twice with different bytes. Both results are kept, at `first` and `second`."""

    def __init__(self, message: str, first: str = "", second: str = "") -> None:
        super().__init__(message, first, second)
        self.first, self.second = first, second

    def __str__(self) -> str:
        return str(self.args[0])


class StorageFull(StoreError):
    """Not enough space for the output of a step: `needed` bytes (0 if unknown), `free` bytes left."""

    def __init__(self, message: str, needed: int = 0, free: int = 0) -> None:
        super().__init__(message, needed, free)
        self.needed, self.free = needed, free

    def __str__(self) -> str:
        return str(self.args[0])


class StepFailed(Exception):
    """A train, merge or evaluate step could not be completed; the message names the step, its task and t, and the cause."""


class StepTimeout(StepFailed):
    """A step made no progress for longer than its `timeout`, repeatedly."""


class TrackingError(Exception):
    """The tracking server refused or garbled a request; the rows stay in the outbox."""


def speaks_python(function: Callable[Given, Answer]) -> Callable[Given, Answer]:
    """Let a function's errors name arguments where the command line's name options."""

    @wraps(function)
    def call(*given: Given.args, **named: Given.kwargs) -> Answer:
        try:
            return function(*given, **named)
        except Exception as error:
            if isinstance(error, ConfigError):
                error.problems = [in_python(problem) for problem in error.problems]
                error.args = (error.problems,)
            elif _is_of_the_user(error) and type(error).__str__ is Exception.__str__:
                error.args = tuple(in_python(one) if isinstance(one, str) else one for one in error.args)
            raise

    return call


def _is_of_the_user(error: Exception) -> bool:
    return isinstance(error, UserError) or getattr(error, "exit_code", None) == 2


def in_python(text: str) -> str:
    """A message with arguments in the place of options; commands, which stand in backticks, stay as they are."""
    parts = text.split("`")
    parts[::2] = [
        re.sub(r"--([a-z][a-z-]*)", lambda found: ARGUMENTS.get(found[1], found[0]), part)
        for part in parts[::2]
    ]
    return "`".join(parts)
