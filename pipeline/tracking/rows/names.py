"""Names, descriptions and searchable tags of runs and models in the MLflow UI.

A name contains only what differs within the study: the seed appears if there are several. Names that differ only after the place
where the UI's tables cut them all begin with their number in the study.

Invariant: pure, and a function of the plan alone, so a study that was killed and run again has the same names.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pipeline.plan.steps import BASE, TEST, Point, Step, TrajectoryPlan
from pipeline.study.grid import SPLIT

SEPARATOR = " · "
SHOWN = 20
"""Characters of a name that MLflow's tables show in a window of 1280 pixels."""
_INIT = {
    "base": "the base model",
    "latest": "the previous expert",
    "all": "the merge of all earlier experts",
    "ema": "the running merge (EMA) so far",
}
Key = TypeVar("Key")
_DEPLOY = {
    "base": "the base model, unchanged",
    "latest": "the newest expert",
    "all": "the merge of all experts so far",
    "ema": "the running merge (EMA)",
}


def trajectory_names(trajectories: Sequence[TrajectoryPlan]) -> dict[str, str]:
    """Trajectory id -> `best_in_time · x2 · seed 1`, unique within the study."""
    seeds = _several(trajectory.seed for trajectory in trajectories)
    names = {}
    for trajectory in trajectories:
        budget = trajectory.group.removeprefix(trajectory.name).strip("-")
        parts = [trajectory.name, budget, f"seed {trajectory.seed}" if seeds else ""]
        names[trajectory.id] = SEPARATOR.join(filter(None, parts))
    return apart(_unique(names))


def apart(names: Mapping[Key, str]) -> dict[Key, str]:
    """The names as they are if their visible parts differ; else each with its number before it: `07 · best_in_time`."""
    return _numbered(names) if _several_alike(names.values()) else dict(names)


def _numbered(names: Mapping[Key, str]) -> dict[Key, str]:
    width = len(str(len(names)))
    return {key: f"{number:0{width}}{SEPARATOR}{name}" for number, (key, name) in enumerate(names.items(), 1)}


def _several_alike(names: Iterable[str]) -> bool:
    return max(Counter(name[:SHOWN] for name in names).values(), default=0) > 1


def expert_names(
    uses: Mapping[str, tuple[TrajectoryPlan, Point]],
    steps: Mapping[str, Step],
    trajectories: Sequence[TrajectoryPlan],
) -> dict[str, str]:
    """Train fingerprint -> `expert t=3 photos_b · init ema · ties`, from the first trajectory and point that use it.

    Experts that mix other data into their task's have `replay` in the name; those of a grid over recipes have their own values.
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
    return apart(_unique(names))


def model_names(
    trajectories: Sequence[TrajectoryPlan], names: Mapping[str, str]
) -> dict[tuple[str, int], str]:
    """(Trajectory id, t) -> `best_in_time-t3-photos_b`, then the rest of its trajectory's name (`-seed1`)."""
    found = _model_names(trajectories, names)
    return _model_names(trajectories, _numbered(names)) if _several_alike(found.values()) else found


def _model_names(
    trajectories: Sequence[TrajectoryPlan], names: Mapping[str, str]
) -> dict[tuple[str, int], str]:
    found = {}
    for trajectory in trajectories:
        first, *rest = names[trajectory.id].split(SEPARATOR)
        for point in trajectory.points:
            words = [first, f"t{point.t}", point.task, *rest]
            found[trajectory.id, point.t] = "-".join(plain(word.replace(" ", "")) for word in words)
    return found


def expert_model_name(name: str) -> str:
    """`expert-t3-photos_b-init_ema-average` for `expert t=3 photos_b · init ema · average`."""
    first, *rest = re.sub(r"expert t=(\d+) ", rf"expert{SEPARATOR}t\1{SEPARATOR}", name).split(SEPARATOR)
    return "-".join(map(plain, [first, *rest]))


def plain(text: str) -> str:
    """Text with only the characters that MLflow allows in names of models ([A-Za-z0-9_=-]); / : . % and quotes are forbidden."""
    return re.sub(r"[^A-Za-z0-9_=-]+", "_", text).strip("_") or "_"


def metric_name(prefix: str, name: str) -> str:
    """`score/photos_b`. MLflow allows letters, digits and _ - . space : / in names of metrics."""
    return f"{prefix}/{re.sub(r'[^A-Za-z0-9_.-]+', '_', name).strip('.') or '_'}"


def budget_text(budget: Mapping[str, Any]) -> str:
    """The length of training of one task: `300 steps`."""
    return f"{budget['steps_per_task']} steps"


def plain_value(value: Any) -> str:
    """A parameter as text; numbers in short form."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(plain_value(item) for item in value) + "]"
    return str(value)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as MLflow parameters: {"recipe.lr": "0.001"}; None and empty values are left out."""
    result: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result.update(flat(value, f"{prefix}{key}."))
        elif value is not None and value != ():
            result[f"{prefix}{key}"] = plain_value(value)
    return result


def strategy_tags(trajectory: TrajectoryPlan) -> dict[str, str]:
    """Tags to search by, the same on runs and models."""
    return {
        "strategy.init": trajectory.init,
        "strategy.deploy": trajectory.deploy,
        "technique": trajectory.technique or "none",
        "budget": budget_text(trajectory.budget),
        "seed": str(trajectory.seed),
        **({} if trajectory.split == TEST and SPLIT not in trajectory.axes else {SPLIT: trajectory.split}),
    }


def on_split(name: str, split: str) -> str:
    """The name of a metric of a run or model with several splits: plain for test, `ka_val` for val."""
    return name if split == TEST else f"{name}_{split}"


OPENING = (
    "Classify pictures with it; MODEL_ID is the Model ID on this page:\n\n```python\nimport mlflow, pandas\n"
    'model = mlflow.pyfunc.load_model("models:/MODEL_ID")\n'
    'picture = pandas.DataFrame({"image": [open("picture.png", "rb").read()]})\n'
    'model.predict(picture, params={"labels": ["cat", "dog"]})\n```\n\n'
    'Or open it with open_clip alone: `open_clip.create_model_and_transforms("local-dir:DIR")`, DIR being what'
    ' `mlflow.artifacts.download_artifacts("models:/MODEL_ID")` returns.'
)
"""How to open a model, as the end of its description."""


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
    """The start of a model's description."""
    return f"What **{trajectory_name}** serves after t={point.t} ({point.task})."


def best_note(name: str, by: str, registered: str) -> str:
    """The description of a finished study."""
    return (
        f"Best: **{name}**, with the highest {by.upper()} at its last t (mean over seeds). Metrics of this run are"
        f" its own; what it serves last is `models:/{registered}`."
    )


def _unique(names: Mapping[str, str]) -> dict[str, str]:
    counts = Counter(names.values())
    return {key: name if counts[name] == 1 else f"{name}{SEPARATOR}{key[-8:]}" for key, name in names.items()}


def _several(values: Iterable[Any]) -> bool:
    return len(set(values)) > 1
