"""A candidate on trial with real requests: how a trial begins and ends, and what its counts decide."""

from pathlib import Path

import pytest

from merge_service.live import Arrival, Observed, Tolerances, canary_gates
from pipeline.errors import ConfigError
from pipeline.service.home import Home
from pipeline.service.operations import Operations
from pipeline.service.processes.service_worker import HEAD, Statement
from pipeline.service.worker import trial_key
from tests.pipeline.service import toys
from tests.pipeline.service.test_lane import Clock, send, work
from workers.serving.served import HeadFile
from workers.serving.trials import FOLDER, Trials

CANARY = {"promotion": {"canary": {"share": 0.5, "requests": 100, "deadline": "1h"}}}


def begun(room: Path, clock: Clock, **more: object) -> tuple[Home, Arrival]:
    """A service whose first candidate is on trial."""
    gates = {**toys.config().gates.model_dump(mode="json"), "undecided": "hold"}
    config = toys.config(gates=gates, **{**CANARY, **more})
    service = Home.open(room / "out", config, toys.write_base, clock)
    (name,) = send(service, room, ["task0"])
    state = work(service)
    assert state.shown(name) == "canary" and state.served.t == state.t == 0
    return service, state.arrivals[name]


def observe(service: Home, arrival: Arrival, observed: Observed, process: str = "0") -> None:
    Trials(service.place / FOLDER).write(process, trial_key(arrival), observed)


@pytest.mark.parametrize(
    ("observed", "status", "reason"),
    [
        (Observed(100, 0, 100, 95, 1.1, 1.0), "promoted", ""),
        (Observed(100, 30, 70, 70, 1.0, 1.0), "rejected", "canary.failed"),
        (Observed(1, 1), "rejected", "canary.failed"),  # that one is ended at once
        (Observed(400, 0, 100, 10, 1.0, 1.0), "rejected", "canary.agreement"),
        (Observed(400, 0, 100, 95, 5.0, 1.0), "rejected", "canary.slower"),
        (Observed(100, 1, 100, 95, 1.0, 1.0), "held", "undecided.canary.failed"),
        (Observed(99, 0, 99, 99, 1.0, 1.0), "canary", ""),
    ],
)
def test_counts_of_all_processes_decide(observed: Observed, status: str, reason: str, tmp_path: Path) -> None:
    service, arrival = begun(tmp_path, Clock())
    observe(service, arrival, observed)
    observe(service, arrival, Observed(), "1")
    Trials(service.place / FOLDER).write("2", "of another trial", Observed(1000, 1000))
    if status == "promoted":
        half = Observed(50, 0, 50, 48, 0.6, 0.5)
        observe(service, arrival, half)
        assert work(service).shown(arrival.id) == "canary"
        observe(service, arrival, Observed(350, 0, 300, 290, 1.0, 1.0), "1")
    state = work(service)
    assert state.shown(arrival.id) == status, state.arrivals[arrival.id].detail
    assert (reason in state.arrivals[arrival.id].reasons) == bool(reason)
    assert state.served.t == (status == "promoted")


def test_trial_without_requests_ends_at_its_deadline_and_a_person_decides(tmp_path: Path) -> None:
    clock = Clock()
    service, arrival = begun(tmp_path, clock)
    clock.now = 3599
    assert work(service).shown(arrival.id) == "canary"
    clock.now = 3600
    state = work(service)
    assert state.arrivals[arrival.id].reasons == ("undecided.canary.requests",)
    Operations(service).release(arrival.id, "nobody asks at night")
    assert work(service).shown(arrival.id) == "promoted"  # without another trial


def test_operator_ends_a_trial_either_way(tmp_path: Path) -> None:
    service, arrival = begun(tmp_path / "a", Clock())
    Operations(service).promote(arrival.id, "seen enough")
    assert work(service).shown(arrival.id) == "promoted"
    service, arrival = begun(tmp_path / "b", Clock())
    Operations(service).reject(arrival.id, "seen enough")
    assert work(service).shown(arrival.id) == "rejected"


def test_head_states_the_candidate_while_it_is_tried_and_checks_go_on(tmp_path: Path) -> None:
    service, arrival = begun(tmp_path, Clock(), promotion={"shadow": {"share": 0.25}})
    statement, head = Statement(service), HeadFile(service.place / HEAD)
    statement.write()
    trial, current = head.trial(), head.current()
    assert trial is not None and arrival.candidate is not None and current is not None
    assert (trial.served.sha256, trial.share, trial.shadow) == (arrival.candidate.sha256, 0.25, True)
    assert trial.served.path.is_file() and current.sha256 == service.log.state.base.sha256
    (next_,) = send(service, tmp_path, ["task1"])
    assert work(service).shown(next_) == "admitted"  # it waits for the lane
    Operations(service).promote(arrival.id, "seen enough")
    work(service)
    statement.write()
    following = head.trial()
    assert following is not None and following.key != trial.key  # now the next one is tried


def test_gates_of_a_trial_are_intervals_of_what_was_counted() -> None:
    (nothing,) = canary_gates(Observed(), Tolerances())
    assert (nothing.gate, nothing.verdict) == ("canary.requests", "undecided")
    failed, agreement, slower = canary_gates(Observed(1000, 5, 800, 600, 3.0, 2.0), Tolerances())
    assert (failed.difference, agreement.difference, slower.difference) == (-0.005, -0.25, -0.5)
    assert failed.low < -0.01 < failed.high and failed.verdict == "undecided"  # 5 of 1,000: .0016 to .0116
    assert (agreement.verdict, slower.verdict) == ("pass", "pass")


def test_canary_and_shadow_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="give one of them"):
        toys.config(promotion={"canary": {}, "shadow": {}})
