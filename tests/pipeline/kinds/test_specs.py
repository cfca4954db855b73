"""Specs as classes equal the dictionaries of plans and records."""

import pytest

from pipeline.kinds.table import KINDS, STEPS
from pipeline.plan.steps import Plan
from tests.pipeline.plan_toys import REPLAY, facts, make_plan, study


@pytest.fixture(scope="module")
def plan() -> Plan:
    strategies = [
        "best_in_time",
        {"init": "base", "deploy": "all", "technique": ["ties", "regmean", "adamerging"]},
    ]
    return make_plan(study(strategies, 3, recipe={"mixture": REPLAY}), facts())


def test_plan_has_steps_of_every_kind(plan: Plan) -> None:
    assert {step.kind for step in plan.steps.values()} == set(STEPS) - {"expert"}
    planned = {name for name, row in KINDS.items() if row.planned}
    assert {step.kind for step in plan.bases.values()} == planned - set(STEPS)


@pytest.mark.parametrize("kind", KINDS)
def test_spec_of_a_dictionary_gives_the_same_dictionary_and_names_the_inputs(kind: str, plan: Plan) -> None:
    steps = [step for step in (*plan.bases.values(), *plan.steps.values()) if step.kind == kind]
    for step in steps:
        again = KINDS[kind].spec.of(step.spec)
        assert list(again.to_json().items()) == list(step.spec.items())
        assert again.inputs() == step.inputs


def test_what_a_network_decides_of_its_training_and_the_file_of_a_technique_stay_keys_of_the_dictionary() -> (
    None
):
    sources: list[object] = []
    train = {
        "version": 1, "init": "a", "update": sources, "buffer": [], "pretraining": [], "recipe": {}, "steps": 2, "seed": 3,
        "engine": {}, "objective": "sigmoid",
    }  # fmt: skip
    spec = KINDS["train"].spec.of(train)
    assert spec.to_json() == train and spec.to_json()["update"] is sources
    merge = {
        "version": 1,
        "technique": "mine",
        "params": {},
        "form": "merge",
        "base": "b",
        "inputs": [["t1", "c"]],
    }
    for body in (merge, {**merge, "source": "0" * 64}):
        assert KINDS["merge"].spec.of(body).to_json() == body


@pytest.mark.parametrize("kind", STEPS)
def test_dictionary_that_is_no_spec_of_the_kind_is_refused(kind: str) -> None:
    with pytest.raises((KeyError, TypeError)):
        KINDS[kind].spec.of({"version": 1})
