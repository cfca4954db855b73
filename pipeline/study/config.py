"""A study file, read strictly: all mistakes are found before anything runs, and reported together.

Invariant: a `Study` from `load_study` is valid by itself; `resolved()` makes it valid for the data that it names.
Nothing in the file is ignored: an unknown key, a name that is not a plain path segment, or an invalid number is an
error with its key path.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from merge_service import timelines as timeline
from merge_service.errors import TechniqueError, UserError
from pipeline.errors import ConfigError
from pipeline.study.file_kinds import expect
from pipeline.study.grid import (
    AXES,
    SECTIONS,
    Cell,
    Expansion,
    Settings,
    expand,
    flatten,
    forbidden_data,
    misfits_of_cells,
    problems_beside_others,
)
from pipeline.study.mistakes import Problem, nearest, short, validate
from pipeline.study.places import Place
from pipeline.study.sections import (
    BUDGETS,
    BudgetSection,
    DataSection,
    EvaluationSection,
    GroupsSection,
    LearningSection,
    ModelSection,
    Name,
    ScheduleSection,
    Section,
    StatisticsSection,
    StorageSection,
    key_of,
)
from pipeline.study.sections_resources import ResourcesSection
from pipeline.study.sections_stream import StreamSection
from pipeline.study.sections_tracking import TrackingSection
from pipeline.study.streams import datasets_of, length_of
from pipeline.study.suites import Suite, read_suite_file
from pipeline.study.yaml_input import override, read, split_override
from workers.data.zero_shot import Groups, derived, misfit, within
from workers.jobs import EngineSpec
from workers.training.recipe import Recipe

ROLES = ("pretraining", "adaptation", "held_out")


@dataclass(frozen=True)
class Roles:
    """The datasets of each role: KA is over `adaptation`, ZS over `held_out`."""

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
    experts: dict[Name, Place] = {}
    evaluation: EvaluationSection = EvaluationSection()
    statistics: StatisticsSection = StatisticsSection()
    learning: LearningSection = LearningSection()
    resources: ResourcesSection = ResourcesSection()
    schedule: ScheduleSection = ScheduleSection()
    tracking: TrackingSection = TrackingSection()
    storage: StorageSection = StorageSection()

    @cached_property
    def expansion(self) -> Expansion:
        """The cells of the grid, with its problems and warnings."""
        settings = Settings(
            self.model, self.stream, self.recipe, self.budget, self.evaluation, self.statistics, self.learning
        )
        return expand(self.grid, settings)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """One cell per trajectory."""
        self._raise(self.expansion.problems)
        return self.expansion.cells

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about settings that run but are known to end badly."""
        return self.expansion.warnings

    @property
    def engine(self) -> EngineSpec:
        """The numerics of expert training of the study's own model."""
        return self.engine_of(self.model.config)

    def engine_of(self, model: str) -> EngineSpec:
        """The numerics of expert training for a model of the grid, as they enter fingerprints."""
        return self.resources.of(model).experts.numerics

    def evaluation_device_of(self, model: str) -> Literal["cpu", "cuda"]:
        """The device for the scores of a model, as it enters fingerprints."""
        return self.resources.of(model).evaluation_device

    @property
    def data_root(self) -> str:
        """The folder that holds the datasets."""
        return self.data.root or f"data/{self.data.suite}"

    @cached_property
    def suite(self) -> Suite | None:
        """The suite, if a file describes it. Raises ConfigError."""
        return read_suite_file(Path(self.data.suite or "")) if self.data.described else None

    @property
    def is_resolved(self) -> bool:
        """Whether the study names the datasets of every role."""
        return None not in (self.data.pretraining, self.data.adaptation, self.data.held_out)

    @property
    def roles(self) -> Roles:
        """The datasets of each role, of a resolved study."""
        data = self.data
        assert self.is_resolved, "resolve the study first"
        return Roles(data.pretraining or (), data.adaptation or (), data.held_out or ())

    @property
    def zero_shot_groups(self) -> Groups:
        """The held-out sets of a resolved study by group: as stated, else derived from the pretraining pool."""
        roles, stated = self.roles, self.data.zero_shot_groups
        if stated is None:
            return derived(roles.held_out, roles.pretraining)
        return within(stated.model_dump(), roles.held_out)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits on which any trajectory is scored."""
        return tuple(dict.fromkeys(cell.split for cell in self.cells))

    @property
    def models(self) -> tuple[ModelSection, ...]:
        """Every model of the grid once; without a model axis, the study's own."""
        return tuple({key_of(cell.model): cell.model for cell in self.cells}.values())

    @property
    def streams(self) -> tuple[StreamSection, ...]:
        """Every stream of the grid once, as written; `filled` completes one."""
        return tuple({key_of(cell.stream): cell.stream for cell in self.cells}.values())

    def filled(self, stream: StreamSection) -> StreamSection:
        """A stream of a resolved study, completed from the study: its datasets and their dates."""
        if stream.file is not None:
            return stream
        more: dict[str, Any] = {} if stream.tasks else {"tasks": self.roles.adaptation}
        if stream.order == "time" and stream.dates is None and self.suite is not None:
            more["dates"] = self.suite.dates
        return stream.model_copy(update=more)

    @cached_property
    def learnt(self) -> tuple[str, ...]:
        """All datasets that are part of any stream of the grid."""
        names: dict[str, None] = {}
        for section in self.streams:
            names |= dict.fromkeys(datasets_of(section) or self.data.adaptation or ())
        return tuple(names)

    def resolved(self) -> "Study":
        """The study with its roles completed from the suite and checked against them.

        Reads the description of the suite if a role is not given. Raises ConfigError.
        """
        suite, groups = self._of_suite()
        problems: list[Problem] = []
        named = [name for section in self.streams for name in datasets_of(section)]
        adaptation = self.data.adaptation or tuple(dict.fromkeys(named)) or suite.get("adaptation")
        if not adaptation:
            problems.append(
                Problem("stream.tasks", "is missing; list the datasets to learn here or in data.adaptation")
            )
        found: dict[str, Any] = {"adaptation": tuple(adaptation or ())}
        for role in ("pretraining", "held_out"):
            given = getattr(self.data, role)
            if given is None and role not in suite:
                problems.append(
                    Problem(f"data.{role}", "is missing; list its datasets, [] if there are none")
                )
            found[role] = tuple(given if given is not None else suite.get(role, ()))
        self._raise(problems)
        if self.data.zero_shot_groups is None and groups is not None:
            found["zero_shot_groups"] = GroupsSection(**within(groups, found["held_out"]))
        study = self.model_copy(update={"data": self.data.model_copy(update=found)})
        study = study.model_copy(update={"stream": study.filled(study.stream)})
        for kept in ("expansion", "learnt"):
            study.__dict__.pop(kept, None)
        study._raise(study._misfits())
        return study

    def settled(self) -> "Study":
        """The study with an absolute path of its store, because OUT/study.yaml may be read from any directory."""
        where = self.storage.store
        if where is None or "://" in where:
            return self
        absolute = str(Path(where).expanduser().absolute())
        return self.model_copy(update={"storage": self.storage.model_copy(update={"store": absolute})})

    def resolved_yaml(self) -> str:
        """The study as a file that loads to an equal study."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)

    def _of_suite(self) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
        """Roles and zero-shot groups (None: not stated) from the suite; empty if the study states all of them."""
        if self.suite is not None:
            groups = self.suite.zero_shot_groups
            return self.suite.roles, groups.model_dump() if groups else None
        data, file = self.data, Path(self.data_root) / "suite.json"
        complete = self.is_resolved and (data.suite is None or data.zero_shot_groups is not None)
        if complete or (not file.is_file() and (data.suite is None or self.is_resolved)):
            return {}, None
        from workers.data.manifest import read_suite

        try:
            suite = read_suite(self.data_root)
        except UserError as error:
            raise ConfigError(f"study {self.name}: data: {error}") from None
        return suite["roles"], suite.get("zero_shot_groups")

    def _misfits(self) -> list[Problem]:
        """Problems between the grid and the tasks and roles."""
        roles = self.roles
        problems = self._unknown_datasets(roles) + self._unknown_models() + self._misgrouped(roles)
        problems += misfits_of_cells(self.experts, self.cells, [self.filled(one) for one in self.streams])
        if any(timeline.needs_experts(cell.strategy) for cell in self.cells) and not self.experts:
            problems += _lost_shares(self.recipe, length_of(self.filled(self.stream)), self.engine.world)
        learnt = sorted(set(roles.held_out) & set(self.learnt))
        if learnt:
            text = (
                f"{', '.join(learnt)} is also a task of the stream, so it is not held out; remove it from one"
            )
            problems.append(Problem("data.held_out", text))
        checked = set()
        for cell in self.cells:
            if cell.group not in checked:
                known = {problem.text for problem in problems}
                found = self._misfits_of(cell, roles)
                problems += [p for p in found if not known & {p.text, p.text.removeprefix(f"{cell.name}: ")}]
            checked.add(cell.group)
        return problems

    def _misfits_of(self, cell: Cell, roles: Roles) -> Iterator[Problem]:
        share = 0.0 if self.experts else cell.recipe.mixture.pretraining
        if share > 0 and not roles.pretraining and timeline.needs_experts(cell.strategy):
            text = f"{cell.name} takes a share of {share:g} from it, but it is empty; name datasets or set the share to 0"
            yield Problem("data.pretraining", text)
        engine = self.engine_of(cell.model.config)
        workers, parts = engine.world, engine.world * cell.recipe.accumulate
        if cell.recipe.batch_size % parts:
            text = f"{cell.recipe.batch_size} samples cannot be shared equally by resources.experts.workers: {workers}"
            text += f" in recipe.accumulate: {cell.recipe.accumulate} parts each" if parts > workers else ""
            yield Problem("recipe.batch_size", f"{text}; make it a multiple")
        elif timeline.needs_experts(cell.strategy):
            tasks = 1 if cell.strategy.joint else length_of(self.filled(cell.stream))
            yield from _lost_shares(cell.recipe, tasks, workers, cell.name)
            yield from _impossible(cell.recipe, engine)
        try:
            timeline.check(cell.strategy, 1 if cell.strategy.joint else length_of(self.filled(cell.stream)))
        except TechniqueError as error:
            yield Problem(f"grid.strategies ({cell.name})", str(error))
        if rights := forbidden_data(cell):
            yield Problem(f"grid.strategies ({cell.name})", rights)

    def _unknown_datasets(self, roles: Roles) -> list[Problem]:
        """Names without a folder in the data root; empty while the root does not exist."""
        from workers.data.manifest import folder

        root = Path(self.data_root)
        if self.suite is not None or not root.is_dir():
            return [] if self.suite is None else self._undescribed(self.suite, roles)
        there = sorted(path.name.removeprefix("wds_") for path in root.iterdir() if path.is_dir())
        rest = f"; there are {', '.join(there[:40])}" if there else "; it holds no datasets"
        problems = []
        for name, key in self._named(roles).items():
            try:
                folder(root, name)
            except UserError:
                text = f"no dataset {name!r} in {root}{nearest(name, there) or rest}"
                problems.append(Problem(key, text))
        return problems

    def _unknown_models(self) -> list[Problem]:
        """Resources for models that the study does not have."""
        models = sorted({model.config for model in self.models})
        return [
            Problem(
                f"resources.by_model.{name}",
                f"the study has no such model{nearest(name, models)}; it has {', '.join(models)}",
            )
            for name in self.resources.by_model
            if name not in models
        ]

    def _misgrouped(self, roles: Roles) -> list[Problem]:
        stated = self.data.zero_shot_groups
        wrong = misfit(stated.model_dump(), roles.held_out, roles.pretraining) if stated else ""
        return [Problem("data.zero_shot_groups", wrong)] if wrong else []

    def _undescribed(self, suite: Suite, roles: Roles) -> list[Problem]:
        known = [name for names in suite.roles.values() for name in names]
        return [
            Problem(key, f"no dataset {name!r} in {self.data.suite}{nearest(name, known)}")
            for name, key in self._named(roles).items()
            if name not in known
        ]

    def _named(self, roles: Roles) -> dict[str, str]:
        """Every dataset that the study names, with the first key that names it."""
        listed = {"stream.tasks": self.learnt, **{f"data.{role}": getattr(roles, role) for role in ROLES}}
        found: dict[str, str] = {}
        for key, names in listed.items():
            for name in names:
                found.setdefault(name, key)
        return found

    def _raise(self, problems: Sequence[Problem]) -> None:
        if problems:
            raise ConfigError([f"study {self.name}: {problem.key}: {problem.text}" for problem in problems])


def _lost_shares(recipe: Recipe, tasks: int, workers: int, name: str = "") -> Iterator[Problem]:
    """Shares of the mixture that give no sample in a batch, at the first task or at any later one."""
    from workers.data.mixture import lost_shares

    for buffered in (True, False) if tasks > 1 else (False,):
        if problem := lost_shares(recipe.batch_size, recipe.mixture.model_dump(), buffered, workers):
            yield Problem("recipe.batch_size", f"{name + ': ' if name else ''}recipe.mixture {problem}")
            return


def _impossible(recipe: Recipe, engine: EngineSpec) -> Iterator[Problem]:
    """Keys of a recipe that its engine cannot carry out."""
    if recipe.tf32 and engine.device == "cpu":
        yield Problem("recipe.tf32", "is a format of GPUs, and resources.experts.gpus is 0; remove one")
    if recipe.adapter is not None and engine.kind != "torch":
        yield Problem("recipe.adapter", "is trained by one process of plain torch; give engine: torch")
    if engine.zero_stage == 3 and (recipe.ema is not None or recipe.compile):
        key = "ema" if recipe.ema is not None else "compile"
        text = "needs parameters that are whole on every worker, and resources.experts.zero_stage: 3 spreads them"
        yield Problem(f"recipe.{key}", f"{text}; use zero_stage: 2 or less, or remove it")


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """The study in a YAML file, with `key.path=value` overrides applied. Raises ConfigError with every mistake found."""
    raw = read(Path(path))
    expect("study", raw, Path(path))
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
    _fill_from_grid(tree, grid)
    if tree.get("experts") and "budget" not in tree:  # nothing is trained
        tree["budget"] = {"steps_per_task": 1}
    study, wrong = validate(Study, {**tree, "grid": grid})
    problems += [_axis_meant(problem, tree) for problem in wrong]
    if all(problem.key != "grid" for problem in problems):
        problems += problems_beside_others(tree, grid) if study is None else study.expansion.problems
    if problems or study is None:
        raise ConfigError(list(dict.fromkeys(_located(problem, where, overridden) for problem in problems)))
    return study


def _axis_meant(problem: Problem, tree: Mapping[str, Any]) -> Problem:
    """If a list stands where one value belongs and each of its values would be valid, say how to write an axis."""
    if problem.key in ("seed", "seeds", "strategies"):
        return Problem(
            problem.key, f"is an axis: write grid.{'seed' if problem.key == 'seeds' else problem.key}"
        )
    for axis in sorted(AXES, key=len, reverse=True):
        if problem.key != axis and not problem.key.startswith((f"{axis}[", f"{axis}.")):
            continue
        values: Any = tree
        for part in axis.split("."):
            values = values.get(part) if isinstance(values, Mapping) else None
        section, _, path = axis.partition(".")
        if (
            isinstance(values, list)
            and values
            and all(_is_valid_with(section, path, tree, value) for value in values)
        ):
            text = f"{short(values)} is a list, and one value belongs here; to run every one of them write grid.{axis}"
            return Problem(axis, text)
    return problem


def _is_valid_with(section: str, path: str, tree: Mapping[str, Any], value: Any) -> bool:
    """Whether a section of the study is valid with one key of it (dotted; "" is the whole section) replaced."""
    raw: Any = value
    if path:
        raw = copy.deepcopy(tree.get(section))
        override(raw, path, value)
    return isinstance(raw, dict) and validate(SECTIONS[section], raw, section)[0] is not None


def _fill_from_grid(tree: dict[str, Any], grid: Mapping[str, Sequence[Any]]) -> None:
    """Use the first value on the grid for a model or budget that the study itself does not give."""
    if "model" not in tree and grid.get("model"):
        tree["model"] = grid["model"][0]
    budget = tree.get("budget", {})
    axes = [key for key in BUDGETS if grid.get(f"budget.{key}")]
    if isinstance(budget, dict) and axes and not any(key in budget for key in BUDGETS):
        tree["budget"] = {**budget, axes[0]: grid[f"budget.{axes[0]}"][0]}


def _located(problem: Problem, where: str, overridden: set[str]) -> str:
    """The message of a problem, which names the file or the override to correct."""
    for key in overridden:
        if f"{problem.key}.".startswith((f"{key}.", f"{key}[")) or key.startswith(f"{problem.key}."):
            return f"--set: {problem.key}: {problem.text}"
    return f"{where}: {problem.key}: {problem.text}"
