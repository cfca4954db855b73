"""Turns a study into the graph of its steps: a pure function, and no step occurs twice.

Sharing in TIME needs no rules here. An expert depends on its start, data, recipe, length and seed, not on its
deployment. Each step is named by what determines its result, and equal names are one step. So experts of init base
serve every deployment and technique, as does a chain of init latest; init all or ema gives one chain per technique and
parameters.
Invariant: the plan depends only on study and facts. Steps contain no path, no name of a study and no degree of
parallelism.
"""

import heapq
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from merge_service import timelines as timeline
from pipeline.errors import PlanError
from pipeline.identity import Texts, canonical, fingerprint, step_fingerprint
from pipeline.kinds.specs import BaseSpec, EvaluateSpec, SourceSpec, Spec
from pipeline.kinds.table import KINDS, STEPS
from pipeline.plan.draft import Draft, effective_params, joint_task, together
from pipeline.plan.settings import scored_on, settings_of
from pipeline.plan.steps import (
    BASE,
    RECORD_BYTES,
    TEST,
    TRAIN,
    VAL,
    About,
    Facts,
    Plan,
    Step,
    TrajectoryPlan,
    World,
    shown,
    total_gflops,
    without_val,
)
from pipeline.study.config import Study
from pipeline.study.grid import Cell
from pipeline.study.sections import BudgetSection, key_of
from pipeline.study.streams import Part, Stream, StreamTask
from workers.data.zero_shot import derived
from workers.training.recipe import Recipe


def make_plan(study: Study, facts: Facts) -> Plan:
    """The plan of a resolved study. Raises PlanError if the data or the budget do not allow it."""
    if not study.is_resolved:
        raise PlanError(f"study {study.name} does not say which datasets play which role; resolve it first")
    planner = Planner(study, facts)
    drafts = [planner.trajectory(cell) for cell in study.cells]
    naive = planner.naive_counts()
    own = planner.score_undeployed_experts()
    trajectories = tuple(
        replace(
            draft,
            points=tuple(
                replace(p, own=own.get((p.train, draft.split)) if p.train else None) for p in draft.points
            ),
        )
        for draft in drafts
    )
    roles = study.roles
    return Plan(
        study=study.name,
        bases={world.base.fingerprint: world.base for world in planner.worlds.values()},
        steps=_in_order(planner.steps),
        trajectories=trajectories,
        streams={world.stream_id: _whole(world.stream) for world in planner.worlds.values()},
        classes=planner.classes,
        adaptation=roles.adaptation,
        held_out=roles.held_out,
        naive=naive,
        naive_gflops=planner.naive_gflops,
        missing=facts.missing,
        zero_shot_groups=study.zero_shot_groups,
        own_groups=study.zero_shot_groups != derived(roles.held_out, roles.pretraining),
        settings=planner.settings,
        retrieval=tuple(sorted(name for name, found in facts.datasets.items() if found.kind == "retrieval")),
    )


def base_step(weights_sha256: str, config_sha256: str = "", model: str = "", disk_bytes: int = 0) -> Step:
    """The step whose artifact is the base model, identified by its bytes. `model` is the name of the base in the study."""
    spec = BaseSpec(KINDS[BASE].revision, weights_sha256, config_sha256)
    body = spec.to_json()
    fp = step_fingerprint(spec.kind, body)
    return Step(spec.kind, fp, BASE, BASE, 0, BASE, body, spec.inputs(), (), 0.0, disk_bytes, fp, model)


def steps_per_task(
    budget: BudgetSection, tasks: int, batch_size: int, gflops_per_sample: float | None, memory_ratio: float
) -> int:
    """Optimizer steps of one task. A total of GFLOPs is memory-adjusted as in FoMo-in-Flux:

    round(total * multiplier / (tasks * gflops_per_sample * batch_size * memory_ratio)). Raises PlanError below one
    step.
    """
    if budget.steps_per_task is not None:
        steps = budget.steps_per_task * budget.multiplier
    elif budget.samples_per_task is not None:
        steps = budget.samples_per_task * budget.multiplier / batch_size
    else:
        assert budget.total_gflops is not None
        if gflops_per_sample is None:
            raise PlanError(
                "budget.total_gflops needs the cost of a sample of this model, which was not measured"
            )
        steps = (
            budget.total_gflops * budget.multiplier / (tasks * gflops_per_sample * batch_size * memory_ratio)
        )
    if round(steps) < 1:
        raise PlanError(
            f"the budget comes to {steps:.3g} steps per task; it must allow at least one: raise it or the multiplier"
        )
    return round(steps)


class Planner:
    """Collects the steps of one study; adding a step twice has no effect."""

    def __init__(self, study: Study, facts: Facts) -> None:
        self.study, self.facts = study, facts
        self.roles = study.roles
        self.worlds: dict[tuple[str, str], World] = {}
        self.steps: dict[str, Step] = {}
        self.classes: dict[str, tuple[str, ...]] = {}
        self.experts: dict[tuple[Any, ...], str] = {}
        self.naive_gflops: float | None = 0.0
        self._scored: dict[tuple[str, str], str] = {}
        self._own_tasks: dict[str, tuple[Step, tuple[str, ...]]] = {}
        self._used: list[dict[str, int]] = []
        self._scored_on: dict[str, dict[str, None]] = {}
        self.texts = Texts()
        self._sources: dict[tuple[Part, str], SourceSpec] = {}
        self._lists: dict[Hashable, list[SourceSpec]] = {}
        self._recipes: dict[str, dict[str, object]] = {}
        self._engines: dict[str, dict[str, object]] = {}
        self._judged = sorted({*self.roles.adaptation, *self.roles.held_out})
        self.settings: dict[str, dict[str, object]] = {}
        self._scored_as: dict[str, dict[str, object]] = {}
        self._check_data()

    def trajectory(self, cell: Cell) -> TrajectoryPlan:
        """Add the steps of one cell. Returns its trajectory."""
        world = self._world(cell)
        steps = self._length(cell, world)
        draft = Draft(self, cell, world, steps)
        points = draft.points()
        length = len(world.stream.tasks)
        if cell.strategy.joint:
            points = [points[0], replace(points[1], t=length)]
        served = {point.deployed for point in points}
        self._used.append(
            {
                "expert" if world.experts else "train": len(draft.experts_used),
                "measure": len(draft.measured),
                "learn": len(draft.learner.used),
                "merge": len(draft.merges_used),
                "evaluate": len(served | draft.experts_used),
            }
        )
        for expert in draft.experts_used:
            self._scored_on.setdefault(expert, {})[cell.split] = None
        cost = draft.gflops(steps * length if draft.experts_used else 0)
        seeing = (*draft.measured.values(), *draft.learner.used.values())
        self.naive_gflops = total_gflops((self.naive_gflops, cost, *seeing))
        return TrajectoryPlan(
            id=cell.id,
            group=cell.group,
            name=cell.name,
            init=cell.strategy.init,
            deploy=cell.strategy.deploy,
            technique=cell.strategy.technique if timeline.policies(cell.strategy) else None,
            params=effective_params(cell.strategy),
            ema_seed=cell.strategy.ema_seed if "ema" in timeline.policies(cell.strategy) else None,
            budget={"steps_per_task": steps, "multiplier": cell.budget.multiplier},
            seed=cell.seed,
            stream=tuple(task.name for task in world.stream.tasks),
            points=tuple(points),
            base=world.base.fingerprint,
            model=world.model,
            stream_id=world.stream_id,
            axes=dict(cell.axes),
            split=cell.split,
            settings_id=self._settings(cell, world),
        )

    def naive_counts(self) -> dict[str, int]:
        """Steps per kind if every trajectory were run alone, including the own-task scores of its experts."""
        present = {step.kind for step in self.steps.values()}
        return {kind: sum(used.get(kind, 0) for used in self._used) for kind in shown(present)}

    def score_undeployed_experts(self) -> dict[tuple[str, str], str]:
        """Add an own-task evaluation for every expert that is never deployed. Returns the evaluation of each expert and split."""
        own = {}
        for fp, (step, datasets) in self._own_tasks.items():
            for split in self._scored_on[fp]:
                served = self._scored.get((fp, split))
                own[fp, split] = served or self._evaluate(fp, step, sorted(datasets), split, "own")
        return own

    def add(self, spec: Spec, about: About) -> str:
        """Add a step to the plan. Returns its fingerprint."""
        body = spec.to_json()
        fp = step_fingerprint(spec.kind, body, self.texts)
        if fp not in self.steps:
            self.steps[fp] = Step(
                spec.kind, fp, about.slug[:120], about.label, about.t, about.task, body, spec.inputs(),
                about.after, about.gflops, about.disk_bytes, about.base, about.model,
            )  # fmt: skip
        return fp

    def evaluate(self, weights: str, step: Step, split: str) -> str:
        """The step that scores deployed weights on one split of all datasets."""
        key = weights, split
        if key not in self._scored:
            self._scored[key] = self._evaluate(weights, step, self._judged, split, "scores")
        return self._scored[key]

    def own_task(self, expert: str, task: StreamTask) -> None:
        """Record the datasets on which an expert must be scored at least, if its task consists of whole datasets."""
        datasets = _datasets(task)
        if datasets:
            self._own_tasks.setdefault(expert, (self.steps[expert], datasets))

    def sources(self, key: Hashable, parts: Callable[[], Iterable[Part]], split: str) -> list[SourceSpec]:
        """The data that a step reads, in the form of a spec: content, not paths. A list of classes is named by its digest.

        Steps that read the same data share one list. `key` identifies the list, and `parts` returns its parts.
        """
        if (key, split) not in self._lists:
            self._lists[key, split] = [self._source(part, split) for part in parts()]
        return self._lists[key, split]

    def recipe(self, recipe: Recipe) -> tuple[Mapping[str, object], str]:
        """A recipe in the form of a spec, and its canonical text."""
        values = recipe.model_dump(mode="json")
        text = canonical(values)
        return self._recipes.setdefault(text, values), text

    def engine(self, model: str) -> Mapping[str, object]:
        """The engine for experts of a model, in the form of a spec."""
        if model not in self._engines:
            self._engines[model] = asdict(self.study.engine_of(model))
        return self._engines[model]

    def measuring_engine(self, model: str) -> Mapping[str, object]:
        """The device and threads on which experts of a model are measured and merges learned, in the form of a spec."""
        threads = self.study.resources.of(model).evaluation.threads or 1
        return {"device": self.study.evaluation_device_of(model), "threads": threads}

    def _source(self, part: Part, split: str) -> SourceSpec:
        found = self._sources.get((part, split))
        if found is None:
            facts = self.facts.datasets[part.dataset]
            digest = None
            if part.classes is not None:
                digest = fingerprint([part.dataset, list(part.classes)])
                self.classes[digest] = part.classes
            found = SourceSpec(
                dataset=part.dataset,
                split=split,
                digest=facts.digests[split],
                prompts=facts.prompts,
                classes=digest,
            )
            if split in facts.stored:
                found["reading"] = "encoded"
            self._sources[part, split] = self.texts.keep(found)
        return found

    def _evaluate(self, weights: str, step: Step, datasets: Sequence[str], split: str, what: str) -> str:
        options = self.study.evaluation
        device = self.study.evaluation_device_of(step.model)
        spec = EvaluateSpec(
            version=KINDS["evaluate"].revision,
            model=weights,
            datasets=self.texts.keep(self.sources((*datasets,), lambda: map(Part, datasets), split)),
            fraction=options.fraction,
            seed=options.seed if options.fraction < 1 else 0,
            device=device,
            details=sorted(set(options.details)),
            precision=options.precision_on(device),
        )
        label = f"{what} of {step.label}" if what == "scores" else f"own task of {step.label}"
        if split != TEST:
            what, label = f"{what}_{split}", f"{split} {label}"
        about = About(
            f"{what}-{step.slug}", label, step.t, step.task,
            disk_bytes=RECORD_BYTES, base=step.base, model=step.model,
        )  # fmt: skip
        return self.add(spec, about)

    def _settings(self, cell: Cell, world: World) -> str:
        """The key of a cell's settings, which trajectories share."""
        if cell.split not in self._scored_as:
            sources = self.sources((*self._judged,), lambda: map(Part, self._judged), cell.split)
            roles, options = [[*self.roles.adaptation], [*self.roles.held_out]], self.study.evaluation
            found = scored_on(sources, roles, options.fraction, options.seed)
            found |= {} if options.precision == "fp32" else {"precision": options.precision}
            self._scored_as[cell.split] = found
        found = settings_of(cell, world, self._scored_as[cell.split])
        key = fingerprint(found)[:16]
        self.settings.setdefault(key, found)
        return key

    def _world(self, cell: Cell) -> World:
        key = key_of(cell.model), key_of(cell.stream)
        if key not in self.worlds:
            facts, stream = self.facts.models[key[0]], self.facts.streams[key[1]]
            base = base_step(
                facts.weights, facts.config, cell.model.config, facts.weights_bytes + RECORD_BYTES
            )
            self.worlds[key] = World(
                cell.model.config,
                facts,
                base,
                stream,
                stream.fingerprint,
                self.facts.datasets,
                self.facts.experts,
            )
        return self.worlds[key]

    def _length(self, cell: Cell, world: World) -> int:
        if world.experts:
            return 0
        what, facts = cell.recipe.trains, world.facts
        ratio = facts.memory_ratio.get(what)
        if ratio is None and cell.budget.total_gflops is not None:
            raise PlanError(f"{cell.id}: the memory that training {what} takes was not measured")
        cost = facts.gflops_per_sample.get(what)
        length = len(world.stream.tasks)
        try:
            return steps_per_task(cell.budget, length, cell.recipe.batch_size, cost, ratio or 1.0)
        except PlanError as error:
            raise PlanError(f"{cell.id}: {error}") from None

    def _check_data(self) -> None:
        """Raise PlanError unless every split that a step may read exists."""
        streams = {part.dataset for stream in self.facts.streams.values() for part in together(stream.tasks)}
        trained = sorted(streams)
        if any(cell.recipe.mixture.pretraining > 0 for cell in self.study.cells):
            trained += self.roles.pretraining
        splits = self.study.splits
        needed = [(dataset, TRAIN) for dataset in trained] + [
            (dataset, split) for split in splits for dataset in (*self._judged, *sorted(streams))
        ]
        problems, lacking = [], []
        for dataset, split in dict.fromkeys(needed):
            facts = self.facts.datasets.get(dataset)
            if facts is None:
                problems.append(f"dataset {dataset} is not among the data that were found")
            elif split == VAL and VAL not in facts.digests:
                lacking.append(dataset)
            elif split not in facts.digests:
                problems.append(
                    f"dataset {dataset} has no {split} split; it has {', '.join(facts.digests) or 'none'}"
                )
            elif facts.samples.get(split) == 0:
                problems.append(f"the {split} split of dataset {dataset} holds no sample")
        problems += [without_val(lacking, self.study.data_root)] if lacking else []
        if problems:
            raise PlanError(f"study {self.study.name}: {'; '.join(dict.fromkeys(problems))}")


def _datasets(task: StreamTask) -> tuple[str, ...]:
    """The datasets of a task that consists of whole datasets, else none."""
    whole = all(part.classes is None for part in task.parts)
    return tuple(part.dataset for part in task.parts) if whole else ()


def _whole(stream: Stream) -> dict[str, tuple[str, ...]]:
    return {task.name: _datasets(task) for task in (*stream.tasks, *joint_task(stream))}


def _in_order(steps: Mapping[str, Step]) -> dict[str, Step]:
    """Topological order; among steps without open needs, the earliest time step first, then train, merge, evaluate."""
    rank = {fp: (step.t, STEPS.index(step.kind), index) for index, (fp, step) in enumerate(steps.items())}
    users: dict[str, list[str]] = {fp: [] for fp in steps}
    missing: dict[str, int] = {}
    for fp, step in steps.items():
        needs = set(_needs(step)) & steps.keys()
        missing[fp] = len(needs)
        for need in needs:
            users[need].append(fp)
    free = [(rank[fp], fp) for fp, count in missing.items() if count == 0]
    heapq.heapify(free)
    ordered: dict[str, Step] = {}
    while free:
        _, fp = heapq.heappop(free)
        ordered[fp] = steps[fp]
        for user in users[fp]:
            missing[user] -= 1
            if missing[user] == 0:
                heapq.heappush(free, (rank[user], user))
    assert len(ordered) == len(steps), "the plan has a cycle"
    return ordered


def _needs(step: Step) -> Iterable[str]:
    return (*step.inputs.values(), *step.after)
