"""A submitted study on two nodes, from start to end, with a client that is killed; it can be run by hand.

    python -m tests.cluster.two_nodes            (as root; about two minutes)

A study is submitted from a third machine, which is then killed, and a new client attaches to the same job. Experts run
on both nodes. Every checkpoint and score equals, bit for bit, that of an ordinary local run. One worker is suspended
until the new client is attached, so that the job cannot end before, however fast the nodes are.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline.run.trace import read_timeline
from tests.cluster.nodes import DASHBOARD, NEEDS, TwoNodes, possible, two_nodes
from tests.faults.harness import process_facts, wait_until
from tests.world import artifacts, command, make_world


def scenario(home: Path) -> dict[str, Any]:
    """Run everything in `home` and return what was observed. Raises AssertionError at the first deviation."""
    began = time.monotonic()
    world = make_world(home)
    seat = home / "seat"  # the client's working directory: the model is named relative to it, and sent
    (seat / "models").mkdir(parents=True)
    shutil.copy(home / "model.json", seat / "models" / "tiny.json")
    study = world.study(
        model={"config": "models/tiny.json", "pretrained": None},
    )
    out, local = home / "shared" / "out", home / "local"
    seen: dict[str, Any] = {}
    suspended = home / "suspended"
    second_expert = {"train.start": {"at": 2, "do": "stop", "marker": str(suspended)}}
    with two_nodes(home, {"TEMPORAL_MERGE_FAULTS": json.dumps(second_expert)}) as nodes:
        seen["seconds_to_start"] = round(time.monotonic() - began, 1)
        seen["killed_after"] = _submit_and_die(nodes, seat, study, out)
        status = _ask(nodes, seat, "status", out, "--address", DASHBOARD, "--json")
        assert status["job"]["state"] == "running", status
        seen["job"], seen["steps_done_at_kill"] = status["job"]["id"], status["steps"]["done"]
        answer = _attach(nodes, seat, study, out, suspended)
        assert answer["attached"] and answer["job"] == seen["job"] and answer["exit_code"] == 0, answer
        seen["expert_nodes"] = _expert_nodes(out)
    seen["seconds_on_cluster"] = round(time.monotonic() - began, 1)
    assert len(seen["expert_nodes"]) == 2, seen
    alone = command("run", study, "--out", local, "--address", "local", cwd=seat)
    assert alone.returncode == 0, alone.stderr
    mine, theirs = artifacts(local), artifacts(out)
    assert mine == theirs and mine, "artifacts differ"
    assert _results(local) == _results(out)
    return seen | {"identical_artifacts": len(mine), "seconds": round(time.monotonic() - began, 1)}


def _submit_and_die(nodes: TwoNodes, seat: Path, study: Path, out: Path) -> str:
    """Submit, wait for the first finished step, and kill the client. Returns the line of that step."""
    client = nodes.client(
        "submit",
        study,
        "--address",
        DASHBOARD,
        "--out",
        out,
        cwd=seat,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    lines = []
    assert client.stdout is not None
    for line in client.stdout:
        lines.append(line)
        if line.startswith("["):
            client.send_signal(signal.SIGKILL)
            client.wait(20)
            return line.strip()
    raise AssertionError(f"the study ended before the client could be killed: {''.join(lines)[-3000:]}")


def _attach(nodes: TwoNodes, seat: Path, study: Path, out: Path, suspended: Path) -> Any:
    """Submit again, and resume the suspended worker once the client reports that it is attached. Returns the client's answer."""
    argv = ("submit", study, "--address", DASHBOARD, "--out", out, "--json")
    client = nodes.client(*argv, cwd=seat, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert client.stderr is not None
    first = client.stderr.readline()
    wait_until(lambda: suspended.exists() and suspended.read_text(), "no worker reached its second expert")
    pid = int(suspended.read_text())
    wait_until(lambda: process_facts(pid)[0] == "T", "the worker is not suspended")
    os.kill(pid, signal.SIGCONT)
    return _answer(client, f"{argv}: {first}")


def _ask(nodes: TwoNodes, seat: Path, *arguments: Any) -> Any:
    client = nodes.client(*arguments, cwd=seat, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return _answer(client, f"{arguments}: ")


def _answer(client: subprocess.Popen[str], what: str) -> Any:
    """The JSON that a client printed, after it has exited with 0; `what` names the client in errors."""
    try:
        said, errors = client.communicate(timeout=240)
    except BaseException:
        client.kill()
        raise
    assert client.returncode == 0, f"{what}{said}{errors}"
    return json.loads(said)


def _expert_nodes(out: Path) -> list[str]:
    """The nodes that trained experts, from the timeline of the run."""
    return sorted({row["node"] for row in read_timeline(out) if row.get("kind") == "train"})


def _results(out: Path) -> Any:
    answer = json.loads((out / "results.json").read_text())
    for trajectory in answer["trajectories"]:
        for step in trajectory["steps"]:
            step.pop("merge_seconds", None)
    return answer


if __name__ == "__main__":
    if not possible():
        sys.exit(NEEDS)
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(scenario(Path(directory)), indent=2))
