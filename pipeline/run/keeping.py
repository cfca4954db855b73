"""Which merges a run keeps: those that no step needs any more become recipes, as `storage.keep` says.

Invariant: a merge is dropped only when every step of this plan that reads it is done, and no other study of the store keeps it or
may still read it. Dropping changes no result. A merge that cannot be dropped stays, and its reason is reported once.
"""

from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from merge_service.merging import MergedAs
from pipeline.errors import StorageFull, StoreError
from pipeline.files.disk import free_bytes, full_text
from pipeline.plan.keeping import AT_ONCE, disk, only_scored, waiting_for
from pipeline.plan.steps import Step
from pipeline.store.recipes import IN_USE, not_portable
from pipeline.workspace.keeping import Others, droppable, kept_at_the_end
from pipeline.workspace.workspace import StudySummary, Workspace


def check_room(workspace: Workspace, summary: StudySummary) -> None:
    """Raise StorageFull unless the study fits, and the checkpoints of one expert in training beside it.

    The message gives the size for each choice of `storage.keep`.
    """
    name, least, resume = (
        f"study {workspace.study.name}",
        summary["disk_least_bytes"],
        summary["resume_bytes"],
    )
    free = free_bytes(workspace.out)
    if resume > free:
        what = f"{name}, checkpoints of an expert in training (experts.checkpoint_every, 0 for none)"
        raise StorageFull(full_text(what, workspace.scratch, resume, free), resume, free)
    try:
        workspace.store.check_room(name, least + (resume if _one_disk(workspace) else 0))
    except StorageFull as error:
        choices = ", ".join(f"{name} {size:,}" for name, size in workspace.disk_by_choice().items())
        raise StorageFull(
            f"{error}. With storage.keep it needs so many bytes at a time: {choices}",
            error.needed,
            error.free,
        ) from None


def _one_disk(workspace: Workspace) -> bool:
    store, out = workspace.store, workspace.out
    return store.free_bytes() is not None and store.root.stat().st_dev == out.stat().st_dev


class Keeping:
    """Drops merges of a run as soon as no step needs them. As a context manager it waits for pending removals."""

    def __init__(self, workspace: Workspace, done: Collection[str]) -> None:
        self.workspace, self._steps = workspace, workspace.plan.steps
        self._on = workspace.study.storage.keep != "all"
        readers = waiting_for(workspace.plan) if self._on else {}
        self._passing = {fp for fp in readers if fp not in workspace.kept}
        self._scored = self._passing & only_scored(workspace.plan, readers) if self._on else set()
        self._readers = {fp: readers[fp] - set(done) for fp in self._passing}
        self._done = {fp for fp in self._passing if fp in done}
        self._tried: dict[Path, str] = {}
        self._dropped: set[str] = set()
        self._dropping: set[str] = set()
        room = disk(workspace.plan, self._steps.keys() - set(done), workspace.kept)
        self._needs = room.least
        self._at_once = room.merges_at_once(workspace.store.free_bytes()) if self._passing else AT_ONCE
        self._others = Others(workspace.store, workspace.plan, workspace.out)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="recipes") if self._on else None
        self.notes: dict[str, str] = {}

    def __enter__(self) -> Self:
        for fingerprint in self._done:
            self._drop_if_free(fingerprint)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=error is not None)

    def held(self, step: Step) -> MergedAs:
        """How a merge is committed: as a recipe from the start if it is only scored here and such a merge was made again before.

        The first of its kind that will be dropped is made again at once, by the actor that has everything loaded for it.
        """
        fingerprint = step.fingerprint
        if fingerprint not in self._passing or not_portable(step) is not None:
            return "files"
        try:
            if self._others.want(fingerprint):
                return "files"
        except StoreError:
            return "files"
        proof = self.workspace.store.recipes.proof(step)
        if proof.exists():
            return "recipe" if fingerprint in self._scored else "files"
        return "tried" if self._tried.setdefault(proof, fingerprint) == fingerprint else "files"

    def must_wait(self, running: Iterable[Step]) -> Collection[str]:
        """Merges that may not start yet, lest too many wait to be scored.

        Where the disk has little room, no merge starts while another is being dropped: until it is gone it takes room, and so does
        the copy that proves it.
        """
        if self._dropping and self._at_once < AT_ONCE:
            return self._passing
        begun = {step.fingerprint for step in running} & self._scored
        waiting = {fp for fp in self._done & self._scored if self._readers[fp]}
        return self._scored if len(begun | waiting) >= self._at_once else ()

    def reserve(self) -> int:
        """Bytes that the steps ahead need at a time, where `OUT` and the store share a disk; else 0."""
        return self._needs if _one_disk(self.workspace) else 0

    def finished(self, step: Step) -> None:
        """Record a finished step, and drop merges that only this step still needed."""
        if step.fingerprint in self._passing:
            self._done.add(step.fingerprint)
            self._drop_if_free(step.fingerprint)
        else:
            self._needs -= step.disk_bytes
        for source in step.inputs.values():
            if source in self._passing:
                self._readers[source].discard(step.fingerprint)
                self._drop_if_free(source)

    def is_recipe(self, fingerprint: str) -> bool:
        """Whether the store keeps a merge as a recipe, without weights, at present."""
        step = self._steps[fingerprint]
        record = self.workspace.store.record(step.kind, fingerprint)
        return record is not None and record.is_recipe

    def _drop_if_free(self, fingerprint: str) -> None:
        if self._readers[fingerprint] or fingerprint not in self._done or fingerprint in self._dropped:
            return
        assert self._thread is not None
        self._dropped.add(fingerprint)
        self._dropping.add(fingerprint)
        self._thread.submit(self._drop, fingerprint)

    def _drop(self, fingerprint: str) -> None:
        try:
            why = self._try_to_drop(fingerprint)
        except StoreError as error:  # this thread's result is not read, so the reason becomes a note
            why = str(error)
        finally:
            self._dropping.discard(fingerprint)
        if (
            why is not None and why != IN_USE
        ):  # a fold that reads it now ends before the run does, and the run's end tries again
            self.notes.setdefault(why, self._steps[fingerprint].label)

    def _try_to_drop(self, fingerprint: str) -> str | None:
        """Drop a merge; returns why it stays, None if it went or if another study needs it. Raises StoreError."""
        store = self.workspace.store
        record = store.record(self._steps[fingerprint].kind, fingerprint)
        if record is None or self._others.want(fingerprint):
            return None
        return store.recipes.drop(record)


def finish_keeping(workspace: Workspace, results: Mapping[str, object]) -> list[str]:
    """At the end of a run: drop merges that are no longer kept, and write the weights of kept ones that were recipes.

    Returns notes.
    """
    store, plan = workspace.store, workspace.plan
    kept = kept_at_the_end(plan, workspace.study.storage, results)
    for fingerprint in kept:
        record = store.record("merge", fingerprint)
        if record is not None and record.is_recipe:
            store.recipes.keep(record)
    notes = []
    for record in droppable(store, plan, workspace.out, kept):
        why = store.recipes.drop(record)
        notes += [f"{plan.steps[record.fingerprint].label} stays as a file: {why}"] if why else []
    return notes
