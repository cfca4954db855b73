"""Which workers carry out which steps, and what is refused before anything starts."""

from typing import Any

import pytest

from cluster.capacity import Capacity, Node
from cluster.session import ClusterError
from pipeline.errors import ConfigError
from pipeline.kinds.table import STEPS
from pipeline.run.carriers import CARRIERS
from pipeline.run.lanes import Lanes
from pipeline.study.config import study_from
from tests.pipeline.plan_toys import facts, make_plan, raw_study, study


def lanes_of(resources: dict[str, Any], strategies: list[Any] | None = None) -> Lanes:
    strategies = strategies or ["best_in_time", {"init": "base", "deploy": "all", "technique": "ties"}]
    one = study(strategies, resources=resources)
    return Lanes(one, make_plan(one, facts()).steps)


def capacity(cpus: float, gpus: float = 0) -> Capacity:
    return Capacity([Node("a", "10.0.0.1", cpus, gpus)])


def test_experts_with_one_worker_and_evaluations_share_their_workers_by_default() -> None:
    lanes = lanes_of({"experts": {"cpus": 2, "gpus": 0.5, "threads": 2}})
    train, evaluate = lanes.by_name["train toy"], lanes.by_name["evaluate toy"]
    assert train.pool == evaluate.pool and train.cap is None and evaluate.cap is None
    assert len(lanes.pools(patient=False)) == 2  # these, and one merge actor


def test_evaluations_of_another_shape_have_workers_of_their_own() -> None:
    for resources in (
        {"evaluation": {"cpus": 0}},
        {"evaluation": {"threads": 2}},
        {"experts": {"workers": 2, "gpus": 1}},
    ):
        lanes = lanes_of(resources)
        assert lanes.by_name["train toy"].pool != lanes.by_name["evaluate toy"].pool
    assert lanes.by_name["evaluate toy"].shape.gpus == 1
    assert lanes_of({"evaluation": {"cpus": 0}}).by_name["evaluate toy"].cap == 1


def test_groups_and_actors_are_caps() -> None:
    lanes = lanes_of({"experts": {"groups": 3}, "evaluation": {"actors": 2}})
    assert (lanes.by_name["train toy"].cap, lanes.by_name["evaluate toy"].cap) == (3, 2)


def test_merges_of_one_series_go_to_one_actor_of_several() -> None:
    strategies = [{"init": "base", "deploy": "all", "technique": name} for name in ("ties", "average")]
    one = study(
        strategies, resources={"merging": {"actors": 2}}, grid={"strategies": strategies, "seed": [0, 1]}
    )
    steps = make_plan(one, facts()).steps
    lanes = Lanes(one, steps)
    merges = [step for step in steps.values() if step.kind == "merge"]
    by_first = {}
    for step in merges:
        by_first.setdefault(step.spec["inputs"][0][1], set()).add(lanes.of(step))
    assert len(by_first) == 2 and all(len(actors) == 1 for actors in by_first.values())
    assert set.union(*by_first.values()) == {"merge 0", "merge 1"}


@pytest.mark.parametrize(
    ("resources", "said"),
    [
        ({"experts": {"workers": 4}}, r"an expert \(train toy\) needs 4 x \(1 CPUs, 0 GPUs\), which do not fit into 2 CPUs and 0 GPUs .*only 2"),
        ({"experts": {"gpus": 1}}, r"no node can hold one of them; the largest is 10\.0\.0\.1 with 2 CPUs and 0 GPUs"),
        ({"evaluation": {"cpus": 3}}, r"an evaluation \(evaluate toy\) needs 1 x \(3 CPUs.*resources\.evaluation"),
        ({"by_model": {"toy": {"experts": {"cpus": 4}}}}, r"an expert \(train toy\) needs 1 x \(4 CPUs"),
    ],
)  # fmt: skip
def test_what_can_never_have_a_place_is_refused_with_what_it_wants_and_what_there_is(
    resources: dict[str, Any], said: str
) -> None:
    with pytest.raises(ClusterError, match=said) as caught:
        lanes_of(resources).check(capacity(2))
    assert caught.value.exit_code == 2
    lanes_of(resources).check(capacity(8, 4))


def test_resources_of_a_model_override_those_of_all_key_by_key() -> None:
    one = study_from(
        raw_study(
            ["best_in_time"],
            resources={
                "experts": {"cpus": 3, "gpus": 1},
                "evaluation": {"threads": 2},
                "by_model": {"toy": {"experts": {"gpus": 4, "workers": 2}, "evaluation": {"gpus": 0.5}}},
            },
        )
    )
    mine, others = one.resources.of("toy"), one.resources.of("else")
    assert (mine.experts.gpus, mine.experts.cpus, mine.experts.workers) == (4, 3, 2)
    assert (mine.evaluation.gpus, mine.evaluation.cpus, mine.evaluation.threads) == (0.5, 3, 2)
    assert (others.experts.gpus, others.experts.workers, others.evaluation.gpus) == (1, 1, 1)
    assert (mine.evaluation_device, one.engine.world) == ("cuda", 2)
    assert study_from(one.model_dump(mode="json")) == one


@pytest.mark.parametrize(
    ("resources", "said"),
    [
        ({"by_model": {"tpy": {}}}, "resources.by_model.tpy: the study has no such model; did you mean toy?"),
        ({"by_model": {"toy": {"experts": {"gpu": 1}}}}, "did you mean resources.by_model.toy.experts.gpus?"),
        ({"by_model": {"toy": {"experts": {"gpus": 1.5}}}}, "by_model.toy: gpus: 1.5 is neither"),
        ({"autoscaling": True}, "autoscaling needs experts.groups as a number"),
    ],
)
def test_mistakes_in_resources_are_named(resources: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        study(["best_in_time"], resources=resources)
    assert said in str(caught.value)


def test_nothing_of_where_and_in_which_order_bears_on_identity() -> None:
    plain = study(["best_in_time"])
    wide = study(
        ["best_in_time"],
        resources={
            "merging": {"actors": 4},
            "evaluation": {"cpus": 4, "actors": 2},
            "experts": {"groups": 2},
        },
        schedule={"priority": "trajectories", "max_running": {"train": 1}},
    )
    assert make_plan(plain, facts()).steps.keys() == make_plan(wide, facts()).steps.keys()


def test_every_kind_of_step_has_a_carrier() -> None:
    assert set(CARRIERS) == set(STEPS)
