"""MLflow's client for the tracking store in OUT: writes the rows of runs and models to its tables, many calls per transaction.

MLflow's own client uses a transaction, and so a wait for the disk and milliseconds of CPU time, per call: too much for a sweep of
thousands of models. Calls other than those below go to MLflow's client after the transaction is written. If a table differs from
the schema known here, `opened` returns None and MLflow's client does everything.

Invariant: the tables hold what MLflow's client would have written (a test compares both); a transaction is written completely or
not at all; writing twice changes nothing.
"""

import contextlib
import hashlib
import json
import sqlite3
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

WAIT_SECONDS = 10.0
_PENDING, _STATUS = 1, {"READY": 2, "FAILED": 3}
"""MLflow's numbers for the states of a model."""


@dataclass(frozen=True)
class _Table:
    """The known schema of a table: the columns of its primary key, and the others that are written."""

    key: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        return self.key + self.others


_TABLES = {
    "runs": _Table(
        ("run_uuid",),
        ("name", "artifact_uri", "experiment_id", "user_id", "start_time", "source_type", "source_name", "entry_point_name",
         "source_version", "status", "lifecycle_stage"),
    ),
    "params": _Table(("key", "run_uuid"), ("value",)),
    "tags": _Table(("key", "run_uuid"), ("value",)),
    "metrics": _Table(("key", "timestamp", "step", "run_uuid", "value", "is_nan"), ()),
    "latest_metrics": _Table(("key", "run_uuid"), ("value", "timestamp", "step", "is_nan")),
    "datasets": _Table(
        ("experiment_id", "name", "digest"), ("dataset_uuid", "dataset_source_type", "dataset_source")
    ),
    "inputs": _Table(("source_type", "source_id", "destination_type", "destination_id"), ("input_uuid", "step")),
    "input_tags": _Table(("input_uuid", "name"), ("value",)),
    "logged_models": _Table(
        ("model_id",),
        ("experiment_id", "name", "artifact_location", "creation_timestamp_ms", "last_updated_timestamp_ms", "status",
         "lifecycle_stage", "model_type", "source_run_id"),
    ),
    "logged_model_params": _Table(("model_id", "param_key"), ("experiment_id", "param_value")),
    "logged_model_tags": _Table(("model_id", "tag_key"), ("experiment_id", "tag_value")),
    "logged_model_metrics": _Table(
        ("model_id", "metric_name", "metric_timestamp_ms", "metric_step", "run_id"),
        ("metric_value", "experiment_id", "dataset_name", "dataset_digest"),
    ),
}  # fmt: skip
_NEWER = "(excluded.step, excluded.timestamp, excluded.value) > (step, timestamp, value)"
_REPLACE = {
    "tags": "DO UPDATE SET value = excluded.value",
    "logged_model_tags": "DO UPDATE SET tag_value = excluded.tag_value",
    "latest_metrics": "DO UPDATE SET value = excluded.value, timestamp = excluded.timestamp, step = excluded.step,"
    f" is_nan = excluded.is_nan WHERE {_NEWER}",
}
"""What happens to an existing row; by default it stays unchanged."""
_INSERT = {
    name: f"INSERT INTO {name} ({', '.join(table.columns)}) VALUES ({', '.join('?' * len(table.columns))})"
    f" ON CONFLICT ({', '.join(table.key)}) {_REPLACE.get(name, 'DO NOTHING')}"
    for name, table in _TABLES.items()
}


def opened(client: Any, file: Path, experiment_id: str, location: str) -> "LocalClient | None":
    """The client for one experiment of the store in `file`, whose artifacts are at `location`; None if its schema is not known."""
    db = sqlite3.connect(file, timeout=WAIT_SECONDS, isolation_level=None, check_same_thread=False)
    if all(_is_known(db, name, table) for name, table in _TABLES.items()):
        return LocalClient(client, db, int(experiment_id), location)
    db.close()
    return None


def _is_known(db: sqlite3.Connection, name: str, table: _Table) -> bool:
    there = {row[1]: row for row in db.execute(f"PRAGMA table_info({name})")}
    key = {column for column, row in there.items() if row[5]}
    left_out = there.keys() - set(table.columns)
    return (
        key == set(table.key)
        and set(table.columns) <= there.keys()
        and all(not there[column][3] or there[column][4] is not None for column in left_out)
    )


class LocalClient:
    """The methods of MlflowClient that deliver rows, over one sqlite connection; `flush` commits them."""

    def __init__(self, client: Any, db: sqlite3.Connection, experiment_id: int, location: str) -> None:
        self._client, self._db = client, db
        self._experiment_id, self._location = experiment_id, location
        self._active: set[str] = set()
        self._open = False

    def __getattr__(self, name: str) -> Any:
        """Any other method is MLflow's; it needs the lock that an open transaction holds, so the transaction is written first."""
        method = getattr(self._client, name)

        def written_first(*arguments: Any, **options: Any) -> Any:
            self.flush()
            return method(*arguments, **options)

        return written_first

    def flush(self) -> None:
        """Commit everything since the last `flush`, or nothing."""
        if self._open:
            try:
                self._check_open()
                self._db.execute("COMMIT")
            except BaseException:
                self.drop()
                raise
        self._open = False
        self._active.clear()

    def drop(self) -> None:
        """Roll back everything since the last `flush`."""
        with contextlib.suppress(sqlite3.Error):
            self._db.rollback()
        self._open = False
        self._active.clear()

    def close(self) -> None:
        self.drop()
        self._db.close()

    # --- runs ---------------------------------------------------------------------------------------------------------

    def create_run(
        self, experiment_id: str, *, start_time: int, tags: Mapping[str, str], run_name: str
    ) -> Any:
        from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME, MLFLOW_USER

        run_id = uuid.uuid4().hex
        user = tags.get(MLFLOW_USER, "unknown")
        place = f"{self._location}/{run_id}/artifacts"
        self._insert(
            "runs",
            [(run_id, run_name, place, self._experiment_id, user, start_time, "UNKNOWN", "", "", "", "RUNNING", "active")],
        )  # fmt: skip
        self._insert("tags", _of(run_id, {**tags, MLFLOW_RUN_NAME: run_name}, "tag"))
        info = SimpleNamespace(run_id=run_id, artifact_uri=place)
        return SimpleNamespace(info=info, data=SimpleNamespace(tags=dict(tags)))

    def log_batch(
        self,
        run_id: str,
        metrics: Sequence[Any] = (),
        params: Sequence[Any] = (),
        tags: Sequence[Any] = (),
        synchronous: bool = True,
    ) -> None:
        from mlflow.utils.validation import _validate_metric

        self._check_active(run_id)
        if params:
            self._log_params(run_id, _of(run_id, {param.key: param.value for param in params}, "param"))
        for metric in metrics:
            _validate_metric(metric.key, metric.value, metric.timestamp, metric.step)
        self._insert("metrics", [(m.key, m.timestamp, m.step, run_id, m.value, False) for m in metrics])
        self._insert(
            "latest_metrics", [(m.key, run_id, m.value, m.timestamp, m.step, False) for m in metrics]
        )
        self._insert(
            "logged_model_metrics",
            [
                (m.model_id, m.key, m.timestamp, m.step, run_id, m.value, self._experiment_id, m.dataset_name, m.dataset_digest)
                for m in metrics
                if m.model_id is not None
            ],
        )  # fmt: skip
        self._insert("tags", _of(run_id, {tag.key: tag.value for tag in tags}, "tag"))

    def _log_params(self, run_id: str, rows: Sequence[tuple[str, str, str]]) -> None:
        known = dict(self._execute("SELECT key, value FROM params WHERE run_uuid = ?", run_id))
        changed = [key for key, _, value in rows if known.get(key, value) != value]
        if changed:
            raise _no(f"params of run {run_id} cannot be changed: {', '.join(changed)}")
        self._insert("params", rows)

    def log_inputs(self, run_id: str, datasets: Sequence[Any] = (), models: Sequence[Any] = ()) -> None:
        self._check_active(run_id)
        for one in datasets:
            data = one.dataset
            key = (self._experiment_id, data.name, data.digest)
            self._insert("datasets", [(*key, uuid.uuid4().hex, data.source_type, data.source)])
            query = "SELECT dataset_uuid FROM datasets WHERE experiment_id = ? AND name = ? AND digest = ?"
            ((dataset,),) = self._execute(query, *key)
            edge = ("DATASET", dataset, "RUN", run_id)
            self._insert("inputs", [(*edge, uuid.uuid4().hex, 0)])
            query = f"SELECT input_uuid FROM inputs WHERE {' AND '.join(f'{k} = ?' for k in _TABLES['inputs'].key)}"
            ((made,),) = self._execute(query, *edge)
            self._insert("input_tags", [(made, tag.key, tag.value) for tag in one.tags])
        rows = [("RUN_INPUT", run_id, "MODEL_INPUT", m.model_id, uuid.uuid4().hex, 0) for m in models]
        self._insert("inputs", rows)

    def log_outputs(self, run_id: str, models: Sequence[Any]) -> None:
        self._check_active(run_id)
        rows = [("RUN_OUTPUT", run_id, "MODEL_OUTPUT", m.model_id, uuid.uuid4().hex, m.step) for m in models]
        self._insert("inputs", rows)

    def set_tag(self, run_id: str, key: str, value: str, synchronous: bool = True) -> None:
        self._check_active(run_id)
        self._insert("tags", _of(run_id, {key: value}, "tag"))

    def delete_tag(self, run_id: str, key: str) -> None:
        self._check_active(run_id)
        self._execute("DELETE FROM tags WHERE run_uuid = ? AND key = ?", run_id, key)

    def update_run(self, run_id: str, *, status: str) -> None:
        self._check_active(run_id)
        self._execute("UPDATE runs SET status = ? WHERE run_uuid = ?", status, run_id)

    def set_terminated(self, run_id: str, *, status: str, end_time: int) -> None:
        self._check_active(run_id)
        self._execute("UPDATE runs SET status = ?, end_time = ? WHERE run_uuid = ?", status, end_time, run_id)

    # --- models -------------------------------------------------------------------------------------------------------

    def create_logged_model(
        self,
        experiment_id: str,
        *,
        name: str,
        source_run_id: str,
        tags: Mapping[str, str],
        params: Mapping[str, str],
        model_type: str,
    ) -> Any:
        """The id is derived from the tags and from the store's place. Files that a killed process has placed are therefore found
        again, and another store, also of the same study, has other ids, as MLflow's client expects (it caches places by id).
        """
        from mlflow.utils.validation import _validate_logged_model_name

        _validate_logged_model_name(name)
        named = json.dumps([self._location, experiment_id, name, sorted(tags.items())])
        model_id = f"m-{hashlib.sha256(named.encode()).hexdigest()[:32]}"
        if self._execute("SELECT 1 FROM logged_models WHERE model_id = ?", model_id):
            model_id = f"m-{uuid.uuid4().hex}"  # the model was deleted in the UI, which keeps its row
        place, now = f"{self._location}/models/{model_id}/artifacts", time.time_ns() // 1_000_000
        here = self._experiment_id
        self._insert(
            "logged_models",
            [(model_id, here, name, place, now, now, _PENDING, "active", model_type, source_run_id)],
        )
        self._insert("logged_model_params", [(model_id, key, here, value) for key, value in params.items()])
        self.set_logged_model_tags(model_id, tags)
        return SimpleNamespace(model_id=model_id, artifact_location=place)

    def set_logged_model_tags(self, model_id: str, tags: Mapping[str, str]) -> None:
        rows = [(model_id, key, self._experiment_id, value) for key, value in tags.items()]
        self._insert("logged_model_tags", rows)

    def finalize_logged_model(self, model_id: str, status: str) -> None:
        self._execute(
            "UPDATE logged_models SET status = ?, last_updated_timestamp_ms = ? WHERE model_id = ?",
            _STATUS[status], time.time_ns() // 1_000_000, model_id,
        )  # fmt: skip

    def create_model_version(self, name: str, source: str, run_id: str, **more: Any) -> Any:
        """As of MLflow; afterwards the source names the model, so that the UI links a version to its model."""
        self.flush()
        version = self._client.create_model_version(name, source, run_id, **more)
        self._execute(
            "UPDATE model_versions SET source = ? WHERE name = ? AND version = ?",
            f"models:/{more['model_id']}", name, int(version.version),
        )  # fmt: skip
        return version

    # --- the transaction ----------------------------------------------------------------------------------------------

    def _check_active(self, run_id: str) -> None:
        """As of MLflow; within a transaction no other process can delete a run."""
        if run_id not in self._active:
            stage = self._execute("SELECT lifecycle_stage FROM runs WHERE run_uuid = ?", run_id)
            if stage != [("active",)]:
                raise _no(f"the run {run_id} was deleted")
            self._active.add(run_id)

    def _insert(self, table: str, rows: Iterable[tuple[Any, ...]]) -> None:
        self._begin()
        self._db.executemany(_INSERT[table], rows)

    def _execute(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        self._begin()
        return self._db.execute(statement, values).fetchall()

    def _begin(self) -> None:
        if self._open:
            self._check_open()
        else:
            self._db.execute("BEGIN IMMEDIATE")
            self._open = True

    def _check_open(self) -> None:
        """sqlite itself rolls back after some errors (a full disk). The earlier calls are lost then, so `flush` must fail too."""
        if not self._db.in_transaction:
            raise sqlite3.OperationalError("sqlite has rolled the transaction back")


def _of(run_id: str, values: Mapping[str, str], what: str) -> list[tuple[str, str, str]]:
    """Rows of the tags or params of a run, checked and shortened as MLflow does."""
    from mlflow.utils.validation import _validate_param, _validate_tag

    check = {"tag": _validate_tag, "param": _validate_param}[what]
    found = [check(key, value) for key, value in values.items()]
    return [(one.key, run_id, one.value) for one in found]


def _no(text: str) -> Exception:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

    return MlflowException(text, error_code=INVALID_PARAMETER_VALUE)
