"""Where the advised model is: its path, digest, and commands that work with it."""

import shlex
import subprocess
import sys
from pathlib import Path

from pipeline.plan.file import write
from pipeline.report.sources import Studied
from pipeline.report.winner import command_of, winner_of
from pipeline.results.over_time import results
from tests.pipeline.tracked_study import finished_study


def finished(out: Path) -> Studied:
    study = finished_study(out, strategies=("zero_shot", "best_in_time"))
    found = Studied(out, study.plan, {}, {study.base.fingerprint: study.base, **study.records})
    return Studied(out, study.plan, results(study.plan, Records(found)), found.records)


class Records:
    def __init__(self, studied: Studied) -> None:
        self._known = studied.records

    def record(self, kind: str, fingerprint: str):  # type: ignore[no-untyped-def]
        return self._known.get(fingerprint)


def test_winner_is_where_the_page_says_and_can_be_exported_as_shown(tmp_path: Path) -> None:
    studied = finished(tmp_path / "out")
    write(studied.plan, studied.out / "plan.json")
    found = winner_of(studied, "best_in_time")
    assert found is not None and (found.t, found.task) == (3, "photos_b")
    assert (Path(found.directory) / "open_clip_model.safetensors").is_file()
    ways = dict(found.ways)
    assert list(ways) == ["Load", "Export", "Score again"] and f"local-dir:{found.directory}" in ways["Load"]
    words = shlex.split(ways["Export"])
    assert words[0] == "temporal-merge"
    subprocess.run([sys.executable, "-m", "pipeline.cli", *words[1:]], check=True, cwd=tmp_path)
    assert (tmp_path / "exported-model" / "open_clip_model.safetensors").is_file()


def test_winner_that_mlflow_has_registered_can_be_served(tmp_path: Path) -> None:
    study = finished(tmp_path / "out")
    (study.out / "mlflow.db").touch()
    best, other = ("best_in_time", "zero_shot")
    served = [dict(winner_of(study, name).ways).get("Serve") for name in (best, other)]  # type: ignore[union-attr]
    assert sum(way is not None for way in served) == 1
    assert any(
        way and f"sqlite:///{study.out}/mlflow.db" in way and "models:/demo@best" in way for way in served
    )


def test_strategy_that_serves_the_base_wins_with_the_base(tmp_path: Path) -> None:
    study = finished(tmp_path / "out")
    found = winner_of(study, "zero_shot")
    assert found is not None and found.sha256 == found.base_sha256


def test_study_without_records_has_no_winner_to_fetch(tmp_path: Path) -> None:
    study = finished(tmp_path / "out")
    assert winner_of(Studied(study.out, study.plan, study.answer), "best_in_time") is None


def test_command_that_made_a_study_names_what_run_takes(tmp_path: Path) -> None:
    assert command_of(Path("runs/demo")) == "temporal-merge run runs/demo/study.yaml --out runs/demo"
