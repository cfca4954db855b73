"""Losses, gradients and learned coefficients against the golden vectors."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file as load_torch

from tests.merge_service.statistics import golden
from tests.workers.learning import golden_runs
from workers.evidence.asked import Asked
from workers.evidence.network import open_model
from workers.learning import losses
from workers.learning.blends import put
from workers.learning.learn import learn
from workers.learning.wanted import Wanted


@pytest.mark.parametrize(
    "case", [one for one in golden.CASES if one["kind"] == "learn"], ids=lambda case: case["name"]
)
def test_learning_gives_the_golden_coefficients(case: dict) -> None:
    wanted = Wanted.of(case["technique"], case["params"])
    found = learn(wanted, golden_runs.where(case), golden_runs.inputs(case))
    golden.check_tensors(case, found)
    np.testing.assert_allclose(found.losses, case["loss"], rtol=1e-6)


def test_gradient_of_coefficients_gives_the_golden_vector() -> None:
    case = golden.case("adamerging-gradient")
    with golden_runs.begun(case, Wanted.of("adamerging", {"start": 0.3})) as run:
        loss, found = run.gradients(0, [0, 1, 2])
    named = {f"grad:{name}": one.numpy() for name, one in found.items()}
    golden.check_tensors(case, {"loss": np.float64(loss), **named})


def test_divergence_from_experts_gives_the_golden_vector() -> None:
    case, found = golden.case("dam-kl"), []
    with golden_runs.begun(case, Wanted.of("adamerging", {"start": 0.3})) as run:
        for path, task in zip(golden.files(case, "experts"), run.objective.tasks):
            own = task.all_log_p(open_model(path, Asked("gram"), golden_runs.config(case)))
            found.append(float(losses.divergence(task.all_log_p(run.members.model), own, 2.0)))
    golden.check_tensors(case, {"kl": np.array(found)})


def test_similarity_gives_the_golden_vector() -> None:
    case = golden.case("dam-similarity")
    columns = load_torch(golden.FOLDER / case["coefficients"])
    found = case["params"]["similarity"] * losses.similarity(columns.values())
    golden.check_tensors(case, {"similarity": found.numpy()})


def test_filter_of_tinting_gives_the_golden_vector() -> None:
    case = golden.case("tinting-filter")
    given = load_torch(golden.FOLDER / case["inputs"])
    loss = losses.tinted(given["merged"], given["expert"])
    assert loss is not None
    used = losses.sure(given["merged"], given["expert"])
    golden.check_tensors(case, {"used": used.double().numpy(), "loss": loss.numpy()})
    assert losses.tinted(torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 1.0]])) is None


def test_losses_of_triggers_give_the_golden_vector() -> None:
    case = golden.case("concrete-safe-losses")
    triggers = load_torch(golden.FOLDER / case["coefficients"])["trigger"]
    found = {"natural": 0.0, "defence": 0.0, "trigger_loss": 0.0}
    gradients = []
    with golden_runs.begun(case, Wanted.of("concrete_safe", {"start": 0.3})) as run:
        for name in run.names:
            put(run.members, name, [0.3] * 3)
        model, objective = run.members.model, run.objective
        for task, trigger in zip(objective.tasks, triggers):
            images = task.images(model, np.arange(task.size))
            with torch.no_grad():
                found["natural"] += float(losses.entropy(task.log_p(model, images)))
                found["defence"] += float(losses.entropy(task.log_p(model, images + trigger)))
            loss, gradient = objective.attack(task, images, trigger)
            found["trigger_loss"] += loss
            gradients.append(gradient)
    numbers = {name: np.float64(value) for name, value in found.items()}
    golden.check_tensors(case, {**numbers, "grad:trigger": torch.stack(gradients).numpy()})
