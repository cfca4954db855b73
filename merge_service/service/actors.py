"""The thin Ray edge of merging: one actor that folds experts as they arrive, in time-step order.

Invariant: the actor holds no truth. A merge is a function of its job; the streaming states it keeps are caches that are
rebuilt from the experts when they are missing, and give the same bytes either way.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge_service.engine.assembly import Execution
from merge_service.faults import point
from merge_service.merging.combine import combine
from merge_service.merging.derivation import Derivation, Operator, Out, Rules, Way
from merge_service.merging.geometry import geometry
from merge_service.merging.jobs import MergeJob
from merge_service.merging.stream import StreamCache
from merge_service.techniques.definition import Form
from merge_service.techniques.own import load


class Merger:
    """Carries out merge steps; `store` is handed over with each."""

    def __init__(self) -> None:
        self._states: dict[str | None, StreamCache] = {}

    def run(self, job: MergeJob, step: Any, store: Any) -> Any:
        """Merge, commit, and return the record."""
        if job.origin is not None:
            load(job.technique, job.origin)

        def work(stage: Path) -> Mapping[str, Any]:
            point("merge.start")
            result = self.merge(job, stage)
            point("merge.before_commit")
            return result

        return store.make(step, work)

    def merge(self, job: MergeJob, out: Path) -> dict[str, Any]:
        """Merge into the directory `out`; the result holds "merge_seconds", norms of task vectors and their cosine; "notes"
        where there is something to know of the result.

        The cosine is that of the merged model's task vector with the newest expert's.
        """
        newest, rules = job.members[-1], Rules(job.any_base)
        form: Form = "fold" if job.form == "fold" else "merge"
        derivation = Derivation(Operator.of(job.technique, job.params, form), job.base.path, job.members)
        if form == "fold":
            way = Way(self._execution(job), rules, job.limits)
            report = combine(derivation, Out(out), way)
        else:
            report = self._states_of(job).merge(derivation, job.base.sha256 or "", out, rules)
        measured = geometry(job.base.path, out, newest.path, threads=job.threads)
        notes = {"notes": [*report.notes]} if report.notes else {}
        return {"merge_seconds": report.seconds, **measured, **notes}

    def _states_of(self, job: MergeJob) -> StreamCache:
        """One cache per series, which its first expert names: series of other seeds must not evict each other."""
        series = job.members[0].sha256
        if series not in self._states:
            self._states[series] = StreamCache(job.scratch, self._execution(job), job.limits)
        return self._states[series]

    @staticmethod
    def _execution(job: MergeJob) -> Execution:
        return Execution(job.threads, measure=False)
