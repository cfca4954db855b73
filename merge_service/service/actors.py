"""The thin Ray edge of merging: one actor that folds experts as they arrive, in time-step order.

Invariant: the actor holds no truth. A merge is a function of its job; the streaming states it keeps are caches that are
rebuilt from the experts when they are missing, and give the same bytes either way.
"""

import time
from pathlib import Path
from typing import Any

from merge_service.faults import point
from merge_service.merging.geometry import geometry
from merge_service.merging.intake import Rules
from merge_service.merging.jobs import MergeJob
from merge_service.merging.stream import StreamCache, fold_in
from merge_service.techniques.own import load


class Merger:
    """Carries out merge steps; `store` is handed over with each."""

    def __init__(self) -> None:
        self._states: dict[str, StreamCache] = {}

    def run(self, job: MergeJob, step: Any, store: Any) -> Any:
        """Merge, commit, and return the record."""
        if job.origin is not None:
            load(job.technique, job.origin)
        store.open_inputs(step)
        started = time.monotonic()
        point("merge.start")
        with store.staged(step) as stage:
            result = self.merge(job, stage)
            point("merge.before_commit")
            record = store.commit(step, stage, result, seconds=time.monotonic() - started)
        point("merge.after_commit")
        return record

    def merge(self, job: MergeJob, out: Path) -> dict[str, Any]:
        """Merge into the directory `out`; the result holds "merge_seconds", norms of task vectors and their cosine; "notes"
        where there is something to know of the result.

        The cosine is that of the merged model's task vector with the newest expert's.
        """
        newest = job.members[-1]
        if job.form == "fold":
            report = fold_in(
                job.technique, job.params, job.base.path, job.members, out,
                threads=job.threads, measure=False, keep_limits=job.limits, rules=Rules(job.any_base),
            )  # fmt: skip
        else:
            report = self._states_of(job).merge(
                job.technique,
                job.params,
                job.base.path,
                job.base.sha256,
                job.members,
                out,
                Rules(job.any_base),
            )
        measured = geometry(job.base.path, out, newest.path, threads=job.threads)
        notes = {"notes": [*report.notes]} if report.notes else {}
        return {"merge_seconds": report.seconds, **measured, **notes}

    def _states_of(self, job: MergeJob) -> StreamCache:
        """One cache per series, which its first expert names: series of other seeds must not evict each other."""
        series = job.members[0].sha256
        if series not in self._states:
            self._states[series] = StreamCache(
                job.scratch,
                threads=job.threads,
                measure=False,
                keep_limits=job.limits,
            )
        return self._states[series]
