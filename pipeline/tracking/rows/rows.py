"""The seven kinds of rows for the tracker, built from plain values.

- `run` ensures that a run exists; `model` ensures that a model exists and is complete
- `log` adds metrics and tags to a run (and metrics to a model)
- `artifact` attaches a small file to a run; `status` sets the state of a run
- `register` makes a model a version of a registered model; `alias` sets an alias to such a version

`status`, `artifact`, `register` and `alias` rows supersede earlier ones of the same key.

Invariant: a row's payload is JSON with finite numbers only.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.tracking.outbox import Row

NOT_FINITE_TAG = "not_finite"


class Metrics:
    """Measurements of one record. None is left out; values that are not finite are named in `tags()` instead."""

    def __init__(self, stamp: int) -> None:
        self.stamp = stamp
        self.values: list[list[Any]] = []
        self._not_finite: list[str] = []

    def add(
        self,
        name: str,
        value: Any,
        step: int,
        dataset: str | None = None,
        digest: str | None = None,
        stamp: int | None = None,
    ) -> None:
        """Add one value, measured at `stamp` (default: the record's). A dataset is only set together with its digest: MLflow
        requires both or none.
        """
        if value is None:
            return
        if not math.isfinite(value):
            self._not_finite.append(f"{name} at step {step}")
            return
        known = dataset is not None and digest is not None
        self.values.append(
            [
                name,
                float(value),
                step,
                stamp or self.stamp,
                dataset if known else None,
                digest if known else None,
            ]
        )

    def tags(self) -> dict[str, str]:
        if not self._not_finite:
            return {}
        more = len(self._not_finite) - 10
        return {NOT_FINITE_TAG: ", ".join(self._not_finite[:10]) + (f" and {more} more" if more > 0 else "")}


@dataclass(frozen=True)
class Run:
    """One run of MLflow: its key within the plan, the key of its parent run, and its content."""

    key: str
    parent: str | None
    name: str
    tags: Mapping[str, str]
    params: Mapping[str, str] = field(default_factory=dict)
    datasets: Sequence[Mapping[str, str]] = ()


class Rows:
    """Builds the rows of one plan; `plan` is its fingerprint, part of every key."""

    def __init__(self, plan: str) -> None:
        self._plan = plan

    def run(self, run: Run, start_ms: int) -> Row:
        body = {
            "op": "run",
            "run": run.key,
            "parent": run.parent,
            "name": run.name,
            "tags": dict(run.tags),
            "params": dict(run.params),
        }
        return self._row(
            f"run/{run.key}", {**body, "start_ms": start_ms, "datasets": [*run.datasets]}, start_ms
        )

    def log(
        self,
        key: str,
        what: str,
        metrics: Metrics,
        model: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Row:
        body = {"op": "log", "run": key, "model": model, "metrics": metrics.values}
        return self._row(
            f"log/{key}/{what}", {**body, "tags": {**(tags or {}), **metrics.tags()}}, metrics.stamp
        )

    def model(self, key: str, run: str, stamp: int, body: Mapping[str, Any]) -> Row:
        """`body`: name, type, step, params, tags, store (relative to OUT), files (to upload), manifest; `inputs`, the keys of the
        models that the run used as inputs; `is_input`: the model is an input of its run, not an output.

        A model without files and the same model with files are two rows: weights may follow later.
        """
        kind = "model" if body["files"] else "manifest"
        return self._row(f"{kind}/{key}", {"op": "model", "model": key, "run": run, **body}, stamp)

    def register(
        self, model: str, run: str, stamp: int, body: Mapping[str, Any], *, each: bool = False
    ) -> Row:
        """A version of a registered model. `body`: name, tags, note, parent (another run that shows it), about (the registered model).
        A plan has one such row and a later one supersedes it, unless `each` model is a version.
        """
        key = f"register/{model}" if each else "register"
        return self._row(key, {"op": "register", "model": model, "run": run, **body}, stamp, replace=not each)

    def alias(self, model: str | None, stamp: int, name: str, alias: str) -> Row:
        """Set `name@alias` to the version of a model; None removes the alias. All plans of an outbox share this row, so the alias
        belongs to the plan that ended last.
        """
        body = {"op": "alias", "plan": self._plan, "model": model, "name": name, "alias": alias}
        return Row(f"alias/{name}@{alias}", body, stamp, replace=True)

    def artifact(
        self,
        key: str,
        name: str,
        stamp: int,
        *,
        text: str | None = None,
        path: str | None = None,
        sha256: str = "",
    ) -> Row:
        """A small file: its text, or its path relative to OUT with the digest of its present content."""
        digest = sha256 if text is None else hashlib.sha256(text.encode()).hexdigest()
        body = {"op": "artifact", "run": key, "name": name, "text": text, "path": path, "sha256": digest}
        return self._row(f"artifact/{key}/{name}", body, stamp, replace=True)

    def status(self, key: str, state: str, end_ms: int, error: str | None = None) -> Row:
        """`state` is one of MLflow's: RUNNING, FINISHED, FAILED, KILLED."""
        body = {"op": "status", "run": key, "state": state, "end_ms": end_ms, "error": error}
        return self._row(f"status/{key}", body, end_ms, replace=True)

    def _row(self, key: str, body: dict[str, Any], stamp: int, *, replace: bool = False) -> Row:
        return Row(f"{self._plan[:16]}/{key}", {**body, "plan": self._plan}, stamp, replace)
