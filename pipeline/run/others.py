"""What other drivers on the same store mean for this one's steps: theirs to wait for, done by them, or free to take.

Invariant: a step that is taken here is neither in the store nor under way elsewhere; a driver waits only for steps that somebody
alive carries out.
"""

import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from pipeline.plan.steps import Step
from pipeline.store import versions
from pipeline.store.lease import Holder, Leases
from pipeline.workspace.workspace import Workspace


class Others:
    """The other drivers, as a context around a run; leaving it gives back every step that was taken."""

    def __init__(self, workspace: Workspace, strict_versions: bool) -> None:
        self._workspace, self._strict = workspace, strict_versions
        self._leases = Leases(workspace.store, workspace.study.name, workspace.out)
        self._under_way: dict[str, Holder] = {}
        self._asked, self._said_versions = 0.0, False

    def __enter__(self) -> Self:
        self._leases.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leases.__exit__(kind, error, trace)

    def take(self, step: Step) -> Holder | Any | None:
        """Take a step: None when it is this driver's now, its record when it has been done, or who carries it out."""
        holder = self._leases.take(step.fingerprint)
        if holder is not None:
            self._under_way[step.fingerprint] = holder
            return holder
        record = self._workspace.known(step.fingerprint)
        if record is not None:
            self._leases.give_back(step.fingerprint)
        return record

    def give_back(self, step: Step) -> None:
        """The step is no longer carried out here, however it ended."""
        self._leases.give_back(step.fingerprint)

    def settled(self) -> Iterator[tuple[str, Any | None]]:
        """Steps that nobody else carries out any more: with their record, or None when they are free. Asks now and then."""
        if not self._under_way or time.monotonic() - self._asked < self._workspace.store.poll_seconds:
            return
        self._asked = time.monotonic()
        for fingerprint in list(self._under_way):
            if self._leases.holder_of(fingerprint) is None:
                del self._under_way[fingerprint]
                yield fingerprint, self._workspace.known(fingerprint)

    @property
    def waits(self) -> bool:
        """Whether another driver carries out a step of this one."""
        return bool(self._under_way)

    def waited_for(self) -> list[dict[str, str]]:
        """What is waited for and who carries it out, for `status`."""
        return [
            {
                "fingerprint": fingerprint,
                "label": self._workspace.plan.steps[fingerprint].label,
                "holder": str(holder),
            }
            for fingerprint, holder in self._under_way.items()
        ]

    def other_versions(self, record: Any) -> str:
        """What is to be said of the versions that made a record found meanwhile; said once. Raises OtherVersions if strict."""
        text = versions.check([record], self._strict, self._workspace.store.where)
        if not text or self._said_versions:
            return ""
        self._said_versions = True
        return text


def other_versions(workspace: Workspace, done: set[str], strict: bool) -> str:
    """What is to be said of the versions that made what is in the store when a run begins. Raises OtherVersions if strict."""
    found = (workspace.known(fingerprint) for fingerprint in (*workspace.plan.bases, *done))
    return versions.check(filter(None, found), strict, workspace.store.where)
