"""Other drivers on the same store: the steps that they carry out, have done, or left free.

Invariant: a step that is taken here is neither in the store nor carried out elsewhere; a driver waits only for steps
that a live driver carries out.
"""

import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from pipeline.plan.steps import Step
from pipeline.store import versions
from pipeline.store.artifact import Record
from pipeline.store.lease import Holder, Leases
from pipeline.workspace.lock import Waited
from pipeline.workspace.workspace import Workspace


class Others:
    """The other drivers, as a context around a run; leaving the context gives back every step that was taken."""

    def __init__(self, workspace: Workspace, strict_versions: bool) -> None:
        self._workspace, self._strict = workspace, strict_versions
        self._leases = Leases(workspace.store, workspace.study.name, workspace.out)
        self._under_way: dict[str, Holder] = {}
        self._asked, self._reported_versions = 0.0, False

    def __enter__(self) -> Self:
        self._leases.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leases.__exit__(kind, error, trace)

    def take(self, step: Step) -> Holder | Record | None:
        """Take a step. None if this driver has it now, its record if it is done, or the holder that carries it out."""
        holder = self._leases.take(step.fingerprint)
        if holder is not None:
            self._under_way[step.fingerprint] = holder
            return holder
        record = self._workspace.known(step.fingerprint)
        if record is not None:
            self._leases.give_back(step.fingerprint)
        return record

    def give_back(self, step: Step) -> None:
        """End the lease of a step that is no longer carried out here, whether it was completed or not."""
        self._leases.give_back(step.fingerprint)

    def settled(self) -> Iterator[tuple[str, Record | None]]:
        """Steps that no other driver carries out any more, each with its record, or None if it is free; asked at intervals."""
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

    def waited_for(self) -> list[Waited]:
        """The steps waited for and their holders, for `status`."""
        return [
            {
                "fingerprint": fingerprint,
                "label": self._workspace.plan.steps[fingerprint].label,
                "holder": str(holder),
            }
            for fingerprint, holder in self._under_way.items()
        ]

    def other_versions(self, record: Record) -> str:
        """The warning about the versions that made a record; given once per run. Raises OtherVersions if strict."""
        text = versions.check([record], self._strict, self._workspace.store.where)
        if not text or self._reported_versions:
            return ""
        self._reported_versions = True
        return text


def other_versions(workspace: Workspace, done: set[str], strict: bool) -> str:
    """The warning about the versions of artifacts that exist when a run begins. Raises OtherVersions if strict."""
    found = (workspace.known(fingerprint) for fingerprint in (*workspace.plan.bases, *done))
    return versions.check(filter(None, found), strict, workspace.store.where)
