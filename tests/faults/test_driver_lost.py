"""The driver is killed, interrupted, started twice, or has a wrong clock: the same command continues the run."""

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import (
    PATIENCE,
    Faults,
    created,
    must_be_same,
    must_go_on,
    run,
    wait_until,
    workers_of,
)
from tests.world import Cluster, World, start

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.chaos]
Record = Any


@pytest.mark.fault("F2", "F4")
@pytest.mark.parametrize("point", ["outbox.after_append", "tracking.after_send", "driver.after_commit"])
def test_driver_killed_between_its_own_writes_is_rerun_to_the_same(
    point: str, world: World, cluster: Cluster, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    answer = run(world.study(), out, cluster, Faults(tmp_path).at(point, nth=3))
    assert answer.returncode == -9, answer.stderr
    must_go_on(world.study(), out, undisturbed, cluster.address, cluster)


@pytest.mark.fault("F4")
def test_driver_killed_with_experts_running_leaves_no_orphans_and_trains_nothing_twice(
    world: World, cluster: Cluster, undisturbed: Path, tmp_path: Path, record_property: Record
) -> None:
    out, faults = tmp_path / "out", Faults(tmp_path)
    faults.at("train.after_ckpt", nth=2, pid_file=str(out / "driver.json"))
    assert run(world.study(), out, cluster, faults).returncode == -9
    took = wait_until(lambda: not workers_of(cluster), "orphans live on")
    record_property("orphans gone after", f"{took:.1f} s")
    must_go_on(world.study(), out, undisturbed, cluster.address, cluster)


@pytest.mark.fault("F5")
def test_two_drivers_of_one_out_are_one_run_and_one_refusal(
    world: World, cluster: Cluster, undisturbed: Path, tmp_path: Path
) -> None:
    out, study = tmp_path / "out", world.study()
    one = start("run", study, "--out", out, "--address", cluster.address)
    time.sleep(0.2)
    two = start("run", study, "--out", out, "--address", cluster.address)
    told = {
        process.returncode: said for process in (one, two) for said in [process.communicate(timeout=200)[1]]
    }
    assert sorted(told) == [0, 2], told
    assert re.search(r"is being worked on by process \d+ on", told[2])
    must_be_same(out, undisturbed, cluster)


@pytest.mark.fault("F31")
@pytest.mark.parametrize(
    ("sent", "code", "done"),
    [
        ((signal.SIGTERM,), 143, 1),
        ((signal.SIGTERM,), 143, 2),
        ((signal.SIGINT,), 130, 2),
        ((signal.SIGINT, signal.SIGINT), 130, 2),
    ],
    ids=["terminated while it joins the cluster", "terminated", "interrupted", "interrupted twice"],
)
def test_driver_that_is_asked_to_end_does_so_and_the_rerun_finishes(
    sent: Any,
    code: int,
    done: int,
    world: World,
    cluster: Cluster,
    undisturbed: Path,
    tmp_path: Path,
    record_property: Record,
) -> None:
    out = tmp_path / "out"
    process = start("run", world.study(), "--out", out, "--address", cluster.address)
    wait_until(
        lambda: len(created(out)) >= done, "no step ends"
    )  # the base is committed before the cluster starts
    began = time.monotonic()
    for one in sent:
        process.send_signal(one)
        time.sleep(0.3)
    said = process.communicate(timeout=PATIENCE)[1]
    record_property("ended after", f"{time.monotonic() - began:.1f} s")
    assert process.returncode == code, said
    assert "Traceback" not in said, said
    wait_until(lambda: not workers_of(cluster), "workers of an ended run live on")
    must_go_on(world.study(), out, undisturbed, cluster.address, cluster)


@pytest.mark.fault("F31")
@pytest.mark.parametrize(
    ("sent", "everybody", "code"),
    [
        ((signal.SIGTERM,), False, 143),
        ((signal.SIGTERM, signal.SIGTERM), False, 143),
        ((signal.SIGTERM,), True, 143),
        ((signal.SIGHUP,), True, 129),
    ],
    ids=["terminated", "terminated twice", "terminated with all its processes", "its terminal closed"],
)
def test_run_on_its_own_ray_that_is_asked_to_end_after_a_step_ends_with_the_signals_code(
    sent: Any, everybody: bool, code: int, world: World, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start("run", world.study(), "--out", out, start_new_session=True)
    wait_until(lambda: len(created(out)) >= 2, "no step ends")
    for one in sent:
        (os.killpg if everybody else os.kill)(process.pid, one)
        time.sleep(0.3)
    said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == code, said
    assert f"ended: by {sent[0].name}" in said and "Traceback" not in said, said


@pytest.mark.fault("F32")
def test_clock_set_back_an_hour_and_then_forward_a_day_changes_nothing(
    world: World, cluster: Cluster, undisturbed: Path, tmp_path: Path
) -> None:
    out, study = tmp_path / "out", world.study()
    for shift, point in ((-3600, "driver.after_commit"), (86400, None)):
        site = tmp_path / f"clock{shift}"
        site.mkdir()
        (site / "sitecustomize.py").write_text(
            f"import time\n_time, _ns = time.time, time.time_ns\ntime.time = lambda: _time() + {shift}\n"
            f"time.time_ns = lambda: _ns() + {shift} * 10**9\n"
        )
        faults = Faults(tmp_path).at(point, nth=4).placed if point else None
        process = start(
            "run", study, "--out", out, "--address", cluster.address, faults=faults,
            environment={"PYTHONPATH": f"{site}:{Path(__file__).parents[2]}"},
        )  # fmt: skip
        said = process.communicate(timeout=200)[1]
        assert process.returncode == (-9 if point else 0), said
        wrote = json.loads((out / "driver.json").read_text())
        assert wrote["pid"] == process.pid
    must_be_same(out, undisturbed, cluster)


JUMPS = """
import os, time
_time, _ns, _steady, _began = time.time, time.time_ns, time.monotonic, time.monotonic()
_seen = set()

def _shift():
    jump = (0, -3600, 86400)[int((_steady() - _began) / 2) % 3]
    if jump not in _seen:
        _seen.add(jump)
        with open(os.environ["TEMPORAL_MERGE_JUMPS"], "a") as log:
            log.write(f"{os.getpid()} {jump}\\n")
    return jump

time.time = lambda: _time() + _shift()
time.time_ns = lambda: _ns() + _shift() * 10**9
"""
"""Every two seconds the clock of a process jumps: back by an hour, forward by a day, to the true time."""


@pytest.mark.fault("F32")
def test_clocks_that_jump_back_and_forward_in_mid_run_change_nothing(
    world: World, undisturbed: Path, tmp_path: Path, record_property: Record
) -> None:
    out, log = tmp_path / "out", tmp_path / "jumps"
    (tmp_path / "sitecustomize.py").write_text(JUMPS)
    jumping = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}", "TEMPORAL_MERGE_JUMPS": str(log)}
    cluster = Cluster(tmp_path, environment=jumping)
    try:
        process = start("run", world.study(), "--out", out, "--address", cluster.address, environment=jumping)
        said = process.communicate(timeout=250)[1]
        assert process.returncode == 0, said
        must_be_same(out, undisturbed, cluster)
    finally:
        cluster.stop()
    jumps = [line.split() for line in log.read_text().splitlines()]
    driver = {jump for pid, jump in jumps if int(pid) == process.pid}
    assert driver == {"0", "-3600", "86400"}, "the driver's clock did not jump"
    assert len({pid for pid, jump in jumps if jump != "0"}) > 1, "no worker's clock jumped"
    record_property("processes whose clocks jumped", str(len({pid for pid, jump in jumps if jump != "0"})))


@pytest.mark.fault("F14")
@pytest.mark.parametrize("point", ["store.after_stage", "store.before_record", "store.after_rename"])
def test_disk_that_fills_ends_the_run_and_the_rerun_is_the_same(
    point: str, world: World, cluster: Cluster, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    answer = run(world.study(), out, cluster, Faults(tmp_path).at(point, nth=3, do="full"))
    assert answer.returncode == 1, answer.stderr
    assert re.search(r"StorageFull: .*bytes are needed, [\d,]+ are free", answer.stderr), answer.stderr
    must_go_on(world.study(), out, undisturbed, cluster.address, cluster)
