"""The loss along a task vector: its ends equal the losses of the two models, and between equal weights it is constant."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.workers.model_helpers import Toys
from workers.training.expert import train_expert
from workers.training.landscape import along, second_difference


def test_loss_falls_on_the_new_task_and_the_way_has_the_ends_of_its_models(toys: Toys, out: Path) -> None:
    job = toys.job(out, steps=25)
    train_expert(job)
    found = along(job, Path(job.out), [toys.source("old")])
    assert found["new"][2] < found["new"][0] - 0.1
    there = along(replace(job, init=job.out), Path(job.out), [toys.source("old")])
    for name in ("new", "old"):
        assert there[name] == pytest.approx([found[name][2]] * 3, abs=1e-5)
    assert found == along(job, Path(job.out), [toys.source("old")])


def test_second_difference_of_a_quadratic_is_its_curvature() -> None:
    def loss(at: float) -> float:
        return 3.0 * at**2 / 2 + 0.7 * at + 1

    assert second_difference([loss(0), loss(0.5), loss(1)]) == pytest.approx(3.0)
    assert second_difference([1.0, 1.5, 2.0]) == 0
