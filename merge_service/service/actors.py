"""The Ray actor of merging: folds experts as they arrive, in time-step order.

Invariant: the actor holds only caches. A merge is a function of its job; streaming states are rebuilt from the experts if they
are missing, and give the same bytes either way.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from merge_service.engine.assembly import Execution
from merge_service.faults import point
from merge_service.files import Made
from merge_service.merging.combine import combine
from merge_service.merging.derivation import Derivation, Operator, Out, Rules, Way
from merge_service.merging.jobs import MergeJob, TakeJob
from merge_service.merging.stream import StreamCache
from merge_service.merging.taking import take
from merge_service.techniques.definition import Form
from merge_service.techniques.own import load


class Merger:
    """Runs merge steps; each call passes the `store`."""

    def __init__(self) -> None:
        self._states: dict[str | None, StreamCache] = {}

    def run(self, job: MergeJob | TakeJob, step: Any, store: Any) -> Any:
        """Merge, or take an expert in; commit, and return the record."""
        if isinstance(job, TakeJob):
            return store.make(step, lambda stage: take(job, stage))
        if job.origin is not None:
            load(job.technique, job.origin)

        def work(stage: Path) -> Made:
            point("merge.start")
            made = self.merge(job, stage)
            point("merge.before_commit")
            return made

        record = store.make(step, work, held="recipe" if job.held == "recipe" else "files")
        if job.held == "tried":
            store.recipes.prove(record)
        return record

    def merge(self, job: MergeJob, out: Path) -> Made:
        """Merge into the directory `out`. The result holds "merge_seconds", norms of task vectors and their cosine, and "notes"
        if there are any. All of it, and the sha256, comes out of the one pass that merges.

        The cosine is that of the merged model's task vector with the newest expert's.
        """
        form: Form = "fold" if job.form == "fold" else "merge"
        operator = Operator.of(job.technique, job.params, form)
        derivation = Derivation(operator, job.base.path, job.members)
        if form == "fold" and not operator.technique.resumes:
            report = combine(derivation, Out(out, hashed=True), self._way(job))
        else:
            report = self._states_of(job).merge(
                derivation, job.base.sha256 or "", out, Rules(job.any_base), job.reserve
            )
        assert report.geometry is not None
        notes = {"notes": [*report.notes]} if report.notes else {}
        return Made({"merge_seconds": report.seconds, **asdict(report.geometry), **notes}, report.sha256)

    def _states_of(self, job: MergeJob) -> StreamCache:
        """One cache per series, identified by its first expert: series of other seeds must not evict each other."""
        series = job.members[0].sha256
        if series not in self._states:
            self._states[series] = StreamCache(job.scratch, self._way(job))
        return self._states[series]

    @staticmethod
    def _way(job: MergeJob) -> Way:
        """Nothing is synced here: the store syncs what it keeps when it commits."""
        return Way(Execution(job.threads, newest=True), Rules(job.any_base), job.thresholds, durable=False)
