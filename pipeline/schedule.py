"""Which steps may start now, and in which order: pure bookkeeping over a plan's graph.

Invariant: a step is ready exactly when it is not done, not running, and everything it needs is done. Among ready
steps the one with the longest chain of work behind it comes first, so that sequential chains never starve.
"""

from collections.abc import Collection, Mapping
from typing import Protocol


class Node(Protocol):
    """What the schedule needs of a step."""

    @property
    def kind(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def inputs(self) -> Mapping[str, str]: ...
    @property
    def after(self) -> Collection[str]: ...


WEIGHT = {"train": 100, "merge": 1, "evaluate": 3}
"""Rough cost of each kind, only to rank what is ready."""


class Schedule:
    """The state of a study while it runs. Steps must come in topological order, as a plan gives them."""

    def __init__(self, steps: Mapping[str, Node], done: Collection[str]) -> None:
        self._steps = steps
        self.done = set(done) & set(steps)
        self.running: set[str] = set()
        self._chain = _chain_lengths(steps)

    @property
    def finished(self) -> bool:
        return len(self.done) == len(self._steps)

    def needs(self, fingerprint: str) -> set[str]:
        """The steps that must be done before this one (the base is no step)."""
        step = self._steps[fingerprint]
        return {need for need in (*step.inputs.values(), *step.after) if need in self._steps}

    def ready(self, kind: str) -> list[str]:
        """Fingerprints that may start now, the longest chain first, ties in plan order."""
        waiting = [
            fingerprint
            for fingerprint, step in self._steps.items()
            if step.kind == kind
            and fingerprint not in self.done
            and fingerprint not in self.running
            and self.needs(fingerprint) <= self.done
        ]
        return sorted(waiting, key=lambda fingerprint: -self._chain[fingerprint])

    def start(self, fingerprint: str) -> None:
        assert fingerprint not in self.done and fingerprint not in self.running
        self.running.add(fingerprint)

    def finish(self, fingerprint: str) -> None:
        self.running.discard(fingerprint)
        self.done.add(fingerprint)

    def put_back(self, fingerprint: str) -> None:
        """The step is to run (again): it failed and will be retried, or its artifact turned out to be damaged."""
        self.running.discard(fingerprint)
        self.done.discard(fingerprint)


def _chain_lengths(steps: Mapping[str, Node]) -> dict[str, int]:
    """For every step the cost of the longest path that starts with it."""
    length = {fingerprint: WEIGHT[step.kind] for fingerprint, step in steps.items()}
    for fingerprint, step in reversed(list(steps.items())):
        for need in (*step.inputs.values(), *step.after):
            if need in length:
                length[need] = max(length[need], WEIGHT[steps[need].kind] + length[fingerprint])
    return length
