"""Delivery to a real MLflow store: once, in order, whatever process ends or request fails in between."""

import contextlib
import json
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError, TrackingError
from pipeline.tracking.mlflow.artifacts import Artifacts, Refused, safe_name
from pipeline.tracking.mlflow.client import TIMEOUT_VARIABLE, TRIES
from pipeline.tracking.mlflow.experiment import TAGS
from pipeline.tracking.mlflow.local import (
    LOCAL_ARTIFACTS,
    LOCAL_DB,
    guard_environment,
    local_uri,
    make_local_store,
)
from pipeline.tracking.mlflow.sink import MlflowSink, Sent
from pipeline.tracking.outbox import FILE, Entry, Outbox, glance
from pipeline.tracking.tracker import FlushLock, Tracker, file_with_study, sync, ui_command, ui_url
from tests.pipeline.tracked_study import (
    EXPERIMENT,
    MODEL_FILES,
    START_MS,
    Tracked,
    deliver,
    exported,
    finished_study,
)

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Tracked:
    """A study that was delivered without a fault."""
    study = finished_study(tmp_path_factory.mktemp("golden"), strategies=("zero_shot", "best_in_time"))
    shutil.copyfile(empty_store, study.out / LOCAL_DB)
    outbox = study.outbox()
    study.tell(outbox)
    assert deliver(study, outbox) is None
    return study


@pytest.fixture(scope="module")
def golden(undisturbed: Tracked) -> list[dict[str, Any]]:
    """The export that every other way to the same end must give."""
    return exported(undisturbed)


def test_everything_arrives_and_a_person_can_find_it(golden: list[dict[str, Any]]) -> None:
    runs = {run["name"]: run for run in golden if "run" in run and "model" not in run}
    models = {model["name"]: model for model in golden if "model" in model}
    assert runs["demo"]["parent"] is None and runs["best_in_time"]["parent"] == "study"
    assert runs["expert t=3 photos_b · init ema · average"]["parent"] == "experts"
    assert {run["status"] for run in runs.values()} == {"FINISHED"}
    assert set(runs["demo"]["artifacts"]) == {"plan.json", "results.csv", "study.yaml"}
    model = models["best_in_time-t3-photos_b"]
    assert model["artifacts"] == MODEL_FILES
    assert model["status"] == "READY" and model["run"] == "trajectory/best_in_time"
    assert {"ka", "zs", "gm", "score/icons", "merged_norm"} <= {metric[0] for metric in model["metrics"]}
    assert ["score/icons", 3, "icons"] in [[m[0], m[1], m[3]] for m in model["metrics"]]
    assert runs["best_in_time"]["outputs"] == [f"best_in_time/t{t}" for t in (1, 2, 3)]


def test_no_metric_is_there_twice(golden: list[dict[str, Any]]) -> None:
    for item in (item for item in golden if "registered" not in item):
        keys = [tuple(metric[:2]) + tuple(metric[3:]) for metric in item["metrics"]]
        assert len(keys) == len(set(keys)), item["name"]


def test_models_are_found_by_their_metrics(undisturbed: Tracked) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(local_uri(undisturbed.out))
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    found = client.search_logged_models([experiment.experiment_id], "metrics.gm > 0.1 AND params.t = '3'")
    assert [model.name for model in found] == ["best_in_time-t3-photos_b"]
    wanted = "tags.`strategy.init` = 'ema' AND tags.kind = 'trajectory'"
    assert [run.info.run_name for run in client.search_runs([experiment.experiment_id], wanted)] == [
        "best_in_time"
    ]


def test_best_trajectory_is_a_registered_version_with_lineage(
    undisturbed: Tracked, golden: list[dict[str, Any]]
) -> None:
    (version,) = [item for item in golden if "registered" in item]
    assert (version["registered"], version["version"], version["aliases"]) == ("demo", "1", ["best"])
    assert version["of"] == "best_in_time/t3"
    expected = {"trajectory": "best_in_time", "t": "3", "strategy.init": "ema", "chosen_by": "gm"}
    assert version["tags"].items() >= expected.items()
    merged = undisturbed.plan.trajectories[-1].points[-1].deployed
    assert version["tags"]["sha256"] == undisturbed.records[merged].sha256("open_clip_model.safetensors")


def test_registered_version_loads_by_its_alias(undisturbed: Tracked, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", local_uri(undisturbed.out))
    path = Path(mlflow.artifacts.download_artifacts("models:/demo@best"))
    assert {"manifest.json", "open_clip_config.json", "open_clip_model.safetensors"} <= {
        file.name for file in path.iterdir()
    }


def test_files_filed_after_the_end_are_with_the_study_and_filed_again_only_when_changed(
    make_study: Callable[..., Tracked],
) -> None:
    study = make_study("filed", strategies=("zero_shot",))
    outbox = study.outbox()
    study.tell(outbox)
    deliver(study, outbox)
    plan, name = study.plan.fingerprint, "report/report.html"
    (study.out / "report").mkdir()
    for text in ("first", "first", "second"):
        (study.out / name).write_text(text)
        assert file_with_study(study.out, plan, [name]) == (0, None)
    filed = list((study.out / LOCAL_ARTIFACTS).rglob("report.html"))
    assert [file.read_text() for file in filed] == ["second"]
    assert file_with_study(study.out / "nowhere", plan, [name]) == (0, None)


def test_another_best_of_the_study_is_a_further_version_and_takes_the_alias(
    make_study: Callable[..., Tracked],
) -> None:
    study = make_study("again", tasks=("animals",), strategies=("offline_merging", "best_in_time"))
    for trajectory in study.plan.trajectories:
        outbox = study.outbox()
        study.tell(outbox, best=trajectory.id)
        deliver(study, outbox)
        outbox.close()
    versions = [item for item in exported(study) if "registered" in item]
    assert [(v["of"].split("/")[0], v["aliases"]) for v in versions] == [
        ("offline_merging", []), ("best_in_time", ["best"]),
    ]  # fmt: skip


def test_weights_are_linked_not_copied(undisturbed: Tracked) -> None:
    logged = list((undisturbed.out / LOCAL_ARTIFACTS).rglob("*.safetensors"))
    in_store = {path.stat().st_ino for path in (undisturbed.out / "store").rglob("*.safetensors")}
    assert len(logged) == 7 and {path.stat().st_ino for path in logged} <= in_store


def test_without_log_weights_everything_but_weights_is_filed(make_study: Callable[..., Tracked]) -> None:
    study = make_study("manifests", log_weights=False, strategies=("offline_merging",), tasks=("animals",))
    outbox = study.outbox()
    study.tell(outbox)
    deliver(study, outbox)
    filed = tuple(name for name in MODEL_FILES if not name.startswith("open_clip"))
    assert {tuple(item["artifacts"]) for item in exported(study) if "model" in item} == {filed}
    manifest = json.loads(next((study.out / LOCAL_ARTIFACTS).rglob("manifest.json")).read_text())
    assert (study.out / manifest["store"] / "open_clip_model.safetensors").is_file()


KILLER = """
import os, signal, sys
from pathlib import Path
from tests.pipeline import tracked_study
from pipeline.tracking.outbox import FILE, Outbox
from pipeline.tracking.tracker import Tracker

out, at = Path(sys.argv[1]), int(sys.argv[2])
sent = 0
def on_sent(entry):
    global sent
    sent += 1
    if sent == at:
        os.kill(os.getpid(), signal.SIGKILL)
tracker = Tracker(out, Outbox(out / FILE), uri=None, experiment="tests")
tracker.on_sent = on_sent
tracker.start()
tracker.close(200)
"""


@pytest.mark.fault("F2")
def test_kill_between_send_and_mark_changes_nothing(
    make_study: Callable[..., Tracked], golden: list[dict[str, Any]]
) -> None:
    """The process is killed after MLflow has a row and before the outbox has marked it; a rerun delivers the rest."""
    study = make_study("killed")
    outbox = study.outbox()
    study.tell(outbox)
    command = [sys.executable, "-c", KILLER, str(study.out), "9"]
    done = subprocess.run(command, cwd=ROOT, timeout=240, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    deliver(study, outbox)
    assert exported(study) == golden


@pytest.mark.fault("F11")
def test_every_row_delivered_twice_changes_nothing(
    make_study: Callable[..., Tracked], golden: list[dict[str, Any]]
) -> None:
    """As if every answer had been lost after the server had stored the row."""
    study = make_study("twice")
    outbox = study.outbox()
    study.tell(outbox)

    class Forgetful(MlflowSink):
        def deliver(self, entries: Sequence[Entry]) -> Iterator[Sent]:
            first = list(super().deliver(entries))
            if not lost >= {entry.seq for entry in entries}:
                lost.update(entry.seq for entry in entries)
                self.forget()
                assert list(super().deliver(entries)) == first
            yield from first

    lost: set[int] = set()
    tracker = Tracker(
        study.out, outbox, uri=None, experiment=EXPERIMENT, sink=Forgetful(study.out, None, EXPERIMENT)
    )
    tracker.start()
    assert tracker.close(120) == 0, tracker.last_error
    assert exported(study) == golden


@pytest.mark.fault("F10")
def test_killed_and_rerun_study_ends_as_one_left_alone(
    make_study: Callable[..., Tracked], golden: list[dict[str, Any]]
) -> None:
    """First run: half of the steps, then one fails. Second run: records the finished steps again and finishes."""
    study = make_study("rerun")
    outbox = study.outbox()
    order = list(study.plan.steps)
    recorder = study.tell(outbox, order[: len(order) // 2], finish=False)
    broken = next(s for s in study.plan.steps.values() if s.kind == "train" and s.t == 3)
    recorder.step_failed(broken, "loss is NaN at step 7", START_MS + 5)
    deliver(study, outbox)
    failed = {item["name"]: item for item in exported(study) if item.get("status") == "FAILED"}
    assert set(failed) >= {"demo", "best_in_time", "expert t=3 photos_b · init ema · average"}
    assert failed["demo"]["tags"]["error"] == "loss is NaN at step 7"
    study.tell(outbox)
    deliver(study, outbox)
    assert exported(study) == golden


def test_telling_a_finished_study_again_leaves_nothing_pending(make_study: Callable[..., Tracked]) -> None:
    study = make_study("again")
    outbox = study.outbox()
    study.tell(outbox)
    for entry in outbox.undelivered("x", 10_000):
        outbox.delivered("x", entry.seq)
    study.tell(outbox)
    assert outbox.pending("x") == 0


@pytest.mark.fault("F13")
def test_locked_sqlite_is_waited_for_and_the_caller_is_not(make_study: Callable[..., Tracked]) -> None:
    study = make_study("locked", strategies=("zero_shot",))
    outbox = study.outbox()
    lock = sqlite3.connect(study.out / LOCAL_DB, isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    tracker = Tracker(study.out, outbox, uri=None, experiment=EXPERIMENT)
    tracker.start()
    study.tell(outbox)  # returns while the lock is held
    time.sleep(1)
    assert outbox.pending() > 0
    lock.execute("ROLLBACK")
    lock.close()
    assert tracker.close(240) == 0, tracker.last_error


class Server:
    """A tracking server of a kind: answers every request with `answer`, and counts them."""

    def __init__(self, answer: Callable[[BaseHTTPRequestHandler], None]) -> None:
        self.requests = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                outer.requests += 1
                answer(self)

            do_GET = do_POST = do_PATCH = do_PUT = handle_any

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def reply(status: int, body: bytes = b"{}", **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


class Slow:
    """A tracking server that answers the requests of a run's row correctly, each after `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.asked, self.over = seconds, list[str](), threading.Event()

    def __call__(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers.get("Content-Length") or 0)) or b"{}")
        what = handler.path.partition("?")[0].rpartition("mlflow/")[2]
        self.asked.append(what)
        self.over.wait(self.seconds)
        tags = [{"key": key, "value": value} for key, value in TAGS.items()]
        experiment = {"experiment_id": "1", "name": EXPERIMENT, "lifecycle_stage": "active", "tags": tags}
        info = {"run_id": "r", "experiment_id": "1", "status": "RUNNING", "start_time": 1}
        answers = {
            "experiments/get-by-name": {"experiment": experiment},
            "runs/create": {"run": {"info": info, "data": {"tags": body.get("tags")}}},
        }
        with contextlib.suppress(OSError):
            reply(200, json.dumps(answers.get(what, {})).encode())(handler)


@pytest.mark.fault("F10")
@pytest.mark.parametrize("seconds", [1.5, 3600], ids=["slow", "never"])
def test_server_that_takes_longer_than_the_first_time_limit_receives_its_rows(
    seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit of 1 s that grows to 6 s: a server that needs 1.5 s receives its rows; one that never answers is given up and
    named.
    """
    monkeypatch.delenv(TIMEOUT_VARIABLE, raising=False)
    monkeypatch.setattr("pipeline.tracking.mlflow.client.TIMEOUTS", (1, 6))
    monkeypatch.setattr("pipeline.tracking.tracker.SYNC_PATIENCE", 1.0)
    slow = Slow(seconds)
    with Server(slow) as server:
        outbox = Outbox(tmp_path / FILE)
        body = {
            "op": "run",
            "plan": "p",
            "run": "study",
            "parent": None,
            "name": "n",
            "tags": {},
            "params": {},
        }
        outbox.append("k", {**body, "start_ms": 1, "datasets": []}, 1)
        Tracker(tmp_path, outbox, uri=server.uri, experiment=EXPERIMENT)
        outbox.close()
        pending, why = sync(tmp_path)
        slow.over.set()
    assert pending == (0 if seconds < 6 else 1), why
    assert ("runs/create" in slow.asked) is (pending == 0)
    assert pending == 0 or (why is not None and TIMEOUT_VARIABLE in why and "more than 6 s" in why)


@pytest.mark.fault("F10")
def test_server_down_then_elsewhere_up_delivers_the_rest_with_sync(
    make_study: Callable[..., Tracked], golden: list[dict[str, Any]]
) -> None:
    """A refused connection costs the caller nothing; the rows wait and go to another store later."""
    study = make_study("down")
    outbox = study.outbox()
    tracker = Tracker(study.out, outbox, uri="http://127.0.0.1:9", experiment=EXPERIMENT)
    tracker.start()
    study.tell(outbox)
    started = time.monotonic()
    pending = tracker.close(240)
    assert time.monotonic() - started < 120, "it is given up long before the time that it may take"
    assert pending == outbox.pending() == glance(study.out).pending > 0
    assert tracker.last_error is not None and len(tracker.last_error) < 500
    outbox.close()
    assert sync(study.out, uri=local_uri(study.out), timeout=60) == (0, None)
    assert glance(study.out).pending == pending, "the study's own tracker has still not got them"
    # A store given by address keeps artifacts where MLflow likes; everything else is as ever.
    assert [i["name"] for i in exported(study)] == [i["name"] for i in golden]


@pytest.mark.fault("F12")
@pytest.mark.parametrize(
    "answer",
    [
        reply(500, b"oops"),
        reply(200, b"<html>" + b"x" * 1_000_000),
        reply(302, b"", Location="http://127.0.0.1:9/elsewhere"),
        reply(403, b"no"),
        reply(200, b'{"experiment": {"experiment_id": "1", "name": "tests", "lifecycle_stage": "deleted"}}'),
    ],
    ids=["errors", "html", "redirect", "forbidden", "deleted"],
)
def test_hostile_answers_keep_the_outbox_and_say_why(tmp_path: Path, answer: Callable[..., None]) -> None:
    outbox = Outbox(tmp_path / FILE)
    body = {"op": "run", "plan": "p", "run": "study", "parent": None, "name": "n", "tags": {}, "params": {}}
    outbox.append("k", {**body, "start_ms": 1, "datasets": []}, 1)
    before = sorted(path.name for path in tmp_path.iterdir())
    with Server(answer) as server:
        sink = MlflowSink(tmp_path, server.uri, EXPERIMENT)
        with pytest.raises(TrackingError) as caught:
            list(sink.deliver(outbox.undelivered("")))
        assert 1 <= server.requests <= 2 * TRIES
    assert len(str(caught.value)) < 500
    assert outbox.pending() == 1 and sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.fault("F12")
@pytest.mark.parametrize(
    ("uri", "location"),
    [
        ("http://server", "/etc/cron.d"),
        ("http://server", "file:///tmp/x"),
        ("http://server", "../../x"),
        ("http://server", "http://elsewhere/x"),
        ("http://server", "mlflow-artifacts://elsewhere:80/x"),
        ("http://server", "ftp://elsewhere/x"),
        (None, "/etc/cron.d"),
        (None, "file:///etc"),
    ],
)
def test_server_cannot_choose_where_files_go(tmp_path: Path, uri: str | None, location: str) -> None:
    with pytest.raises(TrackingError):
        Artifacts(tmp_path, uri).target(location)


def test_usual_artifact_places_are_accepted(tmp_path: Path) -> None:
    server = Artifacts(tmp_path, "http://server:5000")
    for location in (
        "s3://bucket/x",
        "mlflow-artifacts:/1/x",
        "mlflow-artifacts://server:5000/1",
        "gs://b/x",
    ):
        assert server.target(location) is None
    place = tmp_path / LOCAL_ARTIFACTS / "1"
    assert Artifacts(tmp_path, None).target(str(place)) == place


@pytest.mark.fault("F12")
@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a\0b", "é"])
def test_artifact_names_cannot_leave_their_directory(tmp_path: Path, name: str) -> None:
    with pytest.raises(Refused):
        safe_name(name)


@pytest.mark.fault("F12")
def test_row_that_points_outside_the_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="outside"):
        Artifacts(tmp_path / "out", None).inside("../secret")


def test_refused_row_does_not_hold_up_the_others(make_study: Callable[..., Tracked]) -> None:
    study = make_study("refused", strategies=("zero_shot",))
    outbox = study.outbox()
    plan = study.plan.fingerprint
    body = {"op": "log", "plan": plan, "run": "no such run", "model": None, "metrics": [], "tags": {}}
    outbox.append("bad", body, 1)
    study.tell(outbox)
    tracker = Tracker(study.out, outbox, uri=None, experiment=EXPERIMENT)
    tracker.start()
    assert tracker.close(240) == 1
    assert "no such run" in str(tracker.last_error)
    assert any(item["name"] == "zero_shot" and item["status"] == "FINISHED" for item in exported(study))


def test_refused_row_is_offered_again_once_what_it_lacked_is_there(tmp_path: Path) -> None:
    have: set[str] = set()

    class Picky:
        def deliver(self, entries: Sequence[Entry]) -> Iterator[Sent]:
            for entry in entries:
                needs = entry.payload["needs"]
                refused = f"{entry.key}: no {needs}" if needs and needs not in have else None
                have.update(() if refused else [entry.key])
                yield Sent([entry], refused)

        def forget(self) -> None:
            pass

    outbox = Outbox(tmp_path / FILE)
    for key, needs in (("child", "parent"), ("orphan", "nobody"), ("parent", "")):
        outbox.append(key, {"needs": needs}, 1)
    tracker = Tracker(tmp_path, outbox, uri=None, experiment=EXPERIMENT, sink=Picky())
    tracker.start()
    assert tracker.close(10) == 1 and have == {"parent", "child"}
    assert tracker.last_error == "orphan: no nobody"


@pytest.mark.fault("F5")
def test_only_one_process_delivers(tmp_path: Path) -> None:
    with FlushLock(tmp_path) as first:
        assert first
        with FlushLock(tmp_path) as second:
            assert not second
    with FlushLock(tmp_path) as third:
        assert third


@pytest.mark.fault("F5")
def test_sync_waits_for_another_process_in_a_request_and_then_delivers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its request may last as long as any; the lock is released after it."""
    monkeypatch.delenv(TIMEOUT_VARIABLE, raising=False)
    monkeypatch.setattr("pipeline.tracking.mlflow.client.TIMEOUTS", (1, 40))
    monkeypatch.setattr("pipeline.tracking.tracker.SYNC_PATIENCE", 0.1)
    have: list[str] = []

    class Taking:
        def deliver(self, entries: Sequence[Entry]) -> Iterator[Sent]:
            have.extend(entry.key for entry in entries)
            yield Sent(entries)

        def forget(self) -> None:
            pass

    outbox = Outbox(tmp_path / FILE)
    outbox.append("row", {}, 1)
    outbox.close()
    other = FlushLock(tmp_path)
    assert other.__enter__()
    threading.Timer(0.8, other.__exit__).start()
    assert sync(tmp_path, sink=Taking()) == (0, None)
    assert have == ["row"]


@pytest.mark.fault("F10")
def test_ending_never_waits_for_a_tracker_that_hangs(tmp_path: Path) -> None:
    hang, over = threading.Event(), threading.Event()

    class Hanging:
        def deliver(self, entries: Sequence[Entry]) -> Iterator[Sent]:
            hang.wait(240)
            over.set()
            yield Sent(entries)

        def forget(self) -> None:
            pass

    outbox = Outbox(tmp_path / FILE)
    outbox.append("a", {}, 1)
    tracker = Tracker(tmp_path, outbox, uri=None, experiment=EXPERIMENT, sink=Hanging())
    tracker.start()
    assert tracker.close(1.0) == 1
    assert not over.is_set()
    outbox.close()
    hang.set()


@pytest.mark.fault("F2")
def test_half_made_store_is_made_anew(
    tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill during the first migrations leaves a staged file, never a store that cannot be migrated any more."""
    (tmp_path / f".{LOCAL_DB}.123").write_bytes(b"half")
    import mlflow.store.tracking.sqlalchemy_store as store

    class Quick:
        def __init__(self, uri: str, root: str) -> None:
            shutil.copyfile(empty_store, uri.removeprefix("sqlite:///"))

        def _dispose_engine(self) -> None:
            pass

    monkeypatch.setattr(store, "SqlAlchemyStore", Quick)
    make_local_store(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LOCAL_DB]


@pytest.mark.fault("F12")
def test_client_neither_retries_nor_follows_nor_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conditions of exactly-once delivery and of a clean standard output."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "7")
    guard_environment()
    from mlflow import environment_variables as settings

    assert settings.MLFLOW_HTTP_REQUEST_MAX_RETRIES.get() == 0
    assert settings.MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT.get() is True
    assert settings.MLFLOW_ALLOW_PICKLE_DESERIALIZATION.get() is False
    assert os.environ["MLFLOW_ALLOW_HTTP_REDIRECTS"] == "false"
    assert not logging.getLogger("mlflow.store.db.utils").isEnabledFor(logging.ERROR)


@pytest.mark.fault("F10")
def test_sync_that_runs_out_of_time_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has failed then: a busy machine takes longer than `report` waits."""
    Outbox(tmp_path / FILE).close()
    monkeypatch.setattr(Tracker, "start", lambda self: None)
    monkeypatch.setattr(Tracker, "close", lambda self, *_: 3)
    assert sync(tmp_path, timeout=20) == (3, "it took longer than 20 s; what is left can be delivered later")


def test_broken_outbox_never_stops_a_study(tmp_path: Path) -> None:
    study = finished_study(tmp_path, strategies=("zero_shot",))
    outbox = study.outbox()
    tracker = Tracker(tmp_path, outbox, uri=None, experiment=EXPERIMENT)
    outbox.close()
    recorder = study.tell(outbox)
    tracker.start()
    assert tracker.close(1) == 1
    assert "outbox" in str(recorder.last_error) and "outbox" in str(tracker.last_error)


def test_password_in_the_address_is_refused_and_never_shown(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        Tracker(tmp_path, Outbox(tmp_path / FILE), uri="https://ann:s3cret@host/x", experiment=EXPERIMENT)
    assert "s3cret" not in str(caught.value)


def test_ui_is_local_and_opens_on_the_studys_runs(undisturbed: Tracked) -> None:
    command = ui_command(undisturbed.out, port=5555)
    assert "127.0.0.1" in command and local_uri(undisturbed.out) in command
    address = "http://127.0.0.1:5555/temporal-merge?experiment=1"
    assert ui_url(undisturbed.out, port=5555) == address


def test_ui_and_sync_of_a_directory_without_a_run_say_so(tmp_path: Path) -> None:
    for call in (ui_command, sync):
        with pytest.raises(ConfigError, match=r"outbox\.db"):
            call(tmp_path)


def test_tracking_modules_do_not_import_mlflow_before_it_is_needed() -> None:
    code = "import pipeline.tracking.tracker, pipeline.tracking.recorder, sys; sys.exit('mlflow' in sys.modules or 'torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ}, timeout=60).returncode == 0
    )
