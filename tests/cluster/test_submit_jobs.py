"""Jobs of a real head with its dashboard: one per study for any number of clients, clients that leave, exit codes, tokens."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.submission import Cluster as Remote
from pipeline.run.submit import _why, shipment
from tests.cluster.test_submit import MODULE
from tests.world import ROOT, STRATEGIES, Cluster, World, command

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    warm = Cluster(tmp_path_factory.mktemp("head"), dashboard=True)
    yield warm
    warm.stop()


def start(*arguments: Any) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "pipeline.cli", *map(str, arguments)]
    return subprocess.Popen(argv, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def state_at_the_end(head: Cluster, name: str) -> str:
    for _ in range(240):
        job = Remote(head.dashboard).job(name)
        if job.ended:
            return job.state
        time.sleep(0.25)
    raise AssertionError(f"{name} does not end")


def test_long_study_is_one_job_whoever_submits_watches_leaves_or_ends_it(
    world: World, head: Cluster, tmp_path: Path
) -> None:
    study, out = world.study(budget={"steps_per_task": 100_000}), tmp_path / "out"
    where = ("--address", head.dashboard, "--out", out)
    racers = [start("submit", study, *where, "--no-wait", "--json") for _ in range(3)]
    answers = [json.loads(racer.communicate(timeout=120)[0]) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    assert len({answer["job"] for answer in answers}) == 1 and answers[0]["job"].endswith(".1")
    assert sorted(answer["attached"] for answer in answers) == [False, True, True]
    assert answers[0]["exit_code"] is None

    other = command("submit", study, *where, "--set", "recipe.lr=0.5")
    assert other.returncode == 2 and "with another version of the study tiny" in other.stderr

    watcher = start("submit", study, *where)
    assert watcher.stdout is not None
    first = next(line for line in watcher.stdout if "trajectories; steps:" in line)
    assert first.startswith("tiny: ")
    watcher.send_signal(signal.SIGINT)
    _, errors = watcher.communicate(timeout=60)
    assert watcher.returncode == 130 and "goes on without this client" in errors
    assert f"temporal-merge stop {out}" in errors

    status = json.loads(command("status", out, "--address", head.dashboard, "--json").stdout)
    assert (status["state"], status["job"]["state"]) == ("running", "running")

    waiting = start("submit", study, *where, "--json")
    assert waiting.stderr is not None and "attached" in waiting.stderr.readline()
    assert command("stop", out, "--address", head.dashboard).returncode == 0
    assert state_at_the_end(head, answers[0]["job"]) == "stopped"
    said, errors = waiting.communicate(timeout=60)
    assert (json.loads(said)["exit_code"], waiting.returncode) == (1, 1) and "submit again to go on" in errors
    again = command("stop", out, "--address", head.dashboard)
    assert again.returncode == 2 and "no job" in again.stderr


def test_mistake_that_only_the_cluster_can_see_ends_with_two_and_a_later_attempt_is_a_new_job(
    world: World, head: Cluster, tmp_path: Path
) -> None:
    study = world.study(data={"root": str(tmp_path / "nowhere"), "pretraining": ["grey"], "held_out": []})
    where = ("--address", head.dashboard, "--out", tmp_path / "out")
    answer = command("submit", study, *where, "--json")
    assert answer.returncode == 2, answer.stderr
    assert json.loads(answer.stdout)["job"].endswith(".1")
    assert "nowhere" in answer.stderr and "with paths of the cluster" in answer.stderr
    again = command("submit", study, *where, "--no-wait")
    assert again.returncode == 0 and again.stdout.strip().endswith(".2")
    status = command("status", tmp_path / "elsewhere", "--address", head.dashboard)
    assert status.returncode == 2 and "holds no run" in status.stderr


def test_study_with_a_module_of_the_users_own_runs_on_a_cluster_that_has_no_such_file(
    undisturbed: Path, world: World, head: Cluster, tmp_path: Path
) -> None:
    module, out = tmp_path / "halved_here.py", tmp_path / "out"
    module.write_text(MODULE)
    shutil.copytree(undisturbed, out)
    strategy = {"init": "base", "deploy": "all", "technique": "halved_here"}
    study = world.study(grid={"strategies": [*STRATEGIES, strategy]})
    where = ("--address", head.dashboard, "--out", out)
    without = command("submit", study, *where)
    assert without.returncode == 2 and "halved_here" in without.stderr
    answer = command("submit", study, *where, "--module", module)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    made = [json.loads(one.read_text())["spec"] for one in (out / "store" / "merge").glob("*/record.json")]
    sources = {spec.get("source") for spec in made if spec["technique"] == "halved_here"}
    assert sources == {hashlib.sha256(MODULE.encode()).hexdigest()}


@pytest.mark.fault("F28")
def test_job_runs_the_code_that_was_sent(head: Cluster) -> None:
    with shipment() as room:
        job, said = Remote(head.dashboard).answer(
            "where", "python -c 'import pipeline; print(pipeline.__file__)'", room
        )
    assert job.exit_code == 0 and "/working_dir_files/_ray_pkg_" in said


@pytest.mark.fault("F27")
def test_wrong_token_is_refused_and_never_shown(world: World, head: Cluster, tmp_path: Path) -> None:
    secret = "0123456789abcdef" * 4
    argv = ["submit", str(world.study()), "--address", head.dashboard, "--out", str(tmp_path / "out")]
    answer = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *argv],
        cwd=ROOT, text=True, capture_output=True, env=os.environ | {"RAY_AUTH_TOKEN": secret}, timeout=60,
    )  # fmt: skip
    assert answer.returncode == 2 and "refuses this machine's token" in answer.stderr
    assert secret not in answer.stderr + answer.stdout and len(answer.stderr.splitlines()) == 1


def test_waiting_for_nodes_ends_when_they_are_there_and_says_when_they_do_not_come(head: Cluster) -> None:
    for nodes, code, text in (("1", 0, ""), ("2", 1, "error: 1 of 2 nodes have joined")):
        argv = [sys.executable, "-m", "cluster.joined", head.address, nodes, "1"]
        answer = subprocess.run(argv, cwd=ROOT, text=True, capture_output=True, timeout=60)
        assert answer.returncode == code and text in answer.stderr


def test_job_whose_node_lacks_packages_says_what_to_install(head: Cluster, tmp_path: Path) -> None:
    job, _ = Remote(head.dashboard).answer("lacks", "python -c 'import no_such_package'", tmp_path)
    assert job.exit_code == 1 and "have temporal-merge's dependencies" in _why(job)
