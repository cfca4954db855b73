"""The cells of a study's grid: one for every strategy, every setting of every axis, and every seed.

Keys of `grid` are `strategies`, `seed`, any dotted key of the sections `model`, `stream`, `recipe`, `budget`, `statistics` and
`learning`, and `evaluation.split`, each with a list of values; `model`, `stream` and `recipe.mixture` also as a whole.
Invariant: cells are in the order of the file (strategies outermost, seeds innermost), each with a unique id, and every
cell can be planned. Settings that are equivalent for a strategy are one cell, whose name and axes leave out what has no
effect. Seeds are never joined, because they are repetitions and not settings.
"""

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from merge_service.techniques import get as technique_called
from merge_service.timelines import Strategy, learns, measured, needs_experts, policies
from pipeline.identity import fingerprint
from pipeline.study.mistakes import Problem, leaf_keys, nearest, short, validate
from pipeline.study.sections import (
    BUDGETS,
    BudgetSection,
    EvaluationSection,
    LearningSection,
    ModelSection,
    StatisticsSection,
)
from pipeline.study.sections_stream import StreamSection
from pipeline.study.strategies import NamedStrategy, read_strategies, trait_label
from workers.training.recipe import Mixture, Recipe

MAX_CELLS = 100_000
SECTIONS: dict[str, Any] = {
    "model": ModelSection,
    "stream": StreamSection,
    "recipe": Recipe,
    "budget": BudgetSection,
    "evaluation": EvaluationSection,
    "statistics": StatisticsSection,
    "learning": LearningSection,
}
WHOLE = ("model", "stream")
"""Sections that can be an axis as a whole: a value replaces the entire section, including its defaults."""
SPLIT = "evaluation.split"
AXES = (
    *WHOLE,
    *(f"{name}.{key}" for name, section in SECTIONS.items() if name != "evaluation" for key in leaf_keys(section)),
    SPLIT,
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """The settings at one point of the grid, beside strategy and seed."""

    model: ModelSection
    stream: StreamSection
    recipe: Recipe
    budget: BudgetSection
    evaluation: EvaluationSection
    statistics: StatisticsSection
    learning: LearningSection


@dataclass(frozen=True)
class Cell:
    """One trajectory to plan: a strategy and its settings.

    `id` is unique; `group` is the id without the seed, so that cells of one group differ only in the seed; `name` is
    the id without budget and seed. `recipe.mixture` is the effective one. `axes` holds the value of every other axis;
    `split` is the split of its scores. `parity` is whose terms
    the strategy was written in, None for our own.
    """

    id: str
    group: str
    name: str
    strategy: Strategy
    model: ModelSection
    stream: StreamSection
    recipe: Recipe
    budget: BudgetSection
    seed: int
    axes: Mapping[str, Any]
    split: str
    statistics: StatisticsSection
    learning: LearningSection
    parity: str | None = None


@dataclass(frozen=True)
class Expansion:
    """The cells of a grid, its problems (then there are no cells), and its warnings."""

    cells: tuple[Cell, ...] = ()
    problems: tuple[Problem, ...] = ()
    warnings: tuple[str, ...] = ()


def flatten(raw: Any) -> tuple[dict[str, list[Any]], list[Problem]]:
    """`grid` with one dotted key per axis and a list under each, whether it was written nested or dotted."""
    if not isinstance(raw, Mapping):
        return {}, [
            Problem(
                "grid", f"{short(raw)} must be a mapping with strategies and, if wanted, seed and other axes"
            )
        ]
    flat: dict[str, list[Any]] = {}
    problems: list[Problem] = []
    for key, value in _leaves(raw, ""):
        if key in flat:
            problems.append(Problem(f"grid.{key}", "is given twice, nested and dotted; keep one"))
        flat[key] = list(value) if isinstance(value, list) else [value]
    for key, values in flat.items():
        if key not in ("strategies", "seed") and key not in AXES:
            valid = f"strategies, seed, {', '.join(AXES)}"
            hint = nearest(key, ["strategies", "seed", *AXES]) or f"; an axis is one of {valid}"
            problems.append(Problem(f"grid.{key}", f"unknown axis{hint}"))
        elif not values and key != "strategies":
            problems.append(
                Problem(f"grid.{key}", "is an empty list, so nothing would run; give at least one value")
            )
    return flat, problems


def expand(grid: Mapping[str, Sequence[Any]], settings: Settings) -> Expansion:
    """All cells of a flattened grid, given the study's own settings."""
    strategies, problems, warnings = read_strategies(grid.get("strategies", ()))
    seeds = list(grid.get("seed", [0]))
    problems += _seed_problems(seeds)
    axes = {key: list(values) for key, values in grid.items() if key in AXES}
    problems += [problem for key, values in axes.items() for problem in _axis_problems(key, values, settings)]
    count = len(strategies) * len(seeds)
    for values in axes.values():
        count *= len(values)
    if count > MAX_CELLS:
        problems.append(
            Problem("grid", f"has {count:,} combinations, more than {MAX_CELLS:,}; split the study")
        )
    if problems:
        return Expansion(problems=tuple(problems))
    varied, problems = _settings(axes, settings)
    if problems:
        return Expansion(problems=tuple(problems))
    return Expansion(tuple(_cells(strategies, varied, seeds)), (), tuple(warnings))


def problems_beside_others(tree: Mapping[str, Any], grid: Mapping[str, Sequence[Any]]) -> Sequence[Problem]:
    """Mistakes in the grid of a study that has other mistakes, too; axes of an invalid section are not checked."""
    stand_ins: dict[str, Any] = {
        "model": ModelSection(config="any"),
        "stream": StreamSection(),
        "recipe": Recipe(),
        "budget": BudgetSection(steps_per_task=1),
        "evaluation": EvaluationSection(),
        "statistics": StatisticsSection(),
        "learning": LearningSection(),
    }
    usable = dict(grid)
    for name, section in SECTIONS.items():
        found, _ = validate(section, tree.get(name, {}))
        if found is None:
            usable = {key: values for key, values in usable.items() if key.split(".")[0] != name}
        stand_ins[name] = found or stand_ins[name]
    return expand(usable, Settings(**stand_ins)).problems


def forbidden_data(cell: Cell) -> str | None:
    """What the merges of a cell would read that its strategy may not: old data, without a replay of old data. None if nothing."""
    together = any(one.of == "experts" for one in measured(cell.strategy))
    learned = learns(cell.strategy) and "all" in policies(cell.strategy)
    if not (together or learned) or cell.recipe.mixture.buffer > 0:
        return None
    what = "learns a merge of" if learned else "measures"
    instead = "a technique that needs data of the new task only"
    return (
        f"{cell.strategy.technique} {what} all experts on images of every task so far, and mixture.buffer: 0 allows no old data; give "
        f"it a mixture with a buffer, or choose {'a fold of adamerging (deploy: ema), or ' if learned else ''}{instead}"
    )


def misfits_of_cells(
    experts: Mapping[str, str], cells: Sequence[Cell], streams: Sequence[StreamSection]
) -> Iterator[Problem]:
    """Problems of all cells together: keys of learning that none of those that learn takes, and experts that do not fit."""
    learned = [cell for cell in cells if learns(cell.strategy)]
    used = {key for cell in learned for key in _taken(cell)}
    for key in dict.fromkeys(
        key for cell in learned for key in cell.learning.model_dump() if key not in used
    ):
        named = ", ".join(dict.fromkeys(str(cell.strategy.technique) for cell in learned))
        yield Problem(f"learning.{key}", f"has no effect with {named} in this study; leave it out")
    yield from _misfits_of_given(experts, cells, streams)


def _taken(cell: Cell) -> set[str]:
    """The keys of learning that bear on a cell that learns."""
    technique = str(cell.strategy.technique)
    warm = {"warm_start"} if "all" in policies(cell.strategy) else set()
    return {*cell.learning.given(technique), *warm, *(("safe",) if technique == "concrete" else ())}


def _misfits_of_given(
    experts: Mapping[str, str], cells: Sequence[Cell], streams: Sequence[StreamSection]
) -> Iterator[Problem]:
    """Problems of experts that are given by task: every task needs one, of one base, and nothing is trained."""
    if not experts:
        return
    tasks = list(dict.fromkeys(task for stream in streams for task in stream.tasks or ()))
    if any(stream.chunks is not None or stream.file is not None for stream in streams):
        yield Problem(
            "experts",
            "belong to datasets, and a stream cuts these into chunks; leave stream.chunks and stream.file out",
        )
        return
    for name in experts:
        if name not in tasks:
            yield Problem(
                f"experts.{name}",
                f"is no task of a stream{nearest(name, tasks)}; they are {', '.join(tasks)}",
            )
    lacking = [task for task in tasks if task not in experts]
    if lacking:
        yield Problem(
            "experts",
            f"has no checkpoint for {', '.join(lacking)}; give one for every task, or none to train all",
        )
    if len({fingerprint(cell.model.model_dump(mode="json")) for cell in cells}) > 1:
        yield Problem("grid.model", "given experts belong to one base; leave the axis out")
    for cell in cells:
        if cell.strategy.joint or (needs_experts(cell.strategy) and cell.strategy.init != "base"):
            text = "trains its experts from other weights than the base, and the experts are given; use init: base, or leave experts out"
            yield Problem(f"grid.strategies ({cell.name})", text)


def with_values(section: Any, name: str, values: Mapping[str, Any]) -> tuple[Any, list[Problem]]:
    """A section with some of its keys (dotted; "" is the whole section) replaced, validated as if it had been written so."""
    raw = values[""] if "" in values else section.model_dump(mode="json")
    if not isinstance(raw, Mapping):
        return None, [Problem(name, f"{short(raw)} must be a mapping of keys to values")]
    if name == "budget" and any(key in BUDGETS for key in values):
        raw = {key: value for key, value in raw.items() if key not in BUDGETS}
    raw = copy.deepcopy(dict(raw))
    for key, value in values.items():
        place = raw
        *path, last = key.split(".")
        for part in path:
            place[part] = place.get(part) or {}
            place = place[part]
        if key:
            place[last] = value
    return validate(SECTIONS[name], raw, name)


def _leaves(raw: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in raw.items():
        if isinstance(value, Mapping) and prefix + key not in ("strategies", "seed"):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _seed_problems(seeds: Sequence[Any]) -> Iterator[Problem]:
    for index, seed in enumerate(seeds):
        if type(seed) is not int or not 0 <= seed < 2**31:
            yield Problem(f"grid.seed[{index}]", f"{short(seed)} must be a whole number from 0 to 2147483647")
        elif seed in seeds[:index]:
            yield Problem(f"grid.seed[{index}]", f"{seed} is listed twice; remove one")


def _axis_problems(key: str, values: Sequence[Any], settings: Settings) -> Iterator[Problem]:
    name, _, path = key.partition(".")
    for index, value in enumerate(values):
        place = f"grid.{key}[{index}]"
        if value in values[:index]:
            yield Problem(place, f"{short(value)} is listed twice; remove one")
            continue
        for problem in with_values(getattr(settings, name), name, {path: value})[1]:
            inside = problem.key.removeprefix(f"{name}.{path}" if path else name)
            yield Problem(f"{place}{inside}" if inside[:1] == "." else place, problem.text)


def _settings(
    axes: Mapping[str, Sequence[Any]], settings: Settings
) -> tuple[list[tuple[dict[str, Any], Settings]], list[Problem]]:
    """Every combination of axis values with the resulting settings."""
    varied, problems = [], []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        parts: dict[str, Any] = {}
        for name in SECTIONS:
            mine = {
                key.partition(".")[2]: value for key, value in chosen.items() if key.split(".")[0] == name
            }
            if mine:
                parts[name], wrong = with_values(getattr(settings, name), name, mine)
                problems += [
                    Problem(f"grid ({short(chosen)}): {problem.key}", problem.text) for problem in wrong
                ]
        varied.append((chosen, replace(settings, **parts)))
    return varied, problems


def _cells(
    strategies: Sequence[NamedStrategy],
    varied: Sequence[tuple[dict[str, Any], Settings]],
    seeds: Sequence[int],
) -> Iterator[Cell]:
    varying = _varying([chosen for chosen, _ in varied])
    seen: dict[str, int] = {}
    for named in strategies:
        met: set[str] = set()
        for every, settings in varied:
            without = {key for key in varying if not _has_effect(key, named.strategy, settings)}
            chosen = {key: value for key, value in every.items() if key not in without}
            if (meaning := fingerprint(chosen)) in met:
                continue
            met.add(meaning)
            traits, budget = _labels(chosen, varying)
            name = "-".join([named.full, *traits])[:100]
            group = "-".join([name, *budget])
            seen[group] = seen.get(group, 0) + 1
            group = group if seen[group] == 1 else f"{group}-{seen[group]}"
            recipe = settings.recipe
            if named.strategy.mixture is not None:
                pretraining, update, buffer = named.strategy.mixture
                mixture = Mixture(pretraining=pretraining, update=update, buffer=buffer)
                recipe = recipe.model_copy(update={"mixture": mixture})
            for seed in seeds:
                label = f"{group}-seed{seed}" if len(seeds) > 1 else group
                strategy = _seeded(named.strategy, seed)
                yield Cell(
                    label, group, name, strategy,
                    settings.model, settings.stream, recipe, settings.budget, seed, chosen, settings.evaluation.split,
                    settings.statistics, settings.learning, named.written.parity,
                )  # fmt: skip


def _has_effect(key: str, strategy: Strategy, settings: Settings) -> bool:
    """Whether an axis has an effect for a strategy.

    How experts are measured has none where nothing is, and how coefficients are learned none where none are.
    A strategy that trains nothing has no recipe and no budget. One with its own mixture does not use the study's. Given
    weights are not drawn from a seed.
    """
    if key.startswith("statistics."):
        return bool(measured(strategy))
    if key.startswith("learning."):
        return learns(strategy)
    if key == "model.seed":
        return settings.model.pretrained is None
    if not needs_experts(strategy):
        return key.split(".")[0] not in ("recipe", "budget")
    return strategy.mixture is None or not f"{key}.".startswith("recipe.mixture.")


def _varying(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The axes with more than one value."""
    first = settings[0] if settings else {}
    return [key for key in first if len({str(chosen[key]) for chosen in settings}) > 1]


def _labels(chosen: Mapping[str, Any], varying: Sequence[str]) -> tuple[list[str], list[str]]:
    """The parts of a name that distinguish a setting from the others; those of the budget separately."""
    keys = [key for key in varying if key in chosen]
    traits = [trait_label(key, chosen[key]) for key in keys if not key.startswith("budget.")]
    return traits, [trait_label(key, chosen[key]) for key in keys if key.startswith("budget.")]


def _seeded(strategy: Strategy, seed: int) -> Strategy:
    """A strategy whose random masks use the seed of the trajectory, unless the study fixes their seed."""
    if strategy.technique is None or "seed" in strategy.params:
        return strategy
    if all(param.name != "seed" for param in technique_called(strategy.technique).params):
        return strategy
    return replace(strategy, params={**strategy.params, "seed": seed})
