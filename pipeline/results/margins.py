"""Margins for the gates of a live service, read off a finished study of the same strategy.

In a study every expert is honest, so what its arrivals lost is what a gate must let pass. A margin is the 90th percentile of these
losses: the smallest loss that nine of ten arrivals do not exceed.

Invariant: an arrival is compared as the service compares it (`merge_service.live.merge_gates`): with the time step before it on the
tasks before it and on the held-out sets, and with the best time step before it on all of these; alone, with the weights that it started
from. Nothing is suggested from fewer than `FEWEST` arrivals.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from merge_service.errors import UserError
from merge_service.timelines import Base, Strategy, deployed, initial, policies
from pipeline.plan.draft import JOINT_TASK, effective_params
from pipeline.results.over_time import mean, split_of

FEWEST = 10
"""Of fewer numbers the 90th percentile is the largest, which says nothing of the next one."""
_GATES = ("gains", "accumulated", "worst", "held_out", "drift")
_MIXTURE = tuple(f"recipe.mixture.{part}" for part in ("pretraining", "update", "buffer"))
Scores = Mapping[str, float]
Body = Mapping[str, Any]


@dataclass(frozen=True)
class Wanted:
    """What a service is, as far as its margins depend on it. `split` is what its gates score."""

    strategy: Strategy
    model: str
    split: str


@dataclass(frozen=True)
class Losses:
    """What arrivals lost, in score, one number each; negative where they gained. `gains` are those of experts alone on their own task,
    empty if the study did not score what they started from. The first arrival of a trajectory has no tasks before it, so `accumulated`
    and `worst` have fewer numbers; without held-out sets `held_out` is empty.
    """

    trajectories: tuple[str, ...]
    arrivals: int
    gains: tuple[float, ...]
    accumulated: tuple[float, ...]
    worst: tuple[float, ...]
    held_out: tuple[float, ...]
    drift: tuple[float, ...]


def losses(answer: Body, wanted: Wanted) -> Losses:
    """The losses of all arrivals of those trajectories of `results.json` that have the strategy, model and split of a service.

    Raises UserError if there is none, if a task is not one whole dataset, or if there are fewer than `FEWEST` arrivals.
    """
    chosen = [one for one in answer["trajectories"] if _matches(one, wanted)]
    if not chosen:
        there = sorted({f"{one['name']} ({one['model']}, {split_of(one)})" for one in answer["trajectories"]})
        raise UserError(
            f"study {answer['study']} has no trajectory of the service's strategy ({_described(wanted.strategy)}) with model "
            f"{wanted.model}, scored on {wanted.split}; it has {', '.join(there) or 'none at all'}"
        )
    rows = [row for one in chosen for row in _rows(one, wanted.strategy, answer["held_out"])]
    columns = {gate: tuple(row[gate] for row in rows if gate in row) for gate in _GATES}
    if len(columns["gains"]) < len(rows):
        columns["gains"] = ()
    few = min((len(found) for found in columns.values() if found), default=0)
    if few < FEWEST:
        raise UserError(
            f"study {answer['study']} has {len(rows)} arrivals of this strategy in {len(chosen)} trajectories, and some gate saw only {few}; "
            f"a 90th percentile needs {FEWEST}: add seeds, orders of the tasks (grid: stream.seed) or tasks to the study"
        )
    return Losses(tuple(one["id"] for one in chosen), len(rows), **columns)


def percentile(values: Sequence[float]) -> float:
    """The 90th percentile: the smallest of the values that at least nine in ten do not exceed."""
    return sorted(values)[-(-9 * len(values) // 10) - 1]


def block(found: Losses, source: str, wanted: Wanted) -> str:
    """The keys of `gates:` as YAML. Margins are rounded up to thousandths and `min_gain` down, each with the arrivals that it rests on.

    Where nine in ten arrivals lose nothing the margin is 0.
    """
    gain = (
        math.floor(round(max(-percentile([-one for one in found.gains]), 0.0) * 1000, 6)) / 1000
        if found.gains
        else None
    )
    lines = [
        f"# From {source}: {found.arrivals} arrivals of {', '.join(found.trajectories)}; scored on {wanted.split}.",
        "# Nine in ten of them stay within each figure. Intervals come on top: with few images more arrivals are held.",
        "gates:",
    ]
    if gain is None:
        lines += [
            "  # solo.min_gain: the study did not score the weights that experts started from; keep your own"
        ]
    else:
        lines += [f"  # alone: {_spread(found.gains, 'gained')}", f"  solo: {{min_gain: {gain:g}}}"]
    lines += [
        f"  # mean: {_spread(found.accumulated)}",
        f"  # worst: {_spread(found.worst)}",
        f"  accumulated: {{margin: {_margin(found.accumulated):g}, worst: {_margin(found.worst):g}}}",
    ]
    if found.held_out:
        lines += [f"  # {_spread(found.held_out)}", f"  held_out: {{margin: {_margin(found.held_out):g}}}"]
    else:
        lines += ["  # held_out: the study has no held-out sets; keep your own margin"]
    lines += [f"  # {_spread(found.drift)}", f"  drift: {_margin(found.drift):g}"]
    return "\n".join(lines)


def _margin(values: Sequence[float]) -> float:
    """Rounding up must not lift a figure that is a whole thousandth but for its last bit."""
    return math.ceil(round(max(percentile(values), 0.0) * 1000, 6)) / 1000


def _spread(values: Sequence[float], verb: str = "lost") -> str:
    return f"{len(values)} arrivals {verb} {min(values):.3f} to {max(values):.3f}, the median {median(values):.3f}"


def _matches(trajectory: Body, wanted: Wanted) -> bool:
    """Whether a trajectory makes the merges of a service's strategy, from experts trained as that strategy says, if it does."""
    strategy, settings = wanted.strategy, trajectory.get("settings", {})
    merges, folds = policies(strategy), "ema" in policies(strategy)
    mine = (
        strategy.init,
        strategy.deploy,
        strategy.technique if merges else None,
        strategy.ema_seed if folds else None,
    )
    its = tuple(trajectory[key] for key in ("init", "deploy", "technique", "ema_seed"))
    alone = strategy.alone if "all" in merges else "merge"
    mixture = tuple(settings.get(key) for key in _MIXTURE)
    return (
        mine == its
        and _seedless(effective_params(strategy)) == _seedless(trajectory["params"])
        and alone == settings.get("strategy.alone", "merge")
        and (strategy.mixture is None or mixture == tuple(strategy.mixture))
        and (trajectory["model"], split_of(trajectory)) == (wanted.model, wanted.split)
        and all(step["task"] != JOINT_TASK for step in trajectory["steps"])
    )


def _seedless(params: Body) -> dict[str, Any]:
    """Parameters as JSON has them, without the seed of random masks: it differs between repetitions of one strategy."""
    return {key: value for key, value in json.loads(json.dumps(params)).items() if key != "seed"}


def _described(strategy: Strategy) -> str:
    merged = f" by {strategy.technique} {dict(strategy.params) or ''}".rstrip() if strategy.technique else ""
    mixture = f", mixture {strategy.mixture}" if strategy.mixture else ""
    return f"init {strategy.init}, deploy {strategy.deploy}{merged}{mixture}"


def _rows(trajectory: Body, strategy: Strategy, held_out: Sequence[str]) -> list[dict[str, float]]:
    """What each arrival of a trajectory cost, by gate."""
    arrived: dict[int, list[str]] = {}
    for name, t in trajectory["arrivals"].items():
        arrived.setdefault(t, []).append(name)
    steps = {step["t"]: step for step in trajectory["steps"]}
    rows, before = [], list[str]()
    for t in range(1, max(steps) + 1):
        if len(arrived.get(t, ())) != 1:
            raise UserError(
                f"{trajectory['id']}: task {steps[t]['task']} of t = {t} is not one whole dataset, as a task of a service is; take a study "
                "whose tasks are datasets"
            )
        rows.append(_row(steps, t, before, held_out) | _alone(steps, t, arrived[t][0], strategy))
        before += arrived[t]
    return rows


def _row(
    steps: Mapping[int, Body], t: int, before: Sequence[str], held_out: Sequence[str]
) -> dict[str, float]:
    candidate, champion = steps[t]["scores"], steps[t - 1]["scores"]
    every = [*before, *held_out]
    best = max((mean(steps[s]["scores"], [*steps[s]["scores"]]) or 0.0, s) for s in range(min(t - 1, 1), t))[
        1
    ]
    found = {"drift": _lost(candidate, steps[best]["scores"], every)} if every else {}
    if before:
        found["accumulated"] = _lost(candidate, champion, before)
        found["worst"] = max(_lost(candidate, champion, [name]) for name in before)
    if held_out:
        found["held_out"] = _lost(candidate, champion, held_out)
    return found


def _alone(steps: Mapping[int, Body], t: int, own: str, strategy: Strategy) -> dict[str, float]:
    """What the expert of t gained alone over its start; nothing where the start was never scored."""
    start, score = initial(strategy, t), steps[t]["expert_own_score"]
    if isinstance(start, Base):
        known = steps[0]["scores"]
    elif start == deployed(strategy, t - 1):
        known = steps[t - 1]["scores"]
    else:
        return {}
    return {} if score is None else {"gains": score - known[own]}


def _lost(candidate: Scores, other: Scores, names: Sequence[str]) -> float:
    """What the candidate's mean over datasets is below the other's."""
    return math.fsum(other[name] - candidate[name] for name in names) / len(names)
