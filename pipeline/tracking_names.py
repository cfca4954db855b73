"""What people read in the MLflow UI: names, descriptions and searchable tags of runs and models.

Invariant: pure, and a function of the plan alone, so that a study that was killed and run again has the same names. A
name says only what differs within the study: the seed appears when there are several.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.grid import SPLIT
from pipeline.steps import BASE, TEST, Point, Step, TrajectoryPlan

SEPARATOR = " · "
_INIT = {
    "base": "the base model",
    "latest": "the previous expert",
    "all": "the merge of all earlier experts",
    "ema": "the running merge (EMA) so far",
}
_DEPLOY = {
    "base": "the base model, unchanged",
    "latest": "the newest expert",
    "all": "the merge of all experts so far",
    "ema": "the running merge (EMA)",
}


def trajectory_names(trajectories: Sequence[TrajectoryPlan]) -> dict[str, str]:
    """Trajectory id -> `best_in_time · seed 1`, unique within the study."""
    seeds = _several(trajectory.seed for trajectory in trajectories)
    names = {}
    for trajectory in trajectories:
        parts = [trajectory.name, *([f"seed {trajectory.seed}"] if seeds else [])]
        names[trajectory.id] = SEPARATOR.join(parts)
    return _unique(names)


def expert_names(
    uses: Mapping[str, tuple[TrajectoryPlan, Point]],
    steps: Mapping[str, Step],
    trajectories: Sequence[TrajectoryPlan],
) -> dict[str, str]:
    """Train fingerprint -> `expert t=3 photos_b · init ema · ties`, from the first trajectory and point that use it.

    Experts that mix other data into their task's say `replay`; one of a grid over recipes says its own values.
    """
    seeds = _several(trajectory.seed for trajectory in trajectories)
    budgets = _several(budget_text(trajectory.budget) for trajectory in trajectories)
    names = {}
    for fingerprint, (trajectory, point) in uses.items():
        init = BASE if point.init == BASE else trajectory.init
        parts = [f"expert t={point.t} {point.task}", f"init {init}"]
        if init in ("all", "ema") and trajectory.technique:
            parts.append(trajectory.technique)
        if steps[fingerprint].spec["pretraining"] or steps[fingerprint].spec["buffer"]:
            parts.append("replay")
        axes = {k: v for k, v in trajectory.axes.items() if not k.startswith(("budget.", "evaluation."))}
        parts += [f"{key.rpartition('.')[2]} {value}" for key, value in flat(axes).items()]
        if budgets:
            parts.append(budget_text(trajectory.budget))
        if seeds:
            parts.append(f"seed {trajectory.seed}")
        names[fingerprint] = SEPARATOR.join(parts)
    return _unique(names)


def model_name(trajectory: TrajectoryPlan, names: Mapping[str, str], point: Point) -> str:
    """`best_in_time-t3-photos_b`, then what else tells its trajectory from others (`-seed1`): the UI cuts the end off."""
    name, *rest = names[trajectory.id].split(SEPARATOR)
    return "-".join(plain(part.replace(" ", "")) for part in [name, f"t{point.t}", point.task, *rest])


def plain(text: str) -> str:
    """Text as MLflow takes it in names of models, where / : . % and quotes are forbidden: [A-Za-z0-9_=-] only."""
    return re.sub(r"[^A-Za-z0-9_=-]+", "_", text).strip("_") or "_"


def metric_name(prefix: str, name: str) -> str:
    """`score/photos_b`. MLflow allows letters, digits and _ - . space : / in names of metrics."""
    return f"{prefix}/{re.sub(r'[^A-Za-z0-9_.-]+', '_', name).strip('.') or '_'}"


def budget_text(budget: Mapping[str, Any]) -> str:
    """The length of training of one task: `300 steps`."""
    return f"{budget['steps_per_task']} steps"


def plain_value(value: Any) -> str:
    """A parameter as text: numbers short, everything else as it is."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(plain_value(item) for item in value) + "]"
    return str(value)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as MLflow parameters: {"recipe.lr": "0.001"}; what is None or empty is left out."""
    result: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result.update(flat(value, f"{prefix}{key}."))
        elif value is not None and value != ():
            result[f"{prefix}{key}"] = plain_value(value)
    return result


def strategy_tags(trajectory: TrajectoryPlan) -> dict[str, str]:
    """What a person searches for, the same on runs and models."""
    return {
        "strategy.init": trajectory.init,
        "strategy.deploy": trajectory.deploy,
        "technique": trajectory.technique or "none",
        "budget": budget_text(trajectory.budget),
        "seed": str(trajectory.seed),
        **({} if trajectory.split == TEST and SPLIT not in trajectory.axes else {SPLIT: trajectory.split}),
    }


def on_split(name: str, split: str) -> str:
    """The name of a metric of a run or model that several splits share: plain for test, `ka_val` for val."""
    return name if split == TEST else f"{name}_{split}"


def trajectory_note(trajectory: TrajectoryPlan) -> str:
    """The description of a trajectory's run."""
    init, deploy = (
        _INIT.get(trajectory.init, trajectory.init),
        _DEPLOY.get(trajectory.deploy, trajectory.deploy),
    )
    lines = [f"Every expert starts from **{init}**; after each task the study serves **{deploy}**."]
    if trajectory.technique:
        params = ", ".join(f"{key}={value}" for key, value in flat(trajectory.params).items())
        lines.append(f"Technique: **{trajectory.technique}**{f' ({params})' if params else ''}.")
    tasks = [f"t={point.t} {point.task}" for point in trajectory.points if point.t > 0]
    shown = tasks if len(tasks) <= 12 else [*tasks[:11], "…", tasks[-1]]
    if trajectory.split != TEST:
        lines.append(f"All scores are on the **{trajectory.split}** split.")
    lines.append(f"The step of every metric is the time step t: t=0 is the base, {', '.join(shown)}.")
    return "\n\n".join(lines)


def served_note(trajectory_name: str, point: Point) -> str:
    """What a model is, as the start of its description."""
    return f"What **{trajectory_name}** serves after t={point.t} ({point.task})."


def opening_note(loadable: bool) -> str:
    """How to open a model, as the end of its description."""
    if not loadable:
        return "Only its manifest is kept here; `manifest.json` says where the weights are."
    return (
        "Open it with open_clip alone; MODEL_ID is the Model ID on this page:\n\n```python\nimport mlflow, open_clip\n"
        'path = mlflow.artifacts.download_artifacts("models:/MODEL_ID")\n'
        'model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{path}")\n```'
    )


def _unique(names: Mapping[str, str]) -> dict[str, str]:
    counts = Counter(names.values())
    return {key: name if counts[name] == 1 else f"{name}{SEPARATOR}{key[-8:]}" for key, name in names.items()}


def _several(values: Iterable[Any]) -> bool:
    return len(set(values)) > 1
