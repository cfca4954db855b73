"""Rows written directly into MLflow's tables: as its own client would have written them, complete, and once."""

import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.tracking.mlflow.database import LocalClient, opened
from pipeline.tracking.mlflow.local import LOCAL_DB
from pipeline.tracking.mlflow.sink import MlflowSink
from pipeline.tracking.outbox import Entry
from tests.pipeline.tracked_study import EXPERIMENT, START_MS, Tracked, deliver, exported

TABLES = (
    "runs", "params", "tags", "metrics", "latest_metrics", "datasets", "inputs", "input_tags", "logged_models",
    "logged_model_params", "logged_model_tags", "logged_model_metrics",
)  # fmt: skip
TIMES = {"creation_timestamp_ms", "last_updated_timestamp_ms"}


def told(study: Tracked, out: Path | None = None) -> Tracked:
    """Record and deliver a study that failed once and then ended; in `out`, a copy."""
    if out is not None:
        shutil.copytree(study.out, out)
        study = replace(study, out=out)
    outbox = study.outbox()
    broken = next(step for step in study.plan.steps.values() if step.kind == "train")
    study.tell(outbox, [], finish=False).step_failed(broken, "loss is NaN", START_MS + 5)
    assert deliver(study, outbox) is None
    study.tell(outbox)
    assert deliver(study, outbox) is None
    outbox.close()
    return study


def written(out: Path) -> dict[str, list[Any]]:
    """Every row of the tables, with the names that MLflow draws at random replaced by what they name."""
    with sqlite3.connect(out / LOCAL_DB) as db:
        names = {
            **dict(db.execute("SELECT run_uuid, 'run ' || name FROM runs")),
            **dict(db.execute("SELECT model_id, 'model ' || name FROM logged_models")),
            **dict(db.execute("SELECT dataset_uuid, 'data ' || name FROM datasets")),
        }
        edges = db.execute("SELECT input_uuid, source_id, destination_id FROM inputs").fetchall()
        names |= {uuid: f"{names[source]} -> {names[target]}" for uuid, source, target in edges}
        found = {}
        for table in TABLES:
            rows = db.execute(f"SELECT * FROM {table}")
            columns = [column[0] for column in rows.description]
            found[table] = sorted(
                (
                    {
                        column: plain(value, names, str(out))
                        for column, value in zip(columns, row, strict=True)
                        if column not in TIMES
                    }
                    for row in rows
                ),
                key=str,
            )
    return found


def plain(value: Any, names: dict[str, str], out: str) -> Any:
    if not isinstance(value, str):
        return value
    for random, name in names.items():
        value = value.replace(random, name)
    return value.replace(out, "OUT")


def test_tables_hold_what_mlflows_own_client_writes(
    make_study: Callable[..., Tracked], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study("direct")
    direct = told(study, study.out.with_name("copy"))
    monkeypatch.setattr("pipeline.tracking.mlflow.sink.opened", lambda *_: None)
    own = told(study)
    assert exported(direct) == exported(own)
    ours, theirs = written(direct.out), written(own.out)
    for table in TABLES:
        assert ours[table] and ours[table] == theirs[table], table


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE runs ADD COLUMN more TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE logged_models RENAME COLUMN model_type TO kind",
    ],
    ids=["a column that fills itself", "a column of another name"],
)
def test_store_of_another_form_is_left_to_mlflows_client(
    tmp_path: Path, empty_store: Path, change: str
) -> None:
    shutil.copyfile(empty_store, tmp_path / LOCAL_DB)
    with sqlite3.connect(tmp_path / LOCAL_DB) as db:
        db.execute(change)
    assert (opened(None, tmp_path / LOCAL_DB, "1", "file:///x") is None) is ("RENAME" in change)


@pytest.mark.fault("F2")
def test_batch_that_is_cut_off_leaves_nothing_and_is_delivered_whole_later(
    make_study: Callable[..., Tracked], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are placed before the transaction is written; they belong to the model again when it is created again."""
    study = make_study("cut", tasks=("animals",))
    outbox = study.outbox()
    study.tell(outbox)
    sink, bulk = MlflowSink(study.out, None, EXPERIMENT), ("run", "model", "log")
    with monkeypatch.context() as broken:
        broken.setattr(LocalClient, "flush", refuse)
        with pytest.raises(Exception, match="disk I/O error"):
            list(
                sink.deliver(
                    [entry for entry in outbox.undelivered("x", 1000) if entry.payload["op"] in bulk]
                )
            )
    sink.forget()
    placed = {path.name for path in (study.out / "mlartifacts").glob("models/*")}
    with sqlite3.connect(study.out / LOCAL_DB) as db:
        assert db.execute("SELECT count(*) FROM runs").fetchone() == (0,)
    assert deliver(study, outbox) is None
    assert {path.name for path in (study.out / "mlartifacts").glob("models/*")} == placed
    with sqlite3.connect(study.out / LOCAL_DB) as db:
        assert {name for (name,) in db.execute("SELECT model_id FROM logged_models")} == placed


@pytest.mark.fault("F13")
@pytest.mark.parametrize("at", ["finalize_logged_model", "set_terminated"])
def test_nothing_is_taken_for_sent_once_sqlite_has_rolled_back_by_itself(
    make_study: Callable[..., Tracked], monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """As sqlite does when the disk is full, also if the last call was the one that failed."""
    study = make_study("lost", tasks=("animals",), strategies=("zero_shot",))
    outbox = study.outbox()
    study.tell(outbox)
    entries = [
        e for e in outbox.undelivered("x", 1000) if e.payload["op"] in ("run", "model", "log", "status")
    ]
    sink, sent = MlflowSink(study.out, None, EXPERIMENT), []
    monkeypatch.setattr(LocalClient, at, lambda client, *_, **__: client._db.rollback())
    with pytest.raises(Exception, match="rolled the transaction back"):
        sent += sink.deliver(entries)
    assert sent == []


def refuse(client: LocalClient) -> None:
    """The disk fails when a transaction that holds models is to be written."""
    if client._db.in_transaction and client._db.execute("SELECT count(*) FROM logged_models").fetchone() != (
        0,
    ):
        client.drop()
        raise sqlite3.OperationalError("disk I/O error")


def test_rows_on_their_way_to_a_run_go_in_one_request(make_study: Callable[..., Tracked]) -> None:
    """For a server: neighbouring rows of one run are one call of log_batch; if it is refused, they are sent separately."""
    study = make_study("together", tasks=("animals", "scripts"))
    outbox = study.outbox()
    study.tell(outbox)
    entries = outbox.undelivered("x", 1000)
    calls: list[list[Entry]] = []

    class Counting(MlflowSink):
        def _send(self, entries: Sequence[Entry]) -> None:
            calls.append(list(entries))
            super()._send(entries)

    sink = Counting(study.out, None, EXPERIMENT)
    assert [entry for sent in sink.deliver(entries) for entry in sent.entries] == entries
    logs = sum(entry.payload["op"] == "log" for entry in entries)
    assert sum(call[0].payload["op"] == "log" for call in calls) < logs


def test_run_that_was_deleted_takes_no_more_rows(make_study: Callable[..., Tracked]) -> None:
    study = make_study("deleted", tasks=("animals",), strategies=("zero_shot",))
    outbox = study.outbox()
    study.tell(outbox)
    entries = list(outbox.undelivered("x", 1000))
    sink = MlflowSink(study.out, None, EXPERIMENT)
    runs = [entry for entry in entries if entry.payload["op"] in ("run", "model")]
    assert [sent.refused for sent in sink.deliver(runs)] == [None] * len(runs)
    with sqlite3.connect(study.out / LOCAL_DB) as db:
        db.execute("UPDATE runs SET lifecycle_stage = 'deleted' WHERE name = 'zero_shot'")
    rest = [e for e in entries if e.payload["op"] == "log" and e.payload["run"] == "trajectory/zero_shot"]
    assert rest and all("deleted" in str(sent.refused) for sent in sink.deliver(rest))


def files(out: Path) -> Iterator[Path]:
    return (path for path in (out / "mlartifacts").rglob("*") if path.is_file())


def test_what_models_have_in_common_lies_on_the_disk_once(make_study: Callable[..., Tracked]) -> None:
    study = told(make_study("links"))
    common = {
        path.stat().st_ino for path in files(study.out) if path.name in ("requirements.txt", "pictures.py")
    }
    assert len(common) == 2
