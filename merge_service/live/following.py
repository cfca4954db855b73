"""A value that is made of the accepted sequence, one place after another, and kept up to date as the sequence grows.

So one more expert costs what the second did, whatever is asked about all of them.
Invariant: what `of` gives is what it would give if it were asked for the first time.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

from merge_service.live.state import Accepted, State

Kept = TypeVar("Kept")


class Following(Generic[Kept]):
    """`add(kept, state, place)` takes one place of the sequence into what `begin()` gives. Whoever asks leaves the value as it is."""

    def __init__(self, begin: Callable[[], Kept], add: Callable[[Kept, State, Accepted], None]) -> None:
        self._begin, self._add = begin, add
        self._seen: tuple[Accepted, ...] = ()
        self._kept = begin()

    def of(self, state: State, sequence: tuple[Accepted, ...] | None = None) -> Kept:
        """The value of a sequence, by default that which is accepted."""
        wanted = state.sequence if sequence is None else sequence
        known = len(self._seen)
        if wanted[:known] != self._seen:  # an expert left, or was replaced
            self._kept, known = self._begin(), 0
        for one in wanted[known:]:
            self._add(self._kept, state, one)
        self._seen = wanted
        return self._kept
