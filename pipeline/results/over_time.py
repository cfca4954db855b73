"""What a study found: KA, ZS and GM over time, per trajectory, from the records in the store.

Scores are fractions in [0, 1]; datasets weigh equally whatever their size (FoMo-in-Flux's A_KA, A_ZS and their geometric
mean). Invariant: every number comes from a committed record, t = 0 is the base, and a study that is not finished gives
what is there and says so.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean as average
from statistics import stdev
from typing import Any, Protocol

from merge_service.checkpoints import WEIGHTS_FILE
from merge_service.errors import UserError
from pipeline.files.disk import write_whole
from pipeline.plan.draft import JOINT_TASK
from pipeline.plan.settings import flat_settings
from pipeline.plan.steps import BASE, SPLITS, TEST, VAL, Plan, Point, TrajectoryPlan
from pipeline.store.artifact import Record
from workers.data.zero_shot import GROUPS, NEVER, REPLAYED
from workers.models.base import describe

Scores = Mapping[str, float]
METRICS = ("ka", "zs", "gm")
OF_GROUPS = {"zs_replayed": REPLAYED, "zs_never_replayed": NEVER}
"""ZS over one group of the held-out sets each; missing where the group is empty."""


class Records(Protocol):
    """What results ask of a store."""

    def record(self, kind: str, fingerprint: str) -> Record | None: ...


class At(Protocol):
    """A point of a trajectory, as far as forgetting is concerned."""

    @property
    def t(self) -> int: ...
    @property
    def task(self) -> str: ...


def mean(scores: Scores, datasets: Sequence[str]) -> float | None:
    """Unweighted mean over datasets; None if there are none or one has no score."""
    if not datasets or any(dataset not in scores for dataset in datasets):
        return None
    return math.fsum(scores[dataset] for dataset in datasets) / len(datasets)


def ka(scores: Scores, adaptation: Sequence[str]) -> float | None:
    """Knowledge accumulation: the mean over the adaptation sets, seen or not."""
    return mean(scores, adaptation)


def zs(scores: Scores, held_out: Sequence[str]) -> float | None:
    """Zero-shot retention: the mean over the held-out sets."""
    return mean(scores, held_out)


def zs_of_groups(scores: Scores, groups: Mapping[str, Sequence[str]]) -> dict[str, float | None]:
    """ZS of what training replays and of what it never does: {"zs_replayed", "zs_never_replayed"}; None for an empty group."""
    return {metric: mean(scores, groups.get(group, ())) for metric, group in OF_GROUPS.items()}


def gm(ka: float | None, zs: float | None) -> float | None:
    """Geometric mean of KA and ZS."""
    return None if ka is None or zs is None else math.sqrt(ka * zs)


class OverTime:
    """Forgetting and backward transfer of one trajectory, point after point: each costs one look at every task.

    `points` are all its points; a(s, i) is the mean over the datasets of task i (`tasks`; by default a task is the dataset
    of its name) of what was deployed at s. A task counts if all its datasets are scored at every s >= 1 so far.
    """

    def __init__(self, points: Sequence[At], tasks: Mapping[str, Sequence[str]] | None = None) -> None:
        self._datasets = {
            point.t: (point.task,) if tasks is None else tuple(tasks.get(point.task, ()))
            for point in points
            if point.t > 0
        }
        self._best: dict[int, float] = {}
        self._own: dict[int, float] = {}

    def add(self, t: int, scores: Scores) -> tuple[float | None, float | None]:
        """(forgetting, backward transfer) at t, whose scores these are; points come in order."""
        now: dict[int, float] = {}
        for i, datasets in list(self._datasets.items()) if t > 0 else []:
            score = mean(scores, datasets)
            if score is None:
                del self._datasets[i]
                continue
            now[i] = score
            self._best[i] = max(self._best.get(i, score), score)
        if t in now:
            self._own[t] = now[t]
        earlier = [i for i in now if i < t]
        drops = [self._best[i] - now[i] for i in earlier]
        gains = [now[i] - self._own[i] for i in earlier if i in self._own]
        return average(drops) if drops else None, average(gains) if gains else None


def forgetting(
    seen: Sequence[tuple[At, Scores]], tasks: Mapping[str, Sequence[str]] | None = None
) -> float | None:
    """Mean over the earlier tasks i of max over s in 1..t of a(s, i), minus a(t, i); None before the second task.

    `seen` are the points up to t, in order, with the scores of what was deployed; `tasks` and a as in `OverTime`. Never
    negative. FoMo-in-Flux, utils/metrics.
    """
    return _last(seen, tasks)[0]


def backward_transfer(
    seen: Sequence[tuple[At, Scores]], tasks: Mapping[str, Sequence[str]] | None = None
) -> float | None:
    """Mean over the earlier tasks i of a(t, i) - a(i, i): what later tasks did to them. None before the second task."""
    return _last(seen, tasks)[1]


def _last(
    seen: Sequence[tuple[At, Scores]], tasks: Mapping[str, Sequence[str]] | None
) -> tuple[float | None, float | None]:
    over_time = OverTime([point for point, _ in seen], tasks)
    found: tuple[float | None, float | None] = (None, None)
    for point, scores in seen:
        found = over_time.add(point.t, scores)
    return found


def results(plan: Plan, store: Records) -> dict[str, Any]:
    """`results.json`. Points whose evaluation is not in the store are left out, and "complete" is then false."""
    store = ReadOnce(store)
    trajectories = [_trajectory(plan, trajectory, store) for trajectory in plan.trajectories]
    complete = all(
        len(found["steps"]) == len(t.points) for found, t in zip(trajectories, plan.trajectories, strict=True)
    )
    return {
        "study": plan.study,
        "plan": plan.fingerprint,
        "complete": complete,
        "adaptation": list(plan.adaptation),
        "held_out": list(plan.held_out),
        "zero_shot_groups": {group: list(sets) for group, sets in plan.zero_shot_groups.items()},
        "retrieval": [name for name in (*plan.adaptation, *plan.held_out) if name in plan.retrieval],
        "bases": [
            found
            for step in plan.bases.values()
            if (found := seen(step.model, store.record(BASE, step.fingerprint)))
        ],
        "trajectories": trajectories,
    }


SEEN = ("preprocess", "preprocess_from", "activation", "objective", "notes")


def seen(model: str, base: Record | None) -> dict[str, Any] | None:
    """How a base sees pictures and what it is trained for: {"model", "sha256", and what its record says of `SEEN`}."""
    if base is None:
        return None
    origin = base.result.get("origin", {})
    return {"model": model, "sha256": _weights(base), **{key: origin[key] for key in SEEN if key in origin}}


def sentence_of(found: Mapping[str, Any]) -> str:
    """The same in words; nothing for a base whose record is older than that."""
    if "preprocess" not in found:
        return ""
    text = f"{found['model']}: pictures with {describe(found['preprocess'])} (from {found['preprocess_from']}); activation {found['activation']}"
    return " ".join([f"{text}; trained with the {found['objective']} loss.", *found["notes"]])


def write_results(path: Path, answer: Mapping[str, Any]) -> None:
    """Write `results.json`, as a whole or not at all."""
    write_whole(path, [*json.JSONEncoder(indent=1, allow_nan=False).iterencode(answer), "\n"], sync=True)


def read_finished(out: Path) -> dict[str, Any]:
    """`results.json` of a study that came to its end in OUT. Raises UserError if there is none, or the study is not finished."""
    path = out / "results.json"
    try:
        answer = json.loads(path.read_text(encoding="utf-8"))
        complete = answer["complete"] is True
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{out} holds no results.json; give the directory of a study that has run to its end"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); run the study again to rewrite it") from None
    if not complete:
        raise UserError(f"{out}: study {answer.get('study')} is not finished; run it again to go on")
    return dict(answer)


def table(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per trajectory and t: trajectory, split, t, task, ka, zs, gm, forgetting, bwt, zs_replayed, zs_never_replayed."""
    return [
        {
            "trajectory": trajectory["id"],
            "split": trajectory["split"],
            **{key: step[key] for key in ("t", "task", *METRICS, "forgetting", "bwt", *OF_GROUPS)},
        }
        for trajectory in answer["trajectories"]
        for step in trajectory["steps"]
    ]


def summary(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per group of trajectories that differ in the seed alone, at the last t that all of them have reached.

    {"group", "split", "seeds", "t", "ka", "ka_sd", "zs", "zs_sd", "gm", "gm_sd", "zs_replayed", ...}: mean and sample standard
    deviation over seeds; the latter is None for a single seed.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for trajectory in answer["trajectories"]:
        groups.setdefault(trajectory["group"], []).append(trajectory)
    rows = []
    for group, members in groups.items():
        reached = [{step["t"]: step for step in member["steps"]} for member in members]
        common = set(reached[0]).intersection(*reached[1:])
        if not common:
            continue
        last = [steps[max(common)] for steps in reached]
        row: dict[str, Any] = {"group": group, "split": split_of(members[0])}
        row |= {"seeds": len(members), "t": max(common)}
        for metric in (*METRICS, *OF_GROUPS):
            values = [step[metric] for step in last if step.get(metric) is not None]
            row[metric] = average(values) if values else None
            row[f"{metric}_sd"] = stdev(values) if len(values) > 1 else None
        rows.append(row)
    return rows


def winner(answer: Mapping[str, Any], by: str = "gm") -> str | None:
    """The trajectory to deploy: the first seed of the group with the highest mean `by` (ka, zs, gm) over its seeds, at its
    last t. The multitask reference, which saw all tasks at once, cannot win; of equal groups the first does. None without scores.

    Where both splits are scored, val decides: what is chosen on test is judged on test no more.
    """
    splits = splits_of(answer)
    over_time = [
        one
        for one in on_split(answer, VAL if VAL in splits else TEST)["trajectories"]
        if all(step["task"] != JOINT_TASK for step in one["steps"])
    ]
    rows = [row for row in summary({"trajectories": over_time}) if row[by] is not None]
    if not rows:
        return None
    group = max(rows, key=lambda row: row[by])["group"]
    return str(next(one["id"] for one in over_time if one["group"] == group))


def split_of(trajectory: Mapping[str, Any]) -> str:
    """What a trajectory's scores are of; results older than splits are of test."""
    return str(trajectory.get("split", TEST))


def splits_of(answer: Mapping[str, Any]) -> tuple[str, ...]:
    """The splits that trajectories are scored on, test first."""
    found = {split_of(trajectory) for trajectory in answer["trajectories"]}
    return tuple(split for split in SPLITS if split in found)


def on_split(answer: Mapping[str, Any], split: str) -> dict[str, Any]:
    """The same results of the trajectories that are scored on one split."""
    return {**answer, "trajectories": [one for one in answer["trajectories"] if split_of(one) == split]}


def grouped(answer: Mapping[str, Any]) -> bool:
    """Whether both groups of the held-out sets hold some, so that they say more than ZS does."""
    groups = answer.get("zero_shot_groups", {})
    return all(groups.get(group) for group in GROUPS)


class ReadOnce:
    """Reads every record once: trajectories share most of theirs."""

    def __init__(self, store: Records) -> None:
        self._store = store
        self._known: dict[str, Record | None] = {}

    def record(self, kind: str, fingerprint: str) -> Record | None:
        if fingerprint not in self._known:
            self._known[fingerprint] = self._store.record(kind, fingerprint)
        return self._known[fingerprint]


def _trajectory(plan: Plan, trajectory: TrajectoryPlan, store: Records) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    over_time = OverTime(trajectory.points, plan.tasks(trajectory))
    for place, point in enumerate(trajectory.points):
        evaluation = store.record("evaluate", point.evaluate)
        if evaluation is None:
            continue
        scores = {dataset: float(score) for dataset, score in evaluation.result["scores"].items()}
        whole = len(steps) == place
        forgotten, backward = over_time.add(point.t, scores) if whole else (None, None)
        steps.append(
            {
                **_step(plan, trajectory, point, scores, store),
                **({"details": evaluation.result["details"]} if "details" in evaluation.result else {}),
                "forgetting": forgotten,
                "bwt": backward,
            }
        )
    return {
        "id": trajectory.id,
        "group": trajectory.group,
        "name": trajectory.name,
        "init": trajectory.init,
        "deploy": trajectory.deploy,
        "technique": trajectory.technique,
        "params": trajectory.params,
        "ema_seed": trajectory.ema_seed,
        "budget": trajectory.budget,
        "seed": trajectory.seed,
        "stream": list(trajectory.stream),
        "model": trajectory.model,
        "axes": trajectory.axes,
        "split": trajectory.split,
        "settings": settings(plan, trajectory),
        "arrivals": arrivals(plan, trajectory),
        "base": trajectory.base,
        "steps": steps,
    }


def settings(plan: Plan, trajectory: TrajectoryPlan) -> dict[str, Any]:
    """What a trajectory runs under, by dotted key; of a plan older than its settings the recipe, which its steps hold."""
    known = plan.settings.get(trajectory.settings_id)
    trained = next((point.train for point in trajectory.points if point.train), None)
    if known is None and trained is not None:
        return flat_settings({"recipe": plan.steps[trained].spec["recipe"]})
    return dict(known or {})


def arrivals(plan: Plan, trajectory: TrajectoryPlan) -> dict[str, int]:
    """At which t each dataset is learnt that a task brings whole; a reference that learns nothing has the stream's."""
    tasks = plan.tasks(trajectory)
    return {name: point.t for point in trajectory.points if point.t > 0 for name in tasks.get(point.task, ())}


def _step(
    plan: Plan, trajectory: TrajectoryPlan, point: Point, scores: Scores, store: Records
) -> dict[str, Any]:
    accumulated, retained = ka(scores, plan.adaptation), zs(scores, plan.held_out)
    expert = store.record(plan.steps[point.train].kind, point.train) if point.train else None
    merged = store.record("merge", point.merge) if point.merge else None
    own = store.record("evaluate", point.own) if point.own else None
    return {
        "t": point.t,
        "task": point.task,
        "ka": accumulated,
        "zs": retained,
        "gm": gm(accumulated, retained),
        **zs_of_groups(scores, plan.zero_shot_groups),
        "scores": dict(scores),
        "expert_sha256": _weights(expert),
        "merged_sha256": _weights(merged),
        "deployed_sha256": _deployed(plan, trajectory, point, store),
        "expert_own_score": mean(own.result["scores"], plan.tasks(trajectory)[point.task]) if own else None,
        "merge_seconds": merged.result.get("merge_seconds", merged.seconds) if merged else None,
        "merged_norm": merged.result.get("merged_norm") if merged else None,
        "cosine": merged.result.get("cosine") if merged else None,
    }


def _deployed(plan: Plan, trajectory: TrajectoryPlan, point: Point, store: Records) -> str | None:
    if point.deployed == BASE:
        return _weights(store.record(BASE, trajectory.base))
    return _weights(store.record(plan.steps[point.deployed].kind, point.deployed))


def _weights(record: Record | None) -> str | None:
    return None if record is None else record.sha256(WEIGHTS_FILE)
