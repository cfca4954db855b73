"""Where the advised model is: its path, digest, and commands that work with it."""

import math
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.plan.file import write
from pipeline.report.sources import Studied
from pipeline.report.winner import command_of, weight_to_try, winner_of
from pipeline.results.ema_weight import MEASURED
from pipeline.results.over_time import results
from tests.pipeline.tracked_study import finished_study


def finished(
    out: Path,
    strategies: Sequence[Any] = ("zero_shot", "best_in_time"),
) -> Studied:
    study = finished_study(out, strategies=strategies)
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


def expit(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def drifting(out: Path, drift: float | None, *strategies: object) -> Studied:
    """A study of such strategies whose experts all drift so far."""
    study = finished(out, strategies)
    moved = {
        name: replace(one, result={**one.result, "relative_drift": drift}) if one.kind == "train" else one
        for name, one in study.records.items()
    }
    return replace(study, records=moved)


THIRDS = {"pretraining": 0.33, "update": 0.34, "buffer": 0.33}
BEST = {"preset": "best_in_time", "mixture": THIRDS}
REPLAYED = ("zero_shot", "continual_finetuning", "continual_finetuning_replay", BEST)


def test_weight_to_try_is_that_of_the_drift_and_the_replay(tmp_path: Path) -> None:
    study = drifting(tmp_path / "out", 0.02, *REPLAYED)
    weight = expit(MEASURED.constant + MEASURED.by_drift * math.log10(0.02) + MEASURED.by_share * 0.66)
    replayed = [one.id for one in study.plan.trajectories if one.init == "ema"]
    for name in (*replayed, "continual_finetuning_replay"):
        said = weight_to_try(study, name)
        assert f"weight of {weight:.2f}" in said and "(0.020 of" in said and "replay (0.66)" in said
    without = expit(MEASURED.constant + MEASURED.by_drift * math.log10(0.02))
    assert f"weight of {without:.2f}" in weight_to_try(study, "continual_finetuning")
    assert weight_to_try(study, "zero_shot") == ""


def test_no_weight_is_stated_that_was_not_measured_or_is_there_already(tmp_path: Path) -> None:
    near = round(MEASURED.weight(0.02, 0.66), 1)
    strategies = ("continual_finetuning_replay", {**BEST, "params": {"weight": near}})
    assert weight_to_try(drifting(tmp_path / "there", 0.02, *strategies), "continual_finetuning_replay") == ""
    for name, drift in (("far", 0.2), ("still", 0.0), ("older", None)):
        study = drifting(tmp_path / name, drift, *REPLAYED)
        assert weight_to_try(study, "continual_finetuning_replay") == "", name
    alone = drifting(tmp_path / "alone", 0.02, BEST)  # nothing was fine-tuned
    assert weight_to_try(alone, alone.plan.trajectories[0].id) == ""


@pytest.mark.parametrize(
    ("mixture", "stated"),
    [
        ({"pretraining": 0.1, "update": 0.8, "buffer": 0.1}, True),
        ({"pretraining": 0.2, "update": 0.8}, False),
        ({"update": 0.8, "buffer": 0.2}, False),
        ({"pretraining": 0.45, "update": 0.1, "buffer": 0.45}, False),
    ],
    ids=["half and half", "pool alone", "buffer alone", "more than was measured"],
)
def test_weight_is_stated_for_replay_as_the_study_had_it(
    tmp_path: Path, mixture: dict[str, float], stated: bool
) -> None:
    study = drifting(tmp_path / "out", 0.02, {"preset": "continual_finetuning", "mixture": mixture})
    (only,) = study.plan.trajectories
    assert bool(weight_to_try(study, only.id)) is stated
