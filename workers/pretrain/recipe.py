"""A pretraining recipe: the sets that a base is trained on, the training, and the rule that ends it.

The rule reads scores on validation splits, so that nobody chooses the length of pretraining after seeing test scores.
Invariant: `ended` and `best` are functions of the scores of the checks so far, so equal scores end training at the same step.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from merge_service.errors import UserError
from workers.training.recipe import Recipe


class Copies(BaseModel):
    """The number of altered copies of each image in the pool, and their changes (see `workers.data.variants`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    copies: int = Field(ge=1, le=1000)
    changes: tuple[str, ...] = ()


class Stopping(BaseModel):
    """Check every `every` steps; end after `patience` checks in a row without a rise, or after `steps` steps.

    A check is a rise if its score is at least `rise` above that of the last rise (the first check is one), so a slow increase
    counts once it is large enough.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    every: int = Field(default=250, ge=1)
    rise: float = Field(default=0.005, gt=0, le=1)
    patience: int = Field(default=3, ge=1)
    steps: int = Field(default=3000, ge=1)


class Pretraining(BaseModel):
    """A pretraining recipe: `recipe.yaml` beside the `open_clip_config.json` of the model it makes.

    Experts may replay the sets of `pool`; those of `base_only` are for the base alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    root: str = "data/mini"
    pool: dict[str, Copies]
    base_only: dict[str, Copies] = Field(default_factory=dict)
    recipe: Recipe
    stop: Stopping = Stopping()
    seed: int = Field(default=0, ge=0)
    storage: Literal["fp32", "fp16"] = "fp32"

    @property
    def taught(self) -> dict[str, Copies]:
        """All sets that the base is trained on, in the order that fixes how their copies are drawn."""
        return {**self.pool, **self.base_only}


def read_settings(recipe_file: Path) -> Pretraining:
    """Read and check a recipe. Raises UserError naming the wrong keys."""
    try:
        return Pretraining.model_validate(yaml.safe_load(recipe_file.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{recipe_file} cannot be read: {error}") from None
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']}" for item in error.errors()
        )
        raise UserError(f"{recipe_file}: {wrong}") from None


def ended(scores: Sequence[float], rule: Stopping) -> bool:
    """Whether none of the last `rule.patience` of these checks is a rise."""
    last, mark = 0, float("-inf")
    for number, score in enumerate(scores):
        if score >= mark + rule.rise:
            last, mark = number, score
    return len(scores) - 1 - last >= rule.patience


def best(scores: Sequence[float]) -> int:
    """The index of the check to keep: that of the highest score, the earliest of equal ones."""
    return max(range(len(scores)), key=lambda number: (scores[number], -number))
