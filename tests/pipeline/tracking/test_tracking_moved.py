"""OUT that is moved or copied: MLflow's addresses name the artifacts in it, and no others."""

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.tracking.mlflow.local import LOCAL_ARTIFACTS, LOCAL_DB, follow_home, local_uri
from pipeline.tracking.tracker import FlushLock, sync, ui_command
from tests.pipeline.tracked_study import Tracked, deliver, exported

WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture
def study(make_study: Callable[..., Tracked]) -> Tracked:
    """A delivered study at a place that addresses must quote."""
    made = make_study("before 100%/ü", tasks=("animals",))
    outbox = made.outbox()
    made.tell(outbox)
    assert deliver(made, outbox) is None
    outbox.close()
    return made


def places(out: Path) -> list[str]:
    """Every text in the tracking store of `out` that names a place below one called mlartifacts."""
    found = []
    with sqlite3.connect(out / LOCAL_DB) as db:
        for (table,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            for row in db.execute(f'SELECT * FROM "{table}"'):
                found += [text for text in row if isinstance(text, str) and f"/{LOCAL_ARTIFACTS}" in text]
    return found


def at(study: Tracked, out: Path) -> Tracked:
    """The study at its new place, as another process sees it: MLflow's client remembers places for the life of its process."""
    from mlflow.tracking._tracking_service.utils import _artifact_repos_cache

    _artifact_repos_cache.clear()
    return Tracked(out, study.plan, study.base, study.records, study.facts)


def loaded(out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", local_uri(out))
    return Path(mlflow.artifacts.download_artifacts("models:/demo@best"))


@pytest.mark.parametrize("how", [sync, ui_command], ids=["sync", "ui"])
def test_after_a_move_every_address_names_the_new_place(
    study: Tracked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, how: Callable[[Path], Any]
) -> None:
    before, after = exported(study), tmp_path / "after"
    study.out.rename(after)
    how(after)
    assert str(after) in capsys.readouterr().err
    assert len(places(after)) > 5 and all(text.startswith(f"{after.as_uri()}/") for text in places(after))
    assert exported(at(study, after)) == before
    assert (loaded(after, monkeypatch) / WEIGHTS).is_file()
    capsys.readouterr()  # MLflow may show how far a download is
    how(after)
    assert capsys.readouterr().err == "", "it is said once"


def test_copy_that_runs_on_beside_the_original_has_artifacts_of_its_own(
    study: Tracked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(study.out, copy)
    assert sync(copy) == (0, None)
    for out in (study.out, copy):
        outbox = at(study, out).outbox()
        outbox.append("more", {"op": "artifact", "plan": study.plan.fingerprint, "run": "study", "name": "more.txt",
                               "text": out.name, "path": None, "sha256": ""}, 1)  # fmt: skip
        outbox.close()
        assert sync(out) == (0, None)
        assert [path.read_text() for path in (out / LOCAL_ARTIFACTS).rglob("more.txt")] == [out.name]
        assert all(text.startswith(f"{out.as_uri()}/") for text in places(out))
    shutil.rmtree(study.out)
    assert (loaded(copy, monkeypatch) / WEIGHTS).is_file()


def test_moved_study_that_waits_for_delivery_is_delivered(
    make_study: Callable[..., Tracked], tmp_path: Path
) -> None:
    study = make_study("half", tasks=("animals",))
    outbox = study.outbox()
    study.tell(outbox, finish=False)
    assert deliver(study, outbox) is None
    study.tell(outbox)
    outbox.close()
    study.out.rename(tmp_path / "after")
    assert sync(tmp_path / "after") == (0, None)


def test_places_that_were_never_this_stores_own_stay(study: Tracked, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(local_uri(study.out))
    theirs = [f"{study.out.as_uri()}/{LOCAL_ARTIFACTS}-more/1", "s3://bucket/x", "file:///data/mlartifacts/7"]
    for number, place in enumerate(theirs):
        client.create_run(client.create_experiment(str(number), place))
    study.out.rename(tmp_path / "after")
    assert follow_home(tmp_path / "after") == str(study.out)
    client = MlflowClient(local_uri(tmp_path / "after"))
    assert [client.get_experiment_by_name(str(n)).artifact_location for n in range(3)] == theirs
    assert follow_home(tmp_path / "after") is None


def test_store_that_another_process_delivers_to_is_left_to_it(study: Tracked, tmp_path: Path) -> None:
    """The same OUT under two names, as in a container and on its host: the process that works on it decides."""
    study.out.rename(tmp_path / "after")
    before = places(tmp_path / "after")
    with FlushLock(tmp_path / "after") as held:
        assert held
        ui_command(tmp_path / "after")
    assert places(tmp_path / "after") == before
