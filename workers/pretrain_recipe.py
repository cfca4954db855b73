"""What a pretraining recipe says: which sets a base is taught, how, and when its training ends.

The end is a rule over scores on validation splits, since otherwise the length of pretraining would be chosen by whoever looks at
the scores. Invariant: `ended` and `best` are functions of the scores of the checks so far, so the same scores end training at the
same step, on any machine.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from merge_service.errors import UserError
from workers.training.recipe import Recipe


class Copies(BaseModel):
    """How often each image of a dataset enters the pool, and what may happen to it (see `workers.data.variants`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    copies: int = Field(ge=1, le=1000)
    changes: tuple[str, ...] = ()


class Stopping(BaseModel):
    """Check every `every` steps; end after `patience` checks in a row without a rise, or after `steps` steps.

    A check is a rise if its score is at least `rise` above that of the last rise (the first check is one), so a slow climb
    counts as soon as it has come far enough.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    every: int = Field(default=250, ge=1)
    rise: float = Field(default=0.005, gt=0, le=1)
    patience: int = Field(default=3, ge=1)
    steps: int = Field(default=3000, ge=1)


class Pretraining(BaseModel):
    """A pretraining recipe: `recipe.yaml` beside the `open_clip_config.json` of the model it makes.

    Experts may replay what `pool` names; what `base_only` names is taught to the base alone.
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
        """All sets that are taught, in the order that fixes how their copies are drawn."""
        return {**self.pool, **self.base_only}


def read_settings(recipe_file: Path) -> Pretraining:
    """Read and check a recipe. Raises UserError naming the keys that are wrong."""
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
    """Whether the last `rule.patience` of these checks, in their order, brought no rise."""
    last, mark = 0, float("-inf")
    for number, score in enumerate(scores):
        if score >= mark + rule.rise:
            last, mark = number, score
    return len(scores) - 1 - last >= rule.patience


def best(scores: Sequence[float]) -> int:
    """Which of the checks is kept: the one with the highest score, the earliest of equal ones."""
    return max(range(len(scores)), key=lambda number: (scores[number], -number))
