"""Groups of several shapes on two nodes with fake GPUs: which group gets which devices, and which is dropped for another."""

import gc
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from cluster.capacity import Capacity, Shape
from cluster.pool import Call, Pool, Pools, WorkerLost, wait
from cluster.session import nodes_now
from tests.faults.harness import wait_until

pytestmark = pytest.mark.ray


class Recorder:
    """A worker that reports its node and its devices."""

    def where(self) -> tuple[str, str]:
        return ray.get_runtime_context().get_node_id(), os.environ.get("CUDA_VISIBLE_DEVICES", "")

    def work(self, seconds: float) -> dict[str, Any]:
        node, devices = self.where()
        began = time.time()
        time.sleep(seconds)
        return {"node": node, "devices": devices.split(","), "began": began, "ended": time.time(), "pid": os.getpid()}  # fmt: skip

    def hold(self, until: str) -> dict[str, Any]:
        """Work until a file is there."""
        while not os.path.exists(until):  # noqa: PTH110 - pickled by value
            time.sleep(0.01)
        return self.work(0.0)

    def die(self) -> None:
        os._exit(1)


@pytest.fixture(scope="module")
def nodes() -> Iterator[None]:
    """Two nodes with 4 CPUs and 4 GPUs each."""
    two = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 4, "num_gpus": 4, "include_dashboard": False}
    )
    two.add_node(num_cpus=4, num_gpus=4)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(address=two.address, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()
    two.shutdown()


@pytest.fixture
def pools(nodes: None) -> Iterator[Pools]:
    sizes = {"one": (1, 1, 1), "two": (1, 1, 2), "half": (1, 0.5, 0.5), "pair": (2, 1, 2), "wide": (2, 1, 4), "cpu": (1, 2, 0)}  # fmt: skip
    made = Pools(
        {
            name: Pool(name, Recorder, lambda actor, _: actor.remote(), Shape(world, cpus, gpus))
            for name, (world, cpus, gpus) in sizes.items()
        },
        Capacity(nodes_now()),
    )
    yield made
    made.close()


def start(pools: Pools, name: str, method: str = "work", *arguments: Any) -> Call | None:
    group = pools.group(name)
    return None if group is None else pools.by_name[name].call(method, *arguments, group=group)


def all_of(calls: list[Call]) -> list[dict[str, Any]]:
    answers, left = [], list(calls)
    while left:
        for call in wait(left, 30):
            left.remove(call)
            answers += call.results()
    return answers


def test_every_expert_and_rank_has_gpus_of_its_own_at_every_moment(pools: Pools) -> None:
    names, calls, answers = ["one", "two", "pair"] * 5, [], []
    while names or calls:
        while names and (call := start(pools, names[0], "work", 0.2)) is not None:
            calls.append(call)
            names.pop(0)
        for call in wait(calls, 30):
            calls.remove(call)
            answers += call.results()
    assert Counter(len(answer["devices"]) for answer in answers) == {1: 5, 2: 15}
    assert len({answer["node"] for answer in answers}) == 2
    held = [(a["node"], device, a["began"], a["ended"], a["pid"]) for a in answers for device in a["devices"]]
    assert all(device.isdigit() for _, device, *_ in held)
    for node, device, began, ended, pid in held:
        for other_node, other, other_began, other_ended, other_pid in held:
            if (node, device) == (other_node, other) and pid != other_pid:
                assert ended <= other_began or other_ended <= began


def test_two_halves_share_one_gpu_and_nobody_else_has_it(pools: Pools) -> None:
    started = [start(pools, "half", "work", 0.1) for _ in range(4)]
    started += [start(pools, "one", "work", 0.1) for _ in range(6)]
    assert start(pools, "one", "work", 0.1) is None
    answers = all_of([call for call in started if call is not None])
    users = Counter((answer["node"], *answer["devices"]) for answer in answers)
    assert sorted(users.values()) == [1] * 6 + [2] * 2


def test_idle_groups_give_way_to_another_shape_and_busy_ones_never_do(pools: Pools) -> None:
    first = [start(pools, "one", "work", 0.0) for _ in range(8)]
    pids = {answer["pid"] for answer in all_of([call for call in first if call])}
    assert len(pids) == 8 and len(pools.by_name["one"].groups) == 8
    again = start(pools, "one", "work", 0.0)
    assert again is not None and all_of([again])[0]["pid"] in pids
    wide = start(pools, "wide", "work", 0.3)
    assert wide is not None and not pools.by_name["one"].groups
    assert start(pools, "one", "work", 0.0) is None
    assert len({answer["node"] for answer in all_of([wide])}) == 2
    assert start(pools, "one", "work", 0.0) is not None and not pools.by_name["wide"].groups


def test_group_idle_for_a_moment_is_spared_while_others_work(pools: Pools, tmp_path: Path) -> None:
    one = start(pools, "one", "work", 0.0)
    busy = start(pools, "two", "hold", str(tmp_path / "over"))
    assert one is not None and busy is not None
    all_of([one])
    assert start(pools, "wide", "work", 0.0) is None and pools.by_name["one"].groups
    (tmp_path / "over").touch()
    all_of([busy])
    assert start(pools, "wide", "work", 0.0) is not None


def test_nodes_kept_clear_are_left_alone(pools: Pools) -> None:
    clear = set(list(pools.capacity.nodes)[:1]) if pools.capacity else set()
    groups = []
    while (group := pools.group("one", clear)) is not None:
        group.idle = False
        groups.append(group)
    assert len(groups) == 4 and not {node for group in groups for node in group.share.nodes} & clear


@pytest.mark.fault("F1")
def test_group_whose_worker_dies_leaves_its_place(pools: Pools) -> None:
    for _ in range(3):
        call = start(pools, "wide", "die")
        assert call is not None
        with pytest.raises(WorkerLost):
            all_of([call])
    last = start(pools, "wide", "work", 0.0)
    assert last is not None and len(all_of([last])) == 2


def test_call_says_what_it_took_and_where(pools: Pools) -> None:
    call = start(pools, "pair", "work", 0.2)
    assert call is not None
    all_of([call])
    assert len(call.usages) == 2
    for usage in call.usages:
        assert 0 <= usage.cpu_seconds < 0.2 <= usage.end - usage.start and "/" in usage.node
        assert 10 * 2**20 < usage.memory < 4 * 2**30 and usage.gpu_memory == 0


@pytest.mark.fault("F20")
def test_two_hundred_calls_leave_no_ray_object_behind(pools: Pools) -> None:
    held = ray._private.worker.global_worker.core_worker.get_all_reference_counts
    pool = pools.by_name["one"]
    group = pools.group("one")
    pool.call("where", group=group).result()
    gc.collect()
    before = len(held())
    for _ in range(200):
        pool.call("where", group=group).result()
    gc.collect()
    wait_until(lambda: len(held()) <= before, "objects of Ray are held")
