"""The pure bookkeeping of what may start now."""

from dataclasses import dataclass, field

from pipeline.schedule import Schedule


@dataclass
class Node:
    fingerprint: str
    kind: str = "train"
    inputs: dict[str, str] = field(default_factory=dict)
    after: tuple[str, ...] = ()


def graph(*nodes: Node) -> dict[str, Node]:
    return {node.fingerprint: node for node in nodes}


def test_ready_step_waits_for_inputs_and_for_order() -> None:
    steps = graph(
        Node("a"), Node("b"), Node("m1", "merge", {"expert": "a"}), Node("m2", "merge", {"e": "b"}, ("m1",))
    )
    schedule = Schedule(steps, done=())
    assert schedule.ready("train") == ["a", "b"]
    assert schedule.ready("merge") == []
    schedule.start("b")
    schedule.finish("b")
    assert schedule.ready("merge") == []
    schedule.finish("a")
    assert schedule.ready("merge") == ["m1"]
    schedule.finish("m1")
    assert schedule.ready("merge") == ["m2"]


def test_ready_puts_the_longest_chain_first() -> None:
    steps = graph(
        Node("lonely"),
        Node("head"),
        Node("next", inputs={"init": "head"}),
        Node("last", inputs={"init": "next"}),
    )
    assert Schedule(steps, done=()).ready("train") == ["head", "lonely"]


def test_base_and_done_steps_are_no_obstacle() -> None:
    steps = graph(Node("a", inputs={"init": "base"}), Node("b", inputs={"init": "a"}))
    assert Schedule(steps, done={"a", "unknown"}).ready("train") == ["b"]


def test_step_put_back_runs_again() -> None:
    schedule = Schedule(graph(Node("a")), done=())
    schedule.start("a")
    schedule.put_back("a")
    assert schedule.ready("train") == ["a"]
    schedule.start("a")
    schedule.finish("a")
    assert schedule.finished
    schedule.put_back("a")
    assert not schedule.finished and schedule.ready("train") == ["a"]
