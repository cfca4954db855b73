"""Nodes that fail, are cut off and come back, and a head that is lost: on three real raylets of one machine.

Nodes are declared dead after seconds instead of Ray's minute; nothing else differs from a cluster of several machines.
"""

import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster as Nodes

from tests.faults.harness import Faults, created, must_be_same, must_go_on, process_facts, wait_until
from tests.world import World, start

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(400)]
Record = Any
HEALTH = {"health_check_period_ms": 500, "health_check_timeout_ms": 1000, "health_check_failure_threshold": 3}


@contextmanager
def three_nodes() -> Iterator[Nodes]:
    """A head without CPUs and two nodes of one CPU each, ended after the test."""
    nodes = Nodes(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": 80 * 2**20, "_system_config": HEALTH},
    )
    try:
        for _ in range(2):
            _add(nodes)
        nodes.wait_for_nodes()
        yield nodes
    finally:
        for node in nodes.list_all_nodes():
            with suppress(OSError):
                os.kill(_raylet(node), signal.SIGCONT)
        with suppress(Exception):
            nodes.shutdown()


def _add(nodes: Nodes) -> None:
    nodes.add_node(num_cpus=1, object_store_memory=80 * 2**20)


def _remove_all(nodes: Nodes) -> None:
    """Remove every node but the head, as if its machine had failed."""
    for node in [node for node in nodes.list_all_nodes() if node is not nodes.head_node]:
        nodes.remove_node(node, allow_graceful=False)


def _run(nodes: Nodes, study: Path, out: Path, faults: Faults | None = None) -> Any:
    return start(
        "run", study, "--out", out, "--address", nodes.address, faults=faults.placed if faults else None
    )


def _raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def _node_of(nodes: Nodes, marker: Path) -> tuple[Any, int]:
    """The node and the process that a fault stopped."""
    wait_until(lambda: marker.exists() and marker.read_text(), "no expert reached its fault")
    pid = int(marker.read_text())
    parent = int(process_facts(pid)[1])
    found = [node for node in nodes.list_all_nodes() if _raylet(node) == parent]
    assert found, f"{_title(pid)} was stopped; its parent {_title(parent)} is no node's raylet"
    return found[0], pid


def _title(pid: int) -> str:
    """The title of a process, for messages."""
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:200]


def _is_alive(pid: int) -> bool:
    try:
        return process_facts(pid)[0] not in "ZX"
    except OSError:
        return False


def _finish(process: Any, code: int = 0) -> str:
    said = process.communicate(timeout=240)[1]
    assert process.returncode == code, said
    return str(said)


@pytest.mark.fault("F6")
def test_node_that_dies_under_an_expert_leaves_it_to_another_node(
    world: World, undisturbed: Path, tmp_path: Path, record_property: Record
) -> None:
    out, faults = tmp_path / "out", Faults(tmp_path).at("train.after_step", nth=5, do="spin")
    with three_nodes() as nodes:
        process = _run(nodes, world.study(), out, faults)
        node, pid = _node_of(nodes, faults.markers[0])
        began = time.monotonic()
        nodes.remove_node(node, allow_graceful=False)
        owners = list((out / "scratch").glob("*/owner"))
        wait_until(lambda: not _is_alive(pid), "the worker outlived its node")
        before = {path: path.stat().st_mtime_ns for path in owners if path.exists()}
        took = wait_until(lambda: _begun_anew(out, before), "the expert did not begin elsewhere")
        record_property("begun elsewhere after", f"{time.monotonic() - began:.0f} s")
        assert took < 60
        assert "trying again" in _finish(process)
    must_be_same(out, undisturbed)


def _begun_anew(out: Path, before: dict[Path, int]) -> bool:
    """Whether a worker has claimed one of the jobs again, or finished it."""
    return any(not path.exists() or path.stat().st_mtime_ns != stamp for path, stamp in before.items())


@pytest.mark.fault("F6")
def test_study_without_any_node_left_waits_for_one_and_goes_on_when_it_comes(
    world: World, undisturbed: Path, tmp_path: Path
) -> None:
    out, faults = tmp_path / "out", Faults(tmp_path).at("train.after_step", nth=5, do="spin")
    with three_nodes() as nodes:
        process = _run(nodes, world.study(), out, faults)
        _node_of(nodes, faults.markers[0])
        _remove_all(nodes)
        time.sleep(12)
        assert process.poll() is None, process.communicate()[1]
        _add(nodes)
        _finish(process)
    must_be_same(out, undisturbed)


@pytest.mark.fault("F6")
def test_study_that_no_node_can_take_ends_with_what_it_wants(
    world: World, tmp_path: Path, record_property: Record
) -> None:
    out, faults = tmp_path / "out", Faults(tmp_path).at("train.after_step", nth=5, do="spin")
    with three_nodes() as nodes:
        process = _run(nodes, world.study(), out, faults)
        _node_of(nodes, faults.markers[0])
        began = time.monotonic()
        _remove_all(nodes)
        said = _finish(process, 2)
        record_property("no place is told after", f"{time.monotonic() - began:.0f} s")
    assert re.search(r"an expert .* needs .*1 CPU.* do not fit into", said), said


@pytest.mark.fault("F7")
@pytest.mark.parametrize("point", ["train.after_step", "store.before_record"])
def test_partitioned_node_that_wakes_late_changes_nothing(
    point: str, world: World, undisturbed: Path, tmp_path: Path, record_property: Record
) -> None:
    out, faults = tmp_path / "out", Faults(tmp_path).at(point, do="stop")
    # The base is committed already, so the first process that commits is a worker: driver and mergers have nothing to commit.
    shutil.copytree(undisturbed / "store" / "base", out / "store" / "base")
    with three_nodes() as nodes:
        process = _run(nodes, world.study(), out, faults)
        node, pid = _node_of(nodes, faults.markers[0])
        os.kill(_raylet(node), signal.SIGSTOP)
        began, done = time.monotonic(), len(created(out))
        wait_until(lambda: len(created(out)) > done + 2, "no other node takes the steps")
        record_property("steps go on elsewhere after", f"{time.monotonic() - began:.0f} s")
        before = created(out)
        os.kill(pid, signal.SIGCONT)
        time.sleep(1)
        os.kill(_raylet(node), signal.SIGCONT)
        _finish(process)
        assert before.items() <= created(out).items(), "the late one committed over what was there"
        wait_until(lambda: not _is_alive(pid), "the worker of the lost node still runs")
    must_be_same(out, undisturbed)


@pytest.mark.fault("F9")
def test_head_that_dies_ends_the_driver_and_a_new_cluster_goes_on(
    world: World, undisturbed: Path, tmp_path: Path, record_property: Record
) -> None:
    out = tmp_path / "out"
    with three_nodes() as nodes:
        process = _run(nodes, world.study(), out)
        wait_until(lambda: len(created(out)) >= 3, "no steps end")
        began = time.monotonic()
        nodes.head_node.kill_gcs_server()
        said = _finish(process, 1)
        record_property("cluster lost is told after", f"{time.monotonic() - began:.0f} s")
        assert "cluster lost: its head at" in said
    with three_nodes() as nodes:
        must_go_on(world.study(), out, undisturbed, nodes.address)
