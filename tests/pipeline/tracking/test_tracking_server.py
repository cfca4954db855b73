"""A tracking server with authentication: the same content as in sqlite, with credentials from the environment alone."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.tracking.mlflow.export import export
from pipeline.tracking.tracker import Tracker
from tests.pipeline.tracked_study import MODEL_FILES, Tracked, finished_study
from tests.servers import serving

USER, PASSWORD = "ann", "a-long-password-for-tests"
EXPERIMENT = "tests"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """MLflow's own server with basic authentication, artifacts served by it; its address."""
    home = tmp_path_factory.mktemp("server")
    settings = home / "auth.ini"
    settings.write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{home}/auth.db\nadmin_username = {USER}\n"
        f"admin_password = {PASSWORD}\nauthorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    environment = {
        **os.environ,
        "MLFLOW_AUTH_CONFIG_PATH": str(settings),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "for-tests",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }

    def command(port: int) -> list[str]:
        return [
            *(sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{home}/mlflow.db", "--artifacts-destination", str(home / "artifacts")),
            *("--host", "127.0.0.1", "--port", str(port)),
        ]  # fmt: skip

    with serving(command, home, environment) as port:
        yield f"http://127.0.0.1:{port}"


def deliver(study: Tracked, uri: str) -> tuple[int, str | None]:
    outbox = study.outbox()
    study.tell(outbox)
    tracker = Tracker(study.out, outbox, uri=uri, experiment=EXPERIMENT)
    tracker.start()
    pending = tracker.close(90)
    outbox.close()
    return pending, tracker.last_error


@pytest.mark.slow
def test_study_reaches_a_server_that_asks_who_is_there(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = finished_study(tmp_path / "study", strategies=("best_in_time",), tasks=("animals",))
    pending, why = deliver(study, server)
    assert pending > 0 and why is not None, "nobody gets in without a password"
    assert PASSWORD not in why

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    assert deliver(study, server) == (0, None)
    told = export(server, EXPERIMENT)
    models = {item["name"]: item for item in told if "model" in item}
    assert models["best_in_time-t1-animals"]["artifacts"] == MODEL_FILES
    (version,) = [item for item in told if "registered" in item]
    assert (version["name"], version["of"], version["aliases"]) == ("demo/1", "best_in_time/t1", ["best"])
    assert PASSWORD.encode() not in (study.out / "outbox.db").read_bytes()
