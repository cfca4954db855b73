"""The studies of continual merging: their orders, and that each is one graph that takes in and measures every expert once."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.plan.steps import DatasetFacts
from pipeline.study.config import load_study
from tests.pipeline.plan_toys import facts, make_plan

PLACE = Path(__file__).parents[3] / "configs" / "studies" / "continual_merging"


@pytest.mark.parametrize("count", [8, 14, 20])
def test_ten_orders_are_one_graph(count: int) -> None:
    study = load_study(PLACE / f"tasks_{count}.yaml")
    tasks = list(study.data.adaptation or ())
    assert len(tasks) == count and list(study.experts) == tasks
    known = {
        name: DatasetFacts({"train": f"{name}/train", "test": f"{name}/test"}, f"{name}/prompts")
        for name in tasks
    }
    given = {name: f"{number:064x}" for number, name in enumerate(tasks)}
    plan = make_plan(study.resolved(), replace(facts(), datasets=known, experts=given))
    orders = [list(section.tasks) for section in study.streams]
    for seed, order in enumerate(orders, start=40):
        shuffled = [*tasks]
        random.Random(seed).shuffle(shuffled)
        assert order == shuffled
    kinds = Counter(step.kind for step in plan.steps.values())
    assert kinds["train"] == 0 and kinds["expert"] == count
    assert kinds["measure"] == 2 * count  # gram and fisher, shared by all orders
