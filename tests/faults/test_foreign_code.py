"""A cluster whose nodes have another version of this project, or other packages of the same names."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.code import PACKAGES
from tests.faults.harness import created
from tests.world import ROOT, Cluster, World, artifacts, command

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.chaos, pytest.mark.fault("F28")]


def _stale(place: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, place / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (place / "workers" / "actors.py").open("a") as source:
        source.write("# an older version\n")


def _decoys(place: Path) -> None:
    """An empty module for each of our modules: an editable install would look up missing ones in ours."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, place / package, ignore=shutil.ignore_patterns("__pycache__"))
        for source in (place / package).rglob("*.py"):
            source.write_text("")


@pytest.mark.parametrize("code", [_stale, _decoys])
def test_study_is_refused_before_any_step_by_workers_of_other_code(
    code: Any, world: World, tmp_path: Path
) -> None:
    place = tmp_path / "site"
    place.mkdir()
    code(place)
    other = Cluster(tmp_path, environment={"PYTHONPATH": str(place)})
    try:
        answer = command(
            "run", world.study(), "--out", tmp_path / "out", "--address", other.address, cwd=tmp_path
        )
    finally:
        other.stop()
    assert answer.returncode == 2, answer.stderr
    assert "install the same version on every node" in answer.stderr
    assert not [name for name in created(tmp_path / "out") if not name.startswith("base-")]


def test_study_runs_whatever_files_lie_in_the_current_directory(
    world: World, cluster: Cluster, undisturbed: Path, tmp_path: Path
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    for name in (*PACKAGES, "temporal_merge", "torch", "random", "types"):
        (here / f"{name}.py").write_text("raise SystemExit('a file of the current directory was imported')\n")
    (here / "safetensors").mkdir()
    (here / "safetensors" / "__init__.py").write_text("raise SystemExit('a folder was imported')\n")
    out = tmp_path / "out"
    command_line = ["run", world.study(), "--out", out, "--address", cluster.address]
    answer = subprocess.run(
        [sys.executable, "-P", "-m", "pipeline.cli", *map(str, command_line)], cwd=here,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert artifacts(out) == artifacts(undisturbed)
