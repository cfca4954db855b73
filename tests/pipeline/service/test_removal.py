"""Taking back: a removed expert leaves no trace in any byte, and a service is made anew from its log and experts."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from merge_service.checkpoints import WEIGHTS_FILE
from merge_service.live import Judged, Refused, Removed
from merge_service.service import Folder, Origin
from merge_service.timelines import Merged, deployed
from pipeline.kinds.specs import EvaluateSpec
from pipeline.kinds.table import KINDS
from pipeline.service.experts import step_of
from pipeline.service.models import placed
from pipeline.service.operations import Operations
from pipeline.service.verify import replay, verify
from tests.pipeline.service import toys

TEN = toys.TASKS[:10]
STRATEGIES: dict[str, dict[str, object]] = {
    "average": {"init": "base", "deploy": "all", "technique": "average"},
    "ties": {"init": "base", "deploy": "all", "technique": "ties", "params": {"density": 0.5}},
    "magmax": {"init": "base", "deploy": "all", "technique": "magmax"},
    "ema": {"init": "base", "deploy": "ema", "technique": "average", "params": {"weight": 0.5}},
    "iso_c": {"init": "base", "deploy": "all", "technique": "iso_c"},
}
LOOSE = {
    "solo": {"min_gain": 0.1, "required": False}, "accumulated": {"margin": 1.0, "worst": 1.0}, "held_out": {"margin": 1.0},
    "drift": 1.0, "geometry": {"reference": {"norm": toys.SIZE}}, "undecided": "pass",
}  # fmt: skip


def served_bytes(service: toys.Home) -> bytes:
    record = service.store.find(service.log.refresh().served.fingerprint)
    assert record is not None
    return (record.path / WEIGHTS_FILE).read_bytes()


def with_experts(out: Path, room: Path, strategy: object, tasks: tuple[str, ...]) -> toys.Home:
    service = toys.home(out, strategy, gates=LOOSE)
    for task in tasks:
        toys.arrive(service, toys.expert(room, task), task)
    assert service.log.state.t == len(tasks)
    return service


@pytest.mark.parametrize("name", STRATEGIES)
def test_removal_at_each_of_ten_positions_gives_the_bytes_of_a_service_that_never_saw_the_expert(
    name: str, tmp_path: Path
) -> None:
    strategy = STRATEGIES[name]
    whole = with_experts(tmp_path / "whole", tmp_path, strategy, TEN)
    before = served_bytes(whole)
    for gone in range(10):
        shutil.copytree(tmp_path / "whole", tmp_path / f"{gone}")
        service = toys.home(tmp_path / f"{gone}", strategy, gates=LOOSE)
        leaving = service.log.state.sequence[gone].arrival
        Operations(service).remove(leaving, Removed("takedown"))
        state = toys.work(service)
        assert state.removal is None and state.arrivals[leaving].status == "removed" and state.served.t == 9
        assert served_bytes(service) == never(service, TEN[:gone] + TEN[gone + 1 :], tmp_path) != before
    aside = with_experts(tmp_path / "aside", tmp_path, strategy, TEN[:3] + TEN[4:6])
    last = with_experts(tmp_path / "last", tmp_path, strategy, TEN[:6])
    Operations(last).remove(last.log.state.sequence[3].arrival, Removed("takedown"))
    found = toys.work(last).served
    assert (found.fingerprint, found.sha256) == (
        aside.log.state.served.fingerprint,
        aside.log.state.served.sha256,
    )


def never(service: toys.Home, tasks: tuple[str, ...], room: Path) -> bytes:
    """What the strategy makes of these experts where nothing else was ever there."""
    paths = {toys.sha256_of(path): path for path in (toys.expert(room, task) for task in tasks)}
    start = service.store.open_verified(service.base)
    strategy = service.config.timeline
    with tempfile.TemporaryDirectory(dir=room) as place:
        origin = Origin(strategy, start, toys.sha256_of(start), paths.__getitem__)
        merged = deployed(strategy, len(tasks))
        assert isinstance(merged, Merged)
        Folder(origin, Path(place) / "states").make(merged, placed("0" * 64, paths), Path(place) / "out")
        return (Path(place) / "out" / WEIGHTS_FILE).read_bytes()


def test_rollback_then_removal_serves_the_same_experts_without_the_removed_one(tmp_path: Path) -> None:
    strategy = STRATEGIES["ties"]
    service = with_experts(tmp_path / "out", tmp_path, strategy, TEN[:5])
    Operations(service).roll_back(4, "tests")
    Operations(service).remove(service.log.state.sequence[1].arrival, Removed("takedown"))
    state = toys.work(service)
    never = with_experts(tmp_path / "never", tmp_path, strategy, (TEN[0], *TEN[2:4]))
    assert state.served.t == 3 and served_bytes(service) == served_bytes(never)
    Operations(service).roll_back(
        2, "tests"
    )  # a time step that the removal changed, and nobody has asked for since
    assert toys.work(service).served.t == 2
    two = with_experts(tmp_path / "two", tmp_path, strategy, (TEN[0], TEN[2]))
    assert served_bytes(service) == served_bytes(two)


class Partial(toys.ToyScorer):
    """Finds every model but one bad on held-out data."""

    good = ""

    def judged(self, model: str, datasets: Sequence[str]) -> Judged:
        found = super().judged(model, datasets)
        held = {
            name: (np.full(toys.SAMPLES, model == self.good),) for name in toys.HELD_OUT if name in datasets
        }
        return Judged(found.evaluation, {**found.answers, **held})


def test_removal_that_costs_too_much_is_refused_and_undone_unless_it_is_forced(tmp_path: Path) -> None:
    service = with_experts(tmp_path / "out", tmp_path, STRATEGIES["average"], TEN[:3])
    strict = toys.home(tmp_path / "out", STRATEGIES["average"], gates={**LOOSE, "held_out": {"margin": 0.1}})
    before, scorer = strict.log.state, Partial(service.store)
    scorer.good = before.champion.fingerprint
    leaving = before.sequence[1].arrival
    for force in (False, True):
        Operations(strict).remove(leaving, Removed("asked", force=force))
        with strict.working():
            state = strict.worker(scorer).run()
        if not force:
            assert (state.sequence, state.served) == (before.sequence, before.served)
            assert state.arrivals[leaving].status == "accepted" and state.arrivals[leaving].t == 2
            assert state.arrivals[leaving].reasons == ("regression.held_out.mean",)
    assert state.t == 2 and state.arrivals[leaving].status == "removed"


def test_purge_needs_a_removal_deletes_the_bytes_and_refuses_them_for_ever(tmp_path: Path) -> None:
    service = with_experts(tmp_path / "out", tmp_path, STRATEGIES["ema"], TEN[:4])
    gone = service.log.state.sequence[1]
    with pytest.raises(Refused, match="remove it first"):
        Operations(service).purge(gone.arrival, "court order")
    Operations(service).remove(gone.arrival, Removed("takedown", force=True))
    toys.work(service)
    Operations(service).purge(gone.arrival, "court order")
    toys.work(service)
    left = [*(tmp_path / "out").rglob("*.safetensors")]
    digests = {toys.sha256_of(path) for path in left}
    assert gone.sha256 not in digests and len(left) > 3
    assert verify(tmp_path / "out") == []
    with pytest.raises(Refused, match="purged"):
        toys.arrive(service, toys.expert(tmp_path, TEN[1]), TEN[1])


def test_descendants_by_ticket_are_listed_and_must_be_decided_about(tmp_path: Path) -> None:
    strategy = {"init": "ema", "deploy": "ema", "technique": "average"}
    service = with_experts(tmp_path / "out", tmp_path, strategy, TEN[:2])
    first, second = (one.arrival for one in service.log.state.sequence)
    start = service.log.state.champion.sha256
    child = toys.arrive(service, toys.expert(tmp_path, TEN[2]), TEN[2], init=start)
    start = service.log.state.champion.sha256
    grandchild = toys.arrive(service, toys.expert(tmp_path, TEN[3]), TEN[3], init=start)
    for parent, below in (
        (first, (child, grandchild)),
        (second, (child, grandchild)),
        (child, (grandchild,)),
    ):
        with pytest.raises(Refused, match=", ".join(below)):
            Operations(service).remove(parent, Removed("takedown"))
    Operations(service).remove(first, Removed("takedown", descendants="remove", force=True))
    state = toys.work(service)
    assert [one.arrival for one in state.sequence] == [second]
    never = with_experts(tmp_path / "never", tmp_path, strategy, TEN[1:2])
    assert served_bytes(service) == served_bytes(never)


@pytest.mark.parametrize("name", STRATEGIES)
def test_replay_into_an_empty_place_serves_the_same_bytes_and_goes_on(name: str, tmp_path: Path) -> None:
    service = with_experts(tmp_path / "out", tmp_path, STRATEGIES[name], TEN[:5])
    Operations(service).remove(service.log.state.sequence[2].arrival, Removed("takedown", force=True))
    toys.work(service)
    found = replay(tmp_path / "out", tmp_path / "new")
    state = service.log.state
    assert found.versions[-1] == state.champion and found.served.sha256 == state.served.sha256
    again = toys.home(tmp_path / "new", STRATEGIES[name], gates=LOOSE)
    assert served_bytes(again) == served_bytes(service)
    for one in (service, again):
        toys.arrive(one, toys.expert(tmp_path, TEN[6]), TEN[6])
    assert served_bytes(again) == served_bytes(service)
    assert verify(tmp_path / "new") == verify(tmp_path / "out") == []


def test_verify_passes_over_answers_of_a_model_that_was_dropped(tmp_path: Path) -> None:
    service = toys.home(tmp_path / "out", serving={"keep_warm": 1})
    toys.arrive(service, toys.expert(tmp_path, "task0"), "task0")
    model = service.log.state.served.fingerprint
    spec = EvaluateSpec(
        version=KINDS[EvaluateSpec.kind].revision, model=model, datasets=[], fraction=1.0, seed=0, device="cpu", details=[]
    )  # fmt: skip
    service.store.make(step_of(spec, "answers", "answers"), lambda _: {})
    for task in ("task1", "task2"):
        toys.arrive(service, toys.expert(tmp_path, task), task)
    if service.store.find(model) is not None:
        service.models.drop("sequence", model[:16])
    assert service.store.find(model) is None and service.store.verify() and verify(tmp_path / "out") == []
