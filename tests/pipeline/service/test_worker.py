"""The worker of a service: from arrival to promotion, in the order of admission, with the bytes of a merge."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from merge_service.checkpoints import CONFIG_FILE, WEIGHTS_FILE, sha256_of
from merge_service.errors import NonFiniteCheckpoint
from merge_service.live import Judged, Removed, fold
from merge_service.merge import merge
from pipeline.service.home import Busy
from pipeline.service.operations import Operations
from tests.pipeline.service import toys

FOUR = toys.TASKS[:4]


def merged(service: toys.Home, experts: list[Path], out: Path) -> str:
    """The sha256 of what `merge` makes of experts, under the ids and digests that a study gives."""
    ids = [f"t{t}" for t in range(1, len(experts) + 1)]
    digests = dict(zip(ids, map(sha256_of, experts)))
    start = service.store.open_verified(service.base)
    merge("average", {}, start, experts, out, ids=ids, sha256=digests)
    return sha256_of(out)


def test_experts_are_promoted_in_their_order_with_the_bytes_of_a_merge(tmp_path: Path) -> None:
    service = toys.home(tmp_path / "out")
    experts = [toys.expert(tmp_path, task) for task in FOUR]
    for t, (task, path) in enumerate(zip(FOUR, experts), 1):
        name = toys.arrive(service, path, task)
        state = service.log.state
        assert state.shown(name) == "promoted", state.arrivals[name].detail
        assert state.served.t == state.t == t and state.served.arrival == name
        assert state.served.sha256 == merged(service, experts[:t], tmp_path / f"{t}")
    assert [state.shown(name) for name in state.arrivals] == ["superseded"] * 3 + ["promoted"]
    record = service.store.find(state.served.fingerprint)
    assert record is not None and (record.path / CONFIG_FILE).is_file()
    assert record.sha256(WEIGHTS_FILE) == state.served.sha256
    assert fold(service.log.entries()) == state


def test_the_same_bytes_task_and_start_again_are_the_first_arrival(tmp_path: Path) -> None:
    service, path = toys.home(tmp_path / "out"), toys.expert(tmp_path, "task0")
    first, length = toys.arrive(service, path, "task0"), service.log.state.seq
    assert toys.arrive(service, path, "task0") == first and service.log.state.seq == length


def test_restart_finds_the_streaming_state_and_folds_no_earlier_expert_again(tmp_path: Path) -> None:
    for task in FOUR[:3]:
        toys.arrive(toys.home(tmp_path / "out"), toys.expert(tmp_path, task), task)
    service = toys.home(tmp_path / "out")
    opened: list[str] = []
    path = service.experts.path
    service.models.folder.origin = type(service.models.folder.origin)(
        service.config.timeline, service.models.folder.origin.base, service.models.folder.origin.sha256,
        lambda sha256: opened.append(sha256) or path(sha256),
    )  # fmt: skip
    name = toys.arrive(service, toys.expert(tmp_path, FOUR[3]), FOUR[3])
    assert opened == [service.log.state.arrivals[name].sha256]


def test_rollback_moves_what_is_served_and_the_next_arrival_builds_on_the_newest(tmp_path: Path) -> None:
    service = toys.home(tmp_path / "out", serving={"keep_warm": 1})
    experts = [toys.expert(tmp_path, task) for task in FOUR]
    first = [toys.arrive(service, path, task) for task, path in zip(FOUR[:3], experts)]
    versions = [service.log.state.version(t) for t in range(4)]
    for t in (1, 0, 2, 3, 1):
        Operations(service).roll_back(t, "tests")
        state = toys.work(service)
        assert (state.served.t, state.served.sha256) == (t, versions[t].sha256)
        record = service.store.find(state.served.fingerprint)
        assert record is not None and record.sha256(WEIGHTS_FILE) == versions[t].sha256
    assert [state.shown(name) for name in first] == ["promoted", "rolled_back", "rolled_back"]
    Operations(service).roll_back(1, "tests", hold=True)
    held = toys.arrive(service, experts[3], FOUR[3])
    assert service.log.state.arrivals[held].reasons == ("promotion.on_hold",)
    Operations(service).roll_back(3, "tests")
    Operations(service).release(held, "tests")
    state = toys.work(service)
    assert state.t == state.served.t == 4
    assert state.served.sha256 == merged(service, experts, tmp_path / "m")


def test_manual_promotion_holds_what_passed_and_a_release_promotes_it(tmp_path: Path) -> None:
    service = toys.home(tmp_path / "out", promotion={"mode": "manual"})
    names = [toys.arrive(service, toys.expert(tmp_path, task), task) for task in FOUR[:2]]
    state = service.log.state
    assert [state.arrivals[name].reasons for name in names] == [("promotion.manual",)] * 2 and state.t == 0
    for name in reversed(names):
        Operations(service).release(name, "looks well")
    state = toys.work(service)
    assert [one.arrival for one in state.sequence] == [*reversed(names)]


def test_second_expert_of_a_task_takes_its_place_only_if_it_is_better(tmp_path: Path) -> None:
    service = toys.home(tmp_path / "out")
    weak = toys.expert(tmp_path, "task0", 1, size=2.0)
    first = toys.arrive(service, weak, "task0")
    other = toys.arrive(service, toys.expert(tmp_path, "task1"), "task1")
    better = toys.arrive(service, toys.expert(tmp_path, "task0"), "task0")
    state = service.log.state
    assert [one.arrival for one in state.sequence] == [better, other]
    assert state.arrivals[first].status == "removed" and state.served.t == 2
    both = [toys.expert(tmp_path, "task0"), toys.expert(tmp_path, "task1")]
    assert state.served.sha256 == merged(service, both, tmp_path / "m")
    worse = toys.arrive(service, toys.expert(tmp_path, "task0", 2, size=1.5), "task0")
    assert service.log.state.arrivals[worse].reasons == ("regression.not_better",)


@pytest.mark.parametrize("same_task, count", [("add", 2), ("replace", 1)])
def test_second_expert_of_a_task_is_added_or_replaces_as_configured(
    same_task: str, count: int, tmp_path: Path
) -> None:
    service = toys.home(tmp_path / "out", same_task=same_task)
    for variant in (1, 2):
        toys.arrive(service, toys.expert(tmp_path, "task0", variant), "task0")
    assert service.log.state.t == count


def test_withdrawn_arrival_is_never_merged(tmp_path: Path) -> None:
    service = toys.home(tmp_path / "out")
    name = Operations(service).arrive(toys.expert(tmp_path, "task0"), toys.Sender("task0", "tests"))
    Operations(service).remove(name, Removed("changed my mind"))
    state = toys.work(service)
    assert state.arrivals[name].status == "withdrawn" and state.t == 0


class Unfit(toys.ToyScorer):
    """Cannot score one model."""

    bad = ""

    def judged(self, model: str, datasets: Sequence[str]) -> Judged:
        if model == self.bad:
            raise NonFiniteCheckpoint("its weights are finite but too large to use")
        return super().judged(model, datasets)


def test_what_cannot_be_scored_is_stopped_and_the_next_arrival_goes_on(tmp_path: Path) -> None:
    service = toys.home(tmp_path / "out")
    scorer, operations = Unfit(service.store), Operations(service)
    names = [operations.arrive(toys.expert(tmp_path, task), toys.Sender(task, "tests")) for task in FOUR[:3]]
    first = service.log.state.arrivals[names[0]]
    with service.working():
        worker = service.worker(scorer)
        scorer.bad = service.experts.step(first.sha256).fingerprint  # alone
        worker.run(lambda state: state.arrivals[names[0]].is_final)
        worker.run(lambda state: state.arrivals[names[1]].status == "merged")
        candidate = service.log.state.arrivals[names[1]].candidate
        assert candidate is not None
        scorer.bad = candidate.fingerprint
        state = worker.run()
    assert [state.shown(name) for name in names] == ["quarantined", "rejected", "promoted"]
    assert [state.arrivals[name].reasons for name in names[:2]] == [("check.failed",), ("evaluate.failed",)]


def test_only_one_process_works_for_a_service(tmp_path: Path) -> None:
    service = toys.home(tmp_path / "out")
    with (
        service.working(),
        pytest.raises(Busy, match="another process"),
        toys.home(tmp_path / "out").working(),
    ):
        pass
