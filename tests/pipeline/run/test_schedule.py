"""The pure bookkeeping of which steps may start."""

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.plan.steps import Plan
from pipeline.run.schedule import Schedule, in_turn, ranks, weights
from tests.pipeline.plan_toys import facts, make_plan, study


@dataclass
class Node:
    fingerprint: str
    kind: str = "train"
    inputs: dict[str, str] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    gflops: float | None = None


def graph(*nodes: Node) -> dict[str, Node]:
    return {node.fingerprint: node for node in nodes}


def ready(schedule: Schedule, lane: str) -> list[str]:
    """All ready steps of a lane, in order; the schedule is left unchanged."""
    found = []
    while (first := schedule.first(lane)) is not None:
        found.append(first[1])
        schedule.start(first[1])
    for fingerprint in found:
        schedule.put_back(fingerprint)
    return found


def test_ready_step_waits_for_inputs_and_for_order() -> None:
    steps = graph(
        Node("a"), Node("b"), Node("m1", "merge", {"expert": "a"}), Node("m2", "merge", {"e": "b"}, ("m1",))
    )
    schedule = Schedule(steps, done=())
    assert ready(schedule, "train") == ["a", "b"]
    assert ready(schedule, "merge") == []
    schedule.start("b")
    schedule.finish("b")
    assert ready(schedule, "merge") == []
    schedule.finish("a")
    assert ready(schedule, "merge") == ["m1"]
    schedule.finish("m1")
    assert ready(schedule, "merge") == ["m2"]


def test_ready_puts_the_longest_chain_first() -> None:
    steps = graph(
        Node("lonely"),
        Node("head"),
        Node("next", inputs={"init": "head"}),
        Node("last", inputs={"init": "next"}),
    )
    assert ready(Schedule(steps, done=()), "train") == ["head", "lonely"]


def test_expert_that_costs_more_comes_first_where_costs_are_known() -> None:
    steps = graph(Node("cheap", gflops=1.0), Node("dear", gflops=4.0), Node("half", gflops=2.0))
    assert ready(Schedule(steps, done=()), "train") == ["dear", "half", "cheap"]
    steps["half"].gflops = None
    assert ready(Schedule(steps, done=()), "train") == ["cheap", "dear", "half"]


def test_trajectories_in_turn_finish_the_first_one_first() -> None:
    steps = graph(
        Node("a1"), Node("b1"), Node("a2", inputs={"init": "a1"}), Node("b2", inputs={"init": "b1"}),
        Node("ea", "evaluate", {"model": "a2"}), Node("eb", "evaluate", {"model": "b2"}), Node("own", "evaluate", {"model": "a1"}),
    )  # fmt: skip
    schedule = Schedule(steps, (), ranks=in_turn(steps, [["eb", "base"], ["ea"]]))
    order = []
    while not schedule.finished:
        firsts = [first for lane in schedule.lanes if (first := schedule.first(lane)) is not None]
        order.append(min(firsts)[1])
        schedule.start(order[-1])
        schedule.finish(order[-1])
    assert order == ["b1", "b2", "eb", "a1", "a2", "ea", "own"]


def test_base_and_done_steps_are_no_obstacle() -> None:
    steps = graph(Node("a", inputs={"init": "base"}), Node("b", inputs={"init": "a"}))
    assert ready(Schedule(steps, done={"a", "unknown"}), "train") == ["b"]


def test_step_put_back_runs_again() -> None:
    schedule = Schedule(graph(Node("a")), done=())
    schedule.start("a")
    schedule.put_back("a")
    assert ready(schedule, "train") == ["a"]
    schedule.start("a")
    schedule.finish("a")
    assert schedule.finished
    schedule.put_back("a")
    assert not schedule.finished and ready(schedule, "train") == ["a"]


@pytest.mark.parametrize("lanes", [1, 3])
@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_schedule_equals_looking_at_every_step_over_random_graphs_and_events(lanes: int, seed: int) -> None:
    rng = random.Random(seed)
    steps = _random_graph(rng)
    done = {fp for fp in steps if rng.random() < 0.2}
    schedule = Schedule(steps, done, lane=lambda step: str(int(step.fingerprint) % lanes))
    done, running = set(done), set()
    for _ in range(80):
        expected = {
            lane: {
                fp for fp in steps
                if str(int(fp) % lanes) == lane and fp not in done | running and schedule.needs(fp) <= done
            }
            for lane in schedule.lanes
        }  # fmt: skip
        for lane in schedule.lanes:
            assert set(ready(schedule, lane)) == expected[lane]
            first = schedule.first(lane)
            assert (first is None) == (not expected[lane])
        event, startable = rng.random(), sorted(set().union(*expected.values()))
        if event < 0.5 and startable:
            fp = rng.choice(startable)
            schedule.start(fp)
            running.add(fp)
        elif event < 0.85 and running:
            fp = rng.choice(sorted(running))
            schedule.finish(fp)
            running.discard(fp)
            done.add(fp)
        elif done | running:
            fp = rng.choice(sorted(done | running))
            schedule.put_back(fp)
            running.discard(fp)
            done.discard(fp)
        assert schedule.finished == (len(done) == len(steps)) and schedule.running == running


def _random_graph(rng: random.Random) -> dict[str, Node]:
    nodes: list[Node] = []
    for number in range(rng.randint(1, 25)):
        earlier = [node.fingerprint for node in nodes]
        chosen = rng.sample(earlier, min(len(earlier), rng.randint(0, 3)))
        inputs = {f"role-{index}": fp for index, fp in enumerate(chosen[:2])}
        kind = rng.choice(["train", "merge", "evaluate"])
        nodes.append(Node(str(number), kind, inputs, tuple(chosen[1:])))
    return graph(*nodes)


def carried_out(plan: Plan, workers: int, early: bool) -> tuple[float, float]:
    """When the first trajectory has a score after a task, and when all is done, by rough weights; merges have workers of their own."""
    schedule, cost = Schedule(plan.steps, (), ranks=ranks(plan, "critical_path")), weights(plan.steps)
    rows = {point.evaluate for one in plan.trajectories for point in one.points if point.t > 0}
    now, first, running = 0.0, float("inf"), dict[str, float]()
    while not schedule.finished:
        while True:
            busy = sum(plan.steps[one].kind != "merge" for one in running)
            ready = [(lane, one) for lane in schedule.lanes if (one := schedule.first(lane)) is not None]
            free = [(lane, one) for lane, one in ready if lane == "merge" or busy < workers]
            if not free:
                break
            spare = early and schedule.has_spare_time(workers)
            _, (_, step) = min(free, key=lambda entry: (not (spare and entry[0] == "evaluate"), entry[1]))
            schedule.start(step)
            running[step] = now + cost[step]
        step = min(running, key=lambda one: (running[one], one))
        now = running.pop(step)
        schedule.finish(step)
        first = min(first, now) if step in rows else first
    return first, now


@pytest.mark.parametrize("workers", [1, 2, 3, 8, 100])
def test_scores_that_go_first_while_there_is_spare_time_come_early_and_end_nothing_later(
    workers: int,
) -> None:
    merged = {"init": "base", "deploy": "all", "technique": ["average", "ties"]}
    plan = make_plan(study(["zero_shot", "continual_finetuning", "best_in_time", merged]), facts())
    soon, end = carried_out(plan, workers, early=True)
    late, before = carried_out(plan, workers, early=False)
    longest_step = max(weights(plan.steps).values())
    assert end <= before + longest_step, "the end is that of before, but for what fits into the last gap"
    assert soon <= late
    if workers <= 2:
        assert soon < before / 3 < late, "one who watches sees a score in the first third, not at the end"
