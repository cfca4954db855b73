"""Declared order and batches: which arrivals are merged when, and that nothing else about them shows in any byte."""

from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from merge_service.checkpoints import Checkpoint
from merge_service.live import Judged, State, digest
from pipeline.errors import ConfigError
from pipeline.service.home import Home
from pipeline.service.operations import Operations, Sender
from pipeline.service.scoring import NoScorer, Sets
from pipeline.service.verify import replay, verify
from pipeline.store.local import Store
from tests.pipeline.service import toys

FOUR = toys.TASKS[:4]
DECLARED = {"tasks": {"open": False, "list": list(FOUR)}, "order": "declared"}


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def send(service: Home, room: Path, tasks: Sequence[str]) -> list[str]:
    return [Operations(service).arrive(toys.expert(room, task), Sender(task, "tests")) for task in tasks]


def work(service: Home) -> State:
    with service.working():
        return service.worker(NoScorer()).run()


def served_of(room: Path, tasks: Sequence[str], **more: object) -> str:
    """The sha256 of what a service serves to which these experts came in this order, one after another."""
    service = toys.home(room / f"plain-{'-'.join(tasks)}", **more)
    for task in tasks:
        send(service, room, [task])
        work(service)
    return service.log.state.served.sha256


def test_declared_order_gives_the_same_bytes_whatever_the_order_of_delivery(tmp_path: Path) -> None:
    wanted = served_of(tmp_path, FOUR)
    for number, tasks in enumerate(list(permutations(FOUR))[5::6]):
        service = toys.home(tmp_path / f"{number}", **DECLARED)
        for task in tasks:
            (name,) = send(service, tmp_path, [task])
            state = work(service)
            if task != FOUR[0] and FOUR[0] not in state.index.tasks:
                assert state.shown(name) == "waiting"
                assert state.arrivals[name].reasons == (f"order.waits_for.{FOUR[0]}",)
        assert (state.t, state.served.sha256) == (4, wanted)
        assert [one.task for one in state.sequence] == list(FOUR)


def test_missing_task_is_passed_over_after_patience_and_comes_late_only_by_release(tmp_path: Path) -> None:
    clock, rules = Clock(), {"order": {"by": "declared", "holes": "skip", "patience": "1m"}}
    service = Home.open(tmp_path / "out", toys.config(**{**DECLARED, **rules}), toys.write_base, clock)
    send(service, tmp_path, [FOUR[3], FOUR[0]])
    clock.now = 30
    send(service, tmp_path, [FOUR[2]])
    assert [one.task for one in work(service).sequence] == [FOUR[0]]
    clock.now = 60  # the first has waited for a minute; whoever is before it goes before it
    state = work(service)
    assert [one.task for one in state.sequence] == [FOUR[0], FOUR[2], FOUR[3]]
    assert state.served.sha256 == served_of(tmp_path, [FOUR[0], FOUR[2], FOUR[3]])
    (late,) = send(service, tmp_path, [FOUR[1]])
    state = work(service)
    assert state.shown(late) == "held" and state.arrivals[late].reasons == ("order.late",)
    Operations(service).release(late, "at the end, then")
    state = work(service)
    assert [one.task for one in state.sequence] == [FOUR[0], FOUR[2], FOUR[3], FOUR[1]]


def test_second_expert_of_an_accepted_task_waits_for_no_other(tmp_path: Path) -> None:
    service = toys.home(tmp_path / "out", same_task="replace", **DECLARED)
    send(service, tmp_path, [FOUR[0], FOUR[2]])
    work(service)
    again = Operations(service).arrive(toys.expert(tmp_path, FOUR[0], 1), Sender(FOUR[0], "tests"))
    state = work(service)
    assert [one.arrival for one in state.sequence] == [again]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"order": "declared"}, "tasks.open: false"),
        ({**DECLARED, "same_task": "add"}, "same_task: best or replace"),
        ({"order": {"by": "declared", "patience": "soon"}}, "90s or 2h"),
        ({"batch": 4, "promotion": {"mode": "manual"}}, "judged one by one"),
    ],
)
def test_order_and_batch_that_cannot_be_are_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        toys.config(**changes)


class Allergic:
    """A scorer for which a model is good unless it lies along the direction of `bad`."""

    sets = Sets({}, ("held",))

    def __init__(self, store: Store) -> None:
        self.store = store

    def judged(self, model: str, datasets: Sequence[str]) -> Judged:
        record = self.store.find(model)
        assert record is not None
        with Checkpoint.open(record.path) as weights:
            start, bad = toys.base(), toys.direction("bad")
            along = sum(
                float(((weights.read(name).reshape(start[name].shape) - start[name]) * bad[name]).sum())
                for name in bad
            )
        return Judged(digest([model]), {"held": (np.full(300, along < 0.3),)})


def test_failing_batch_is_halved_until_the_culprit_is_alone(tmp_path: Path) -> None:
    tasks = [*toys.TASKS[:5], "bad", *toys.TASKS[5:7]]
    service = toys.home(tmp_path / "out", batch=8)
    names = send(service, tmp_path, tasks)
    with service.working():
        state = service.worker(Allergic(service.store)).run()
    bad = names.pop(5)
    assert state.shown(bad) == "rejected" and state.arrivals[bad].reasons[0] == "regression.held_out.mean"
    assert [one.arrival for one in state.sequence] == names
    assert state.served.sha256 == served_of(tmp_path, [one for one in tasks if one != "bad"])
    kinds = [entry.kind for entry in service.log.entries()]
    assert kinds.count("evaluated") == 1 + 2 * 3  # n = 8, one culprit
    assert verify(tmp_path / "out") == []
    assert replay(tmp_path / "out", tmp_path / "again").served == state.served.version
    Operations(service).roll_back(2, "a time step within a batch")
    state = work(service)
    assert state.served.sha256 == served_of(tmp_path, tasks[:2])


def test_batch_of_which_one_is_withdrawn_is_made_anew_without_it(tmp_path: Path) -> None:
    service = toys.home(tmp_path / "out", batch=3)
    names = send(service, tmp_path, FOUR[:3])
    with service.working():
        worker = service.worker(NoScorer())
        state = worker.run(lambda state: state.arrivals[names[0]].status == "evaluated")
        assert state.arrivals[names[0]].batch == tuple(names[1:])
        service.log.append(lambda state: toys.withdrawn(names[1]))
        state = worker.run()
    assert [one.arrival for one in state.sequence] == [names[0], names[2]]
    assert state.served.sha256 == served_of(tmp_path, [FOUR[0], FOUR[2]])
