"""A study with a technique beside the user's program: workers find it, and its source is part of the identity of its merges."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.world import ROOT, STRATEGIES, Cluster, World

MODULE = """
import temporal_merge as tm

@tm.technique("halved", formula="scale · mean / 2")
def halved(xp, params, blocks):
    return sum(blocks) / len(blocks) / 2
"""
PROGRAM = """
import json, sys
import halved_techniques
import temporal_merge as tm

study = tm.load_study(sys.argv[1])
before = tm.plan(study, sys.argv[2])["steps"]["merge"]
if len(sys.argv) > 3:
    print(tm.run(study, sys.argv[2], sys.argv[3]).best()["trajectory"], file=sys.stderr)
print(json.dumps([before, tm.plan(study, sys.argv[2])["steps"]["merge"]]))
"""


def program(room: Path, *arguments: Any, text: str = PROGRAM) -> subprocess.CompletedProcess[str]:
    (room / "program.py").write_text(text)
    environment = os.environ | {"RAY_AUTH_MODE": "token", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(room / "program.py"), *map(str, arguments)],
        cwd=room, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


@pytest.mark.ray
@pytest.mark.slow
def test_study_runs_with_a_technique_beside_the_program_and_redoes_its_merges_when_it_changes(
    undisturbed: Path, world: World, cluster: Cluster, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    strategy = {"init": "base", "deploy": "all", "technique": "halved"}
    study = world.study(grid={"strategies": [*STRATEGIES, strategy]})
    (tmp_path / "halved_techniques.py").write_text(MODULE)
    answer = program(tmp_path, study, out, cluster.address)
    assert answer.returncode == 0, answer.stderr
    before, after = json.loads(answer.stdout.splitlines()[-1])
    assert before["unique"] - before["cached"] == 3, "one merge per task is new"
    assert after["cached"] == after["unique"]

    (tmp_path / "halved_techniques.py").write_text(MODULE.replace("/ 2\n", "/ 2.0\n"))
    changed = program(tmp_path, study, out)
    assert changed.returncode == 0, changed.stderr
    assert json.loads(changed.stdout)[0]["cached"] == before["cached"], "the same merges are to do again"


@pytest.mark.ray
def test_technique_written_in_the_program_is_refused_before_anything_starts(
    world: World, tmp_path: Path
) -> None:
    study = world.study(grid={"strategies": [{"init": "base", "deploy": "all", "technique": "halved"}]})
    text = MODULE + "\nimport sys\ntm.run(tm.load_study(sys.argv[1]), sys.argv[2])\n"
    answer = program(tmp_path, study, tmp_path / "out", text=text)
    assert answer.returncode == 1 and "written in the program itself" in answer.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
