"""The tracking of one run: from the driver's events to the end of delivery.

Invariant: tracking never slows, stops or fails a study; rows that could not be delivered stay in the outbox, and the run reports
them.
"""

import csv
import io
import subprocess
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.results.over_time import table, winner
from pipeline.study.config import Study
from pipeline.tracking.outbox import FILE, PLAN, Outbox
from pipeline.tracking.recorder import Recorder
from pipeline.tracking.rows.events import Projection, StudyFacts
from pipeline.tracking.rows.index import STUDY
from pipeline.tracking.tracker import Tracker, settle
from pipeline.workspace.workspace import Workspace

CLOSE_SECONDS = 60.0


class Tracking:
    """Outbox, recorder and background delivery of one run, as a context around the driver's work."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        settle(workspace.out)
        study, plan, store = workspace.study, workspace.plan, workspace.store
        options, fingerprint = study.tracking, plan.fingerprint
        self.outbox = Outbox(workspace.out / FILE)
        self.tracker = Tracker(
            workspace.out, self.outbox, uri=options.uri, experiment=options.experiment or "temporal-merge"
        )
        plans = self.outbox.plans()
        others = [name for one, name in plans.items() if one != fingerprint]
        facts = StudyFacts(
            settings=study.model_dump(mode="json"),
            code_version=version("temporal-merge"),
            git=git_tags(Path(__file__).parents[2]),
            log_weights=options.log_weights,
            recipes=workspace.recipes,
            store="store" if study.storage.store is None else store.where,
            registry=_registry(study),
            title=plans.get(fingerprint, f"{plan.study} · {fingerprint[:8]}" if others else plan.study),
            earlier=tuple(others),
        )
        bases = {fp: store.record(base.kind, fp) for fp, base in plan.bases.items()}
        known = {fp: base for fp, base in bases.items() if base is not None}
        assert known.keys() == bases.keys(), "the workspace is prepared first"
        projection = Projection(plan, facts, known)
        self.notes = [*self._change(projection, facts, plans)]
        self.recorder = Recorder(projection, self.outbox, workspace.out)
        self.pending = 0

    def __enter__(self) -> Self:
        self.tracker.start()
        self.recorder.study_started(_now_ms())
        for fingerprint, step in self.workspace.plan.steps.items():
            record = self.workspace.known(fingerprint)
            if record is not None:
                self.recorder.step_done(step, record)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error the run does not wait for the tracker: the rows are safe in the outbox.
        self.pending = self.tracker.close(CLOSE_SECONDS if error is None else 2.0)
        self.outbox.close()

    def _change(self, projection: Projection, facts: StudyFacts, plans: dict[str, str]) -> Iterator[str]:
        """A note on the former plan in OUT, if the study was changed since."""
        out, now = self.workspace.out, projection.index.fingerprint
        before = self.outbox.meta(PLAN) or next(reversed(plans), now)
        if before == now or before not in plans:
            return
        told, settings = self.outbox.get(f"{before[:16]}/run/{STUDY}") or {}, projection.settings()
        params = told.get("params", {})
        keys = sorted(key for key in params.keys() | settings if params.get(key) != settings.get(key))
        changed = ", ".join(keys[:6]) + (f" and {len(keys) - 6} more" if len(keys) > 6 else "") or "the grid"
        alias = f" and the alias {facts.registry['name']}@{facts.registry['alias']}" if facts.registry else ""
        yield (
            f"{out} held another plan of study {self.workspace.plan.study} ({plans[before]!r} in MLflow); changed: {changed}. "
            f"Kept: its artifacts until `temporal-merge gc {out}`, its runs and models in MLflow; steps that both plans need "
            f"are not done again. Replaced: study.yaml and plan.json now, results.json{alias} when this run ends. "
            f"In MLflow this plan is {facts.title!r}."
        )

    @property
    def trouble(self) -> str | None:
        """Why rows are waiting at present; None while they are delivered."""
        return self.tracker.last_error or self.recorder.last_error

    def committed(self, step: Any, record: Any) -> None:
        self.recorder.step_done(step, record)

    def finished(self, results: dict[str, Any]) -> None:
        """All steps are done; `results` are in OUT already."""
        registry = self.workspace.study.tracking.registry
        self.recorder.study_finished(_csv(results), winner(results, registry.by) if registry else None)

    def failed(self, step: Any, error: Exception) -> None:
        self.recorder.step_failed(step, str(error), _now_ms())


def git_tags(code: Path) -> dict[str, str]:
    """MLflow's tags of the commit of a checkout, and whether its files differ from it; empty if `code` is not the root of a
    checkout.
    """

    def git(*words: str) -> str:
        line = ["git", "-C", str(code), *words]
        return subprocess.run(line, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != code.resolve():
            return {}  # installed into an environment inside another repository
        changed = git("status", "--porcelain", "--untracked-files=no") != ""
        return {
            "mlflow.source.git.commit": git("rev-parse", "HEAD"),
            "mlflow.git.dirty": str(changed).lower(),
        }
    except (OSError, subprocess.SubprocessError):
        return {}


def _registry(study: Study) -> dict[str, str] | None:
    asked = study.tracking.registry
    return {"name": asked.name or study.name, "by": asked.by, "alias": asked.alias} if asked else None


def _csv(results: dict[str, Any]) -> str:
    """The table of KA, ZS and GM over t, one line per trajectory and t."""
    rows = table(results)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
