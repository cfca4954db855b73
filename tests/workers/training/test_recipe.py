"""Recipes and jobs are data: published defaults, clear refusals, cheap to import."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from workers.jobs import EngineSpec, EvaluateJob, Source
from workers.training.recipe import REPLAY, Recipe


def test_recipe_defaults_are_the_published_ones() -> None:
    recipe = Recipe()
    assert (recipe.lr, recipe.weight_decay, recipe.betas, recipe.eps) == (1e-5, 0.2, (0.9, 0.999), 1e-8)
    assert (recipe.batch_size, recipe.warmup, recipe.min_lr_ratio, recipe.clip) == (512, 0.1, 0.001, 1.0)
    assert (recipe.precision, recipe.trainable, recipe.augment.scale) == ("fp16", "all", (0.9, 1.0))
    assert recipe.mixture.update == 1 and REPLAY.model_dump() == {
        "pretraining": 0.33,
        "update": 0.34,
        "buffer": 0.33,
    }


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"learning_rate": 1}, "learning_rate"),
        ({"mixture": {"update": 0.5}}, "they must sum to 1"),
        ({"mixture": {"update": 0, "buffer": 1}}, "never sees its own task"),
        ({"lr": float("nan")}, "finite"),
        ({"lr": -1}, "greater than 0"),
        ({"betas": (0.9, 1.0)}, r"\[0, 1\)"),
        ({"precision": "fp8"}, "fp32"),
        ({"trainable": "vision"}, "image"),
        ({"batch_size": 1}, "greater than or equal to 2"),
        ({"augment": {"scale": (0.9, 1.5)}}, "cannot be larger than the image"),
        ({"augment": {"ratio": (2, 1)}}, "low <= high"),
        ({"accumulate": 3}, "batch_size 512 cannot be cut into accumulate: 3 equal parts"),
        ({"accumulate": 0}, "greater than or equal to 1"),
        ({"ema": 1.0}, "less than 1"),
        ({"patch_dropout": 1.0}, "less than 1"),
        ({"patch_dropout": 0.5, "trainable": "text"}, "trainable: text freezes it"),
        ({"patch_dropout": 0.5, "compile": True}, "exclude each other"),
    ],
)
def test_recipe_with_a_mistake_is_refused_in_words(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Recipe.model_validate(change)


def test_recipe_survives_json_unchanged() -> None:
    recipe = Recipe(lr=3e-4, mixture=REPLAY)
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    later = Recipe(accumulate=4, ema=0.99, patch_dropout=0.0, channels_last=True)
    assert Recipe.model_validate(later.model_dump(mode="json")) == later
    assert later.model_dump().keys() - recipe.model_dump().keys() == {
        "accumulate",
        "ema",
        "patch_dropout",
        "channels_last",
    }


def test_jobs_travel_between_processes_unchanged() -> None:
    job = EvaluateJob("f", "label", "model", (Source("root", "toys", "test", ("a", "b")),))
    assert pickle.loads(pickle.dumps(job)) == job
    assert pickle.loads(pickle.dumps(EngineSpec("deepspeed", 2, world=4))).zero_stage == 2


def test_recipe_and_jobs_import_without_torch() -> None:
    code = "import sys, workers.training.recipe, workers.jobs; print('torch' in sys.modules)"
    root = Path(__file__).parents[3]
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "False"
