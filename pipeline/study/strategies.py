"""The strategies of a study: presets, short forms and lists as checked, named strategies.

Invariant: every strategy that this module returns has passed `timeline.check`, and all full names differ.
"""

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from merge_service import timelines as timeline
from merge_service.errors import TechniqueError
from merge_service.techniques import get as technique_called
from merge_service.timelines import PRESETS, Strategy, translate
from pipeline.study.mistakes import Problem, nearest, validate
from pipeline.study.sections import StrategySection


@dataclass
class NamedStrategy:
    """A checked strategy, its key in the file, and its name; `extras` distinguish it from others of the same name.

    `written` is the strategy before translation into our own terms, and `notes` name what has no effect after it.
    """

    name: str
    strategy: Strategy
    key: str
    written: Strategy
    fixed: bool = False
    notes: list[str] = field(default_factory=list)
    extras: list[str] = field(default_factory=list)

    @property
    def full(self) -> str:
        return "-".join([self.name, *self.extras])


def read_strategies(entries: Sequence[Any]) -> tuple[list[NamedStrategy], list[Problem], list[str]]:
    """The strategies of the entries of `grid.strategies`, with their problems and warnings."""
    problems: list[Problem] = []
    named: list[NamedStrategy] = []
    if not entries:
        problems.append(
            Problem(
                "grid.strategies", f"is missing; name at least one strategy or preset ({', '.join(PRESETS)})"
            )
        )
    for index, entry in enumerate(entries):
        key = f"grid.strategies[{index}]"
        section, wrong = validate(
            StrategySection, {"preset": entry} if isinstance(entry, str) else entry, key
        )
        if section is None:
            problems += wrong
            continue
        for variant in _variants(section, key):
            if isinstance(variant, Problem):
                problems.append(variant)
            else:
                named.append(variant)
    problems += _distinguish(named)
    warnings = [f"{n.key} ({n.full}): {text}" for n in named for text in [*n.notes, *_warnings(n.strategy)]]
    return named, problems, warnings


def _variants(section: StrategySection, key: str) -> Iterator[NamedStrategy | Problem]:
    """The checked strategies of one entry."""
    preset = Strategy(init="", deploy="")
    if section.preset is not None:
        if section.preset not in PRESETS:
            hint = nearest(section.preset, PRESETS)
            yield Problem(
                f"{key}", f"unknown preset {section.preset!r}{hint}; there are {', '.join(PRESETS)}"
            )
            return
        preset = PRESETS[section.preset]
    missing = [
        axis for axis in ("init", "deploy") if section.preset is None and getattr(section, axis) is None
    ]
    if missing:
        yield Problem(
            key,
            f"{' and '.join(missing)} is missing; give init and deploy, or a preset ({', '.join(PRESETS)})",
        )
        return
    inits = section.init or (preset.init,)
    deploys = section.deploy or (preset.deploy,)
    techniques = section.technique or (preset.technique,)
    several = len(inits) * len(deploys) * len(techniques) > 1
    if several and section.name is not None:
        yield Problem(f"{key}.name", "one name cannot stand for several strategies; leave it out")
        return
    for init, deploy, technique in itertools.product(inits, deploys, techniques):
        written = _strategy(section, preset, init, deploy, technique)
        try:
            _check_joint(section, written)
            timeline.check(written)
            strategy, notes = translate(written, seeded=section.ema_seed is not None)
            timeline.check(strategy)
        except TechniqueError as error:
            yield Problem(key, f"({init}, {deploy}, {technique}) {error}" if several else str(error))
            continue
        if strategy.technique is not None:
            strategy = replace(strategy, technique=technique_called(strategy.technique).name)
        name = section.name or _name(section, preset, strategy)
        yield NamedStrategy(name, strategy, key, written, section.name is not None, notes)


def _strategy(
    section: StrategySection, preset: Strategy, init: str, deploy: str, technique: str | None
) -> Strategy:
    inherited = preset.params if technique == preset.technique else {}
    mixture = preset.mixture
    if section.mixture is not None:
        mixture = (section.mixture.pretraining, section.mixture.update, section.mixture.buffer)
    return replace(
        preset,
        init=init,
        deploy=deploy,
        technique=technique,
        params={**inherited, **section.params},
        ema_seed=section.ema_seed or _ema_seed(technique, preset),
        mixture=mixture,
        parity=section.parity,
    )


def _ema_seed(technique: str | None, preset: Strategy) -> str:
    """Where a fold begins if the study does not say: a fold of sums over experts can only begin with the first of these."""
    with contextlib.suppress(
        TechniqueError
    ):  # an unknown technique is reported where the strategy is checked
        if technique is not None and technique_called(technique).resumes:
            return "first_expert"
    return preset.ema_seed


def _check_joint(section: StrategySection, strategy: Strategy) -> None:
    if not strategy.joint:
        return
    if section.init or section.deploy or section.technique or section.params:
        raise TechniqueError(
            f"{section.preset} trains once on all tasks together, so it takes no init, deploy or technique"
        )
    if strategy.mixture is not None and strategy.mixture[2] > 0:
        raise TechniqueError(f"{section.preset} has no earlier tasks to replay; set mixture.buffer to 0")


def _warnings(strategy: Strategy) -> list[str]:
    if strategy.technique is not None and not timeline.policies(strategy):
        return [
            f"technique: {strategy.technique} has no effect: init: {strategy.init} and deploy: {strategy.deploy} merge nothing"
        ]
    return timeline.warnings(strategy)


def _name(section: StrategySection, preset: Strategy, strategy: Strategy) -> str:
    if section.preset is not None:
        changed = [
            f"{axis}_{getattr(strategy, axis)}"
            for axis in ("init", "deploy")
            if getattr(strategy, axis) != getattr(preset, axis)
        ]
        if strategy.technique is not None and strategy.technique != preset.technique:
            changed.append(strategy.technique)
        return "-".join([section.preset, *changed])
    parts = [f"init_{strategy.init}", f"deploy_{strategy.deploy}"]
    return "-".join([*parts, strategy.technique] if strategy.technique else parts)


def _distinguish(named: list[NamedStrategy]) -> Iterator[Problem]:
    """Append to equal names the traits that differ. Strategies that differ in nothing are a mistake."""
    for name in sorted({n.name for n in named}):
        group = [n for n in named if n.name == name]
        if len(group) == 1:
            continue
        for later in range(1, len(group)):
            same = next(
                (n for n in group[:later] if n.strategy == group[later].strategy or group[later].fixed), None
            )
            if same is not None:
                yield Problem(
                    group[later].key, f"repeats {same.key} ({name}); remove one or name them differently"
                )
        traits = [_traits(n.written) for n in group]
        for key in sorted({key for trait in traits for key in trait}):
            if len({str(trait.get(key)) for trait in traits}) > 1:
                for one, trait in zip(group, traits, strict=True):
                    if key in trait and not one.fixed:
                        one.extras.append(trait_label(key, trait[key]))


def _traits(strategy: Strategy) -> dict[str, Any]:
    traits: dict[str, Any] = dict(strategy.params)
    if strategy.ema_seed != "base":
        traits["from"] = strategy.ema_seed
    if strategy.parity is not None:
        traits["parity"] = strategy.parity
    if strategy.mixture is not None:
        traits["mixture"] = dict(zip(("pretraining", "update", "buffer"), strategy.mixture, strict=True))
    return traits


def trait_label(key: str, value: Any) -> str:
    """A short part of a name, safe in paths: x0.5, lr0.001, ViT-B-16, random_chunks20, mixture0.33_0.34_0.33."""
    last = key.rpartition(".")[2]
    if key == "model":
        text = str(value.get("config", ""))
    elif key == "stream":
        text = "_".join(_stream_words(value))
    else:
        words = {
            "multiplier": "x",
            "steps_per_task": "steps",
            "samples_per_task": "samples",
            "config": "",
            "parity": "",
            "split": "",
        }
        values = (
            value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else [value]
        )
        text = words.get(last, last) + "_".join(
            f"{item:g}" if isinstance(item, float) else str(item) for item in values
        )
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text)[:60]


def _stream_words(value: Mapping[str, Any]) -> Iterator[str]:
    """random, chunks20, seed1: the order by its value, flags by their name."""
    yield str(value.get("order") or Path(str(value.get("file") or "dataset_incremental")).stem)
    for key, item in value.items():
        if key not in ("order", "file") and item not in (None, False):
            yield key if item is True or isinstance(item, list | Mapping) else f"{key}{item}"
