"""A study file, read strictly: every mistake found before anything runs, and every one of them told at once.

Invariant: a `Study` from `load_study` is valid in itself; `resolved()` makes it valid for the data it names. Nothing a user
wrote is ignored: an unknown key, a name that is no plain path segment, a number that is none is an error with its key path.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from merge_service import timeline
from merge_service.errors import TechniqueError, UserError
from pipeline.errors import ConfigError
from pipeline.grid import Cell, Expansion, expand, flatten
from pipeline.mistakes import Problem, nearest, validate
from pipeline.sections import (
    BUDGETS,
    BudgetSection,
    DataSection,
    EvaluationSection,
    ModelSection,
    Name,
    ResourcesSection,
    ScheduleSection,
    Section,
    StreamSection,
    TrackingSection,
)
from pipeline.yaml_input import override, read, split_override
from workers.jobs import EngineSpec
from workers.recipe import Recipe

ROLES = ("pretraining", "adaptation", "held_out")


@dataclass(frozen=True)
class Roles:
    """The datasets of each role; `tasks` arrive in this order, KA is over `adaptation`, ZS over `held_out`."""

    tasks: tuple[str, ...]
    pretraining: tuple[str, ...]
    adaptation: tuple[str, ...]
    held_out: tuple[str, ...]


class Study(Section):
    """One study: base, stream, recipe, budget, and a grid of trajectories."""

    name: Name
    model: ModelSection
    data: DataSection
    stream: StreamSection = StreamSection()
    recipe: Recipe = Recipe()
    budget: BudgetSection
    grid: dict[str, list[Any]]
    evaluation: EvaluationSection = EvaluationSection()
    resources: ResourcesSection = ResourcesSection()
    schedule: ScheduleSection = ScheduleSection()
    tracking: TrackingSection = TrackingSection()

    @cached_property
    def expansion(self) -> Expansion:
        """The grid multiplied out, with its problems and warnings."""
        return expand(self.grid, self.recipe, self.budget)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """One cell per trajectory."""
        self._raise(self.expansion.problems)
        return self.expansion.cells

    @property
    def warnings(self) -> tuple[str, ...]:
        """What will run but is known to end badly."""
        return self.expansion.warnings

    @property
    def engine(self) -> EngineSpec:
        """The numerics of expert training, as they are fingerprinted."""
        return self.resources.of(self.model.config).experts.numerics

    @property
    def data_root(self) -> str:
        """The folder that holds the datasets."""
        return self.data.root or f"data/{self.data.suite}"

    @property
    def is_resolved(self) -> bool:
        """Whether the study names its tasks and the datasets of every role."""
        data = self.data
        return None not in (self.stream.tasks, data.pretraining, data.adaptation, data.held_out)

    @property
    def roles(self) -> Roles:
        """The datasets of each role, of a resolved study."""
        data = self.data
        assert self.is_resolved, "resolve the study first"
        return Roles(
            self.stream.tasks or (), data.pretraining or (), data.adaptation or (), data.held_out or ()
        )

    def resolved(self) -> "Study":
        """The study with tasks and roles filled in from the suite, and checked against them.

        Reads `suite.json` under the data root if a role is not given. Raises ConfigError.
        """
        suite = self._suite_roles()
        problems: list[Problem] = []
        tasks = self.stream.tasks or self.data.adaptation or suite.get("adaptation")
        if not tasks:
            problems.append(
                Problem("stream.tasks", "is missing; list the datasets to learn, in the order they arrive")
            )
        found: dict[str, tuple[str, ...]] = {"adaptation": self.data.adaptation or tasks or ()}
        for role in ("pretraining", "held_out"):
            given = getattr(self.data, role)
            if given is None and role not in suite:
                problems.append(
                    Problem(f"data.{role}", "is missing; list its datasets, [] if there are none")
                )
            found[role] = given if given is not None else suite.get(role, ())
        self._raise(problems)
        assert tasks is not None
        data = self.data.model_copy(update=found)
        study = self.model_copy(
            update={"data": data, "stream": self.stream.model_copy(update={"tasks": tuple(tasks)})}
        )
        study.__dict__.pop("expansion", None)
        study._raise(study._misfits())
        return study

    def resolved_yaml(self) -> str:
        """The study as a file that loads to an equal study."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)

    def _suite_roles(self) -> dict[str, tuple[str, ...]]:
        if self.data.suite is None or self.is_resolved:
            return {}
        from workers.data.manifest import read_suite

        try:
            roles = read_suite(self.data_root)["roles"]
        except UserError as error:
            raise ConfigError(f"study {self.name}: data: {error}") from None
        return {role: tuple(names) for role, names in roles.items()}

    def _misfits(self) -> list[Problem]:
        """What is wrong between the grid and the tasks and roles."""
        roles = self.roles
        problems = self._unknown_datasets(roles) + self._unknown_models()
        learnt = sorted(set(roles.held_out) & set(roles.tasks))
        if learnt:
            text = (
                f"{', '.join(learnt)} is also a task of the stream, so it is not held out; remove it from one"
            )
            problems.append(Problem("data.held_out", text))
        checked = set()
        for cell in self.cells:
            if cell.group in checked:
                continue
            checked.add(cell.group)
            if (
                cell.recipe.mixture.pretraining > 0
                and not roles.pretraining
                and timeline.needs_experts(cell.strategy)
            ):
                share = f"{cell.recipe.mixture.pretraining:g}"
                text = f"{cell.name} takes a share of {share} from it, but it is empty; name datasets or set the share to 0"
                problems.append(Problem("data.pretraining", text))
            workers = self.engine.world
            if cell.recipe.batch_size % workers:
                text = f"{cell.recipe.batch_size} samples cannot be shared equally by resources.experts.workers {workers}"
                problems.append(Problem("recipe.batch_size", f"{text}; make it a multiple"))
            try:
                timeline.check(cell.strategy, 1 if cell.strategy.joint else len(roles.tasks))
            except TechniqueError as error:
                problems.append(Problem(f"grid.strategies ({cell.name})", str(error)))
        return problems

    def _unknown_datasets(self, roles: Roles) -> list[Problem]:
        """Names for which the data root holds no folder; nothing is asked of a root that does not exist (yet)."""
        from workers.data.manifest import folder

        root = Path(self.data_root)
        if not root.is_dir():
            return []
        there = sorted(path.name.removeprefix("wds_") for path in root.iterdir() if path.is_dir())
        rest = f"; there are {', '.join(there[:40])}" if there else "; it holds no datasets"
        problems = []
        listed = {"stream.tasks": roles.tasks, **{f"data.{role}": getattr(roles, role) for role in ROLES}}
        for name in dict.fromkeys(name for names in listed.values() for name in names):
            try:
                folder(root, name)
            except UserError:
                key = next(key for key, names in listed.items() if name in names)
                text = f"no dataset {name!r} in {root}{nearest(name, there) or rest}"
                problems.append(Problem(key, text))
        return problems

    def _unknown_models(self) -> list[Problem]:
        """Resources for a model that the study does not have."""
        models = sorted({getattr(cell, "model", None) or self.model.config for cell in self.cells})
        return [
            Problem(
                f"resources.by_model.{name}",
                f"the study has no such model{nearest(name, models)}; it has {', '.join(models)}",
            )
            for name in self.resources.by_model
            if name not in models
        ]

    def _raise(self, problems: Sequence[Problem]) -> None:
        if problems:
            raise ConfigError([f"study {self.name}: {problem.key}: {problem.text}" for problem in problems])


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """The study in a YAML file, with `key.path=value` overrides applied. Raises ConfigError with every mistake found."""
    raw = read(Path(path))
    return study_from(raw, str(path), overrides)


def study_from(raw: Mapping[str, Any], where: str = "study", overrides: Sequence[str] = ()) -> Study:
    """The study in a tree of plain values; `where` is what messages call it. Raises ConfigError."""
    tree = copy.deepcopy(dict(raw))
    grid, problems = flatten(tree.get("grid", {}))
    overridden: set[str] = set()
    for text in overrides:
        key, value = split_override(text)
        overridden.add(key)
        if key.startswith("grid."):
            added, wrong = flatten({key.removeprefix("grid."): value})
            grid.update(added)
            problems = [problem for problem in problems if problem not in wrong] + wrong
        else:
            override(tree, key, value)
            if key == "grid":
                grid, problems = flatten(value)
    _lend_budget(tree, grid)
    study, wrong = validate(Study, {**tree, "grid": grid})
    problems += wrong
    if all(problem.key != "grid" for problem in problems):
        problems += _grid_problems(tree, grid) if study is None else study.expansion.problems
    if problems or study is None:
        raise ConfigError(list(dict.fromkeys(_located(problem, where, overridden) for problem in problems)))
    return study


def _lend_budget(tree: dict[str, Any], grid: Mapping[str, Sequence[Any]]) -> None:
    """A budget that stands only on the grid makes its first value the study's own."""
    budget = tree.get("budget", {})
    axes = [key for key in BUDGETS if grid.get(f"budget.{key}")]
    if isinstance(budget, dict) and axes and not any(key in budget for key in BUDGETS):
        tree["budget"] = {**budget, axes[0]: grid[f"budget.{axes[0]}"][0]}


def _grid_problems(tree: Mapping[str, Any], grid: Mapping[str, Sequence[Any]]) -> Sequence[Problem]:
    """Mistakes in the grid of a study that has others too; axes of a broken section are left for the next time."""
    recipe, _ = validate(Recipe, tree.get("recipe", {}))
    budget, _ = validate(BudgetSection, tree.get("budget", {}))
    usable = dict(grid)
    for name, section in (("recipe", recipe), ("budget", budget)):
        if section is None:
            usable = {key: values for key, values in usable.items() if not key.startswith(f"{name}.")}
    return expand(usable, recipe or Recipe(), budget or BudgetSection(steps_per_task=1)).problems


def _located(problem: Problem, where: str, overridden: set[str]) -> str:
    """The message of a problem, saying whether the file or an override is to be mended."""
    for key in overridden:
        if f"{problem.key}.".startswith((f"{key}.", f"{key}[")) or key.startswith(f"{problem.key}."):
            return f"--set: {problem.key}: {problem.text}"
    return f"{where}: {problem.key}: {problem.text}"
