"""The driver's loop over simulated workers: caps, priorities, shapes, faults, and the end of every study."""

import contextlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.capacity import Capacity, Node
from cluster.pool import Group, WorkerLost
from cluster.session import ClusterError, Session
from pipeline.errors import CorruptArtifact
from pipeline.kinds.table import STEPS
from pipeline.run import driver
from pipeline.run.trace import read_timeline
from pipeline.store.lease import Files, Leases
from pipeline.workspace.workspace import Workspace
from tests.pipeline.plan_toys import facts, make_plan, study

USAGE = SimpleNamespace(cpu_seconds=0.5, start=1.0, end=2.0, node="here", memory=1, gpu_memory=0)
STRATEGIES = ["best_in_time", {"init": "base", "deploy": ["latest", "all"], "technique": ["ties", "average"]}]


class Workers:
    """Stands in for Pools: groups are made as the capacity allows, and dropped when they are idle and their place is needed."""

    def __init__(self, pools: dict[str, Any], capacity: Capacity | None) -> None:
        self.pools, self.capacity = pools, capacity
        self.groups: dict[str, list[Group]] = {name: [] for name in pools}
        self.by_name = {name: SimpleNamespace(call=self.call) for name in pools}

    def group(self, name: str, avoid: Any) -> Group | None:
        idle = [group for group in self.groups[name] if group.idle]
        shape = self.pools[name].shape
        if idle or shape.is_free or self.capacity is None:
            return idle[0] if idle else self._new(name, None)
        for other in (group for groups in self.groups.values() for group in list(groups) if group.idle):
            if other.share is not None:
                self.capacity.give(other.share)
        self.groups = {key: [group for group in some if not group.idle] for key, some in self.groups.items()}
        share = self.capacity.take(shape, avoid)
        return None if share is None else self._new(name, share)

    def _new(self, name: str, share: Any) -> Group:
        self.groups[name].append(Group(name, [], share))
        return self.groups[name][-1]

    def call(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    def not_up(self, seconds: float) -> list[Group]:
        return []

    def drop_idle(self, seconds: float) -> None:
        self.let_go = True

    def close(self) -> None:
        pass


class AlwaysThere(contextlib.nullcontext[None]):
    """The head of a cluster that is never lost."""

    def check(self) -> bool:
        return True


class Call(SimpleNamespace):
    """A call that does its work when its result is requested."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__  # type: ignore[assignment]


class Scene:
    """One study driven to its end, with a record of what ran together and in which order steps ended."""

    def __init__(
        self, room: Path, monkeypatch: pytest.MonkeyPatch, seed: int = 0, cpus: float = 2, **changes: Any
    ) -> None:
        self.rng, self.errors = random.Random(seed), dict[str, list[Exception]]()
        self.ended: list[Any] = []
        self.together: list[list[Any]] = []
        self.damaged: set[str] = set()
        self.victim = ""
        strict = changes.pop("strict_versions", False)
        one = study(changes.pop("strategies", STRATEGIES), **changes)
        known = facts()
        self.plan = make_plan(one, known)
        self.workspace = Workspace(one, room, self.plan, known)
        self.stored: dict[str, Any] = {}
        self.workspace.__dict__["store"] = SimpleNamespace(
            has=lambda kind, fp: fp not in self.damaged, record=lambda kind, fp: self.stored.get(fp),
            root=room, shelf=Files(room), poll_seconds=0.0, where="store",
        )  # fmt: skip
        monkeypatch.setattr(driver, "Pools", Workers)
        nothing = dict.fromkeys(STEPS, lambda step: None)
        monkeypatch.setattr(driver, "Jobs", lambda *_: SimpleNamespace(**nothing))
        monkeypatch.setattr(driver, "nodes_now", lambda: self.nodes)
        monkeypatch.setattr(driver, "Head", AlwaysThere)
        monkeypatch.setattr(driver, "wait", self._wait)
        monkeypatch.setattr(driver.time, "sleep", lambda _: None)
        monkeypatch.setattr(
            Workers, "call", lambda pools, method, job, step, store, group: self._call(step, group)
        )
        self.idle: Callable[[], None] = lambda: pytest.fail("the driver waits for nobody")
        self.nodes = (Node("a", "10.0.0.1", cpus),)
        self.told: list[str] = []
        tracking: Any = SimpleNamespace(
            committed=lambda step, record: self.told.append(step.fingerprint),
            failed=lambda *_: None,
            trouble=None,
        )
        self.drive = driver._Drive(self.workspace, Session("local", self.nodes), tracking, set(), strict)

    def _call(self, step: Any, group: Group) -> Call:
        group.idle = False
        return Call(group=group, usages=[USAGE], step=step, result=lambda: self._result(step, group))

    def _result(self, step: Any, group: Group) -> Any:
        group.idle = True
        if self.errors.get(step.fingerprint):
            error = self.errors[step.fingerprint].pop()
            self.damaged |= {self.victim} if isinstance(error, CorruptArtifact) else set()
            raise error
        self.ended.append(step)
        self.damaged.discard(step.fingerprint)
        return self.record(step)

    def record(self, step: Any) -> Any:
        scores = dict.fromkeys((*self.plan.adaptation, *self.plan.held_out), 0.5)
        result = {"steps": 1, "loss": [[1, 1.0]], "samples_per_second": 1.0, "scores": scores}
        return SimpleNamespace(
            kind=step.kind, fingerprint=step.fingerprint, result=result, path=Path(), versions={}
        )

    def _wait(self, calls: list[Any], timeout: float) -> list[Any]:
        if not calls:
            self.idle()
            return []
        self.together.append([call.step for call in calls])
        return [self.rng.choice(calls)]


@pytest.mark.parametrize("seed", range(5))
def test_every_step_is_done_once_after_what_it_needs_and_no_worker_idles_while_a_step_is_ready(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path, monkeypatch, seed, grid={"strategies": STRATEGIES, "seed": [0, 1, 2]})
    scene.drive.run()
    done: set[str] = set()
    for step in scene.ended:
        assert scene.drive.schedule.needs(step.fingerprint) <= done
        done.add(step.fingerprint)
    assert len(scene.ended) == len(done) == len(scene.plan.steps) and sorted(scene.told) == sorted(done)
    working = [sum(step.kind != "merge" for step in steps) for steps in scene.together]
    assert working.count(2) / len(working) > 0.8  # both workers, except for the tails of chains
    lines = read_timeline(tmp_path)
    assert [line["fingerprint"] for line in lines if "fingerprint" in line] == [
        step.fingerprint for step in scene.ended
    ]


def test_caps_are_never_exceeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most = {"train": 2, "merge": 1, "evaluate": 3}
    scene = Scene(
        tmp_path, monkeypatch, cpus=16, schedule={"max_running": most}, resources={"merging": {"actors": 3}}
    )
    scene.drive.run()
    for kind, cap in most.items():
        assert max(sum(step.kind == kind for step in steps) for steps in scene.together) == cap


def test_groups_and_actors_cap_each_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resources = {"experts": {"groups": 3}, "by_model": {"toy": {"evaluation": {"actors": 2}}}}
    scene = Scene(tmp_path, monkeypatch, cpus=16, resources=resources)
    scene.drive.run()
    for kind, cap in (("train", 3), ("evaluate", 2)):
        assert max(sum(step.kind == kind for step in steps) for steps in scene.together) == cap


def test_trajectories_first_gives_the_first_results_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = {}
    for priority in ("trajectories", "critical_path"):
        (tmp_path / priority).mkdir()
        scene = Scene(
            tmp_path / priority, monkeypatch, cpus=1, schedule={"priority": priority},
            grid={"strategies": STRATEGIES, "seed": [0, 1, 2]},
        )  # fmt: skip
        scene.drive.run()
        order = [step.fingerprint for step in scene.ended]
        ends[priority] = [
            max(order.index(point.evaluate) for point in trajectory.points)
            for trajectory in scene.plan.trajectories
        ]
    first, last = ends["trajectories"], ends["critical_path"]
    assert first[0] < last[0] / 3 and sum(first) < sum(last) * 0.8


def test_scores_come_early_though_the_longest_chain_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So one who watches sees how trajectories stand, and how long scores take, long before all experts are trained."""
    scene = Scene(tmp_path, monkeypatch, grid={"strategies": STRATEGIES, "seed": [0, 1, 2]})
    scene.drive.run()
    kinds = [step.kind for step in scene.ended]
    first, trained = kinds.index("evaluate"), len(kinds) - 1 - kinds[::-1].index("train")
    assert first < 5 < trained


def test_models_of_several_shapes_share_the_cluster_and_all_finish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [{"config": "small"}, {"config": "large"}]
    resources = {"by_model": {"large": {"experts": {"cpus": 4}}, "small": {"experts": {"cpus": 0.5}}}}
    scene = Scene(
        tmp_path,
        monkeypatch,
        cpus=4,
        resources=resources,
        grid={"strategies": STRATEGIES, "model": models, "seed": [0, 1]},
    )
    scene.drive.run()
    assert len(scene.ended) == len(scene.plan.steps)
    for steps in scene.together:
        large = [step for step in steps if step.model == "large" and step.kind != "merge"]
        small = [step for step in steps if step.model == "small" and step.kind != "merge"]
        assert not large or (len(large) == 1 and not small)
    assert max(len(steps) for steps in scene.together) >= 8


@pytest.mark.fault("F1", "F15")
def test_lost_worker_is_tried_again_and_a_damaged_input_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path, monkeypatch)
    merge = next(step for step in scene.plan.steps.values() if step.kind == "merge")
    expert = next(fp for fp in merge.inputs.values() if fp in scene.plan.steps)
    scene.victim = expert
    scene.errors[merge.fingerprint] = [WorkerLost("died"), CorruptArtifact("flipped")]
    scene.drive.run()
    order = [step.fingerprint for step in scene.ended]
    assert order.count(expert) == 2 and order.count(merge.fingerprint) == 1
    assert len(order) == len(scene.plan.steps) + 1


@pytest.mark.fault("F6")
def test_step_that_has_lost_its_only_node_ends_the_run_instead_of_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path, monkeypatch)
    monkeypatch.setattr(driver, "LOOK_SECONDS", -1.0)
    monkeypatch.setattr(driver, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr(driver, "wait", lambda calls, _: calls[:1])
    scene.nodes = (Node("b", "10.0.0.2", 0.5),)
    with pytest.raises(ClusterError, match=r"do not fit into 0\.5 CPUs"):
        scene.drive.run()


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A drive with one step on a group that has not answered yet, with a clock that the test moves."""
    clock = SimpleNamespace(now=1000.0)
    resources = {"experts": {"timeout": 10}, "start_timeout": 100}
    scene = Scene(tmp_path, monkeypatch, resources=resources)
    monkeypatch.setattr(driver.time, "monotonic", lambda: clock.now)
    scene.drive.deadlines._clock = lambda: clock.now
    step = next(step for step in scene.plan.steps.values() if step.kind == "train")
    group = SimpleNamespace(name="worker-7", up=False, placed=False, since=1000.0)
    scene.drive.running = {Call(group=group, abandon=lambda: None): step}
    scene.drive.deadlines.start(step)
    given_up: list[str] = []
    monkeypatch.setattr(scene.drive, "_retry_or_fail", lambda step, error: given_up.append(str(error)))

    def after(seconds: float, **changes: Any) -> list[str]:
        clock.now += seconds
        group.__dict__.update(changes)
        scene.drive._end_overdue()
        return given_up

    return SimpleNamespace(after=after, drive=scene.drive, group=group)


@pytest.mark.fault("F30")
def test_start_up_of_a_worker_does_not_eat_the_timeout_of_its_first_step(slow: Any) -> None:
    assert not slow.after(99)
    assert not slow.after(9, up=True)
    assert slow.after(2) == [
        "its worker showed no sign of progress for 10 s (resources: timeout); it was ended"
    ]


@pytest.mark.fault("F30")
def test_start_up_that_never_ends_is_ended_by_its_own_limit(slow: Any) -> None:
    assert slow.after(101) == [
        "its worker had not started after 100 s (resources: start_timeout); it was ended"
    ]


@pytest.mark.fault("F30")
def test_worker_without_a_place_is_waited_for_where_nodes_may_come_until_it_has_one(slow: Any) -> None:
    slow.drive.capacity = None
    assert not slow.after(1000)
    assert not slow.after(99, placed=True, since=2000.0)
    assert "start_timeout" in slow.after(2)[0]


def test_waiting_for_a_place_is_said_only_of_a_worker_without_a_process(slow: Any) -> None:
    said: list[str] = []
    slow.drive.progress = SimpleNamespace(
        note=lambda text, about="": said.append(text), settled=lambda about: None
    )
    slow.drive.pools = SimpleNamespace(not_up=lambda seconds: [slow.group])
    slow.drive._note_waiting()
    slow.drive._note_waiting()
    slow.group.placed = True
    slow.drive._note_waiting()
    slow.drive.capacity, slow.group.placed = None, False
    slow.drive._note_waiting()
    assert [line.removeprefix("worker-7 ")[:14] for line in said] == [
        "has no process", "is still start", "waits for a pl"
    ]  # fmt: skip


def begun_elsewhere(scene: Scene, room: Path) -> tuple[Any, Leases]:
    """A step that another driver carries out, and the leases of that driver."""
    first = next(step for step in scene.plan.steps.values() if step.kind == "train")
    store: Any = scene.workspace.store
    other = Leases(store, "other", room / "other")
    assert other.take(first.fingerprint) is None
    return first, other


def test_step_of_another_driver_is_waited_for_while_others_go_on_and_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path, monkeypatch)
    first, other = begun_elsewhere(scene, tmp_path)
    before: list[int] = []

    def finish() -> None:
        """Everything that does not need the step is done: now the other driver commits it."""
        before.append(len(scene.ended))
        assert "study other" in json.loads((tmp_path / "driver.json").read_text())["waiting"][0]["holder"]
        scene.stored[first.fingerprint] = scene.record(first)
        other.give_back(first.fingerprint)

    scene.idle = finish
    scene.drive.run()
    assert len(before) == 1 and before[0] > 0
    assert scene.drive.pools.let_go, "idle workers hold no place that the other driver may be waiting for"  # type: ignore[attr-defined]
    assert first.fingerprint not in {step.fingerprint for step in scene.ended}
    assert sorted(scene.told) == sorted(scene.plan.steps)


def test_step_that_the_other_driver_gives_up_is_done_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path, monkeypatch)
    first, other = begun_elsewhere(scene, tmp_path)
    scene.idle = lambda: other.give_back(first.fingerprint)
    scene.drive.run()
    assert sorted(step.fingerprint for step in scene.ended) == sorted(scene.plan.steps)


def test_what_was_done_since_the_run_began_is_found_before_it_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path, monkeypatch)
    for fingerprint, step in list(scene.plan.steps.items())[::2]:
        scene.stored[fingerprint] = scene.record(step)
    scene.drive.run()
    assert {step.fingerprint for step in scene.ended} == set(scene.plan.steps) - set(scene.stored)
    assert sorted(scene.told) == sorted(scene.plan.steps)


def test_run_that_ends_in_an_error_holds_no_lease_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path, monkeypatch)
    first = next(step for step in scene.plan.steps.values() if step.kind == "train")
    scene.errors[first.fingerprint] = [KeyboardInterrupt()]  # type: ignore[list-item]
    with pytest.raises(KeyboardInterrupt):
        scene.drive.run()
    assert Files(tmp_path).sizes(".leases") == {}
