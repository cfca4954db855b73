"""The data of a report's figures: the frames of one or several studies, with a description of each group and its comparisons.

Invariant: every number of a figure, a table and the page comes from here, so they agree; a group has one name, colour and place
everywhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import pandas as pd

from pipeline.plan.draft import JOINT_TASK
from pipeline.report import analysis, frames
from pipeline.report.axes import Axes, axes_of, technique_label
from pipeline.report.style import COLOURS, OTHER
from workers.data.zero_shot import REPLAYED

SETS = "evaluation.sets"
COSTS = ("gflops", "seconds")
SCALED = {"budget": "steps_per_task", "horizon": "tasks"}
"""The axis of a scaling figure, and the column that measures it."""
TASKS, HELD_OUT = "Learnt, in order of arrival", "Held out"
OF_HELD_OUT = {True: "Held out, replayed", False: "Held out, never replayed"}


class NoData(Exception):
    """Why a figure cannot be drawn from these results; the page shows the reason in its place."""


@dataclass(frozen=True)
class Data:
    """`points` has a row per trajectory and t, `last` one per group (trajectories that differ in the seed alone), `scores` one
    per trajectory, t and dataset. `best` is the advised trajectory, `second` the one it is first compared with, `rows` the rows
    of a heat map of datasets: names under headings. `comparable` is False if studies are scored on different sets.
    """

    points: pd.DataFrame
    last: pd.DataFrame
    scores: pd.DataFrame
    axes: Axes
    advice: analysis.Advice
    best: str
    second: str
    rows: tuple[str, ...]
    comparable: bool

    @property
    def headings(self) -> tuple[str, ...]:
        """The rows that are headings."""
        return tuple(row for row in self.rows if row in (TASKS, HELD_OUT, *OF_HELD_OUT.values()))


def prepare(answers: Sequence[Mapping[str, Any]], costs: pd.DataFrame | None = None) -> Data:
    """The frames of `results.json` of one or several studies on one split. `costs` has `gflops` and `seconds` by trajectory.

    Raises NoData without a score.
    """
    answers = [*map(_prefixed, answers)] if len(answers) > 1 else [*answers]
    points = _together([frames.points(answer) for answer in answers])
    scores = _together([frames.scores(answer) for answer in answers])
    points = points[points["gm"].notna()].copy()
    last = analysis.last(points)
    last["joint"] = last["task"] == JOINT_TASK
    last["reference"] = last["joint"] | (last["deploy"] == "base")
    comparable = last[SETS].nunique(dropna=False) < 2 if SETS in last else len(answers) == 1
    advice = _advice(last[~last["joint"]], comparable)
    coloured = last[~last["reference"]].nlargest(len(COLOURS), "gm")["group"]
    last["shown"] = last["group"].where(last["group"].isin(coloured) | last["reference"], OTHER)
    last = _with_costs(last, points, costs)
    axes = axes_of(last)
    last = _comparisons(last, axes)
    of_group = last.set_index("group")[["shown", "reference", "joint"]]
    scores["row"] = [_row(dataset, measure) for dataset, measure in zip(scores["dataset"], scores["measure"])]

    def first(group: str) -> str:
        return str(points.loc[points["group"] == group, "trajectory"].iloc[0])

    best = first(advice.group)
    others = [t for t in dict.fromkeys(scores["trajectory"]) if t != best]
    second = first(advice.runner_up) if advice.runner_up else (others or [best])[0]
    return Data(
        points.join(of_group, on="group", how="inner"), last, scores, axes, advice, best, second,
        tuple(_rows(answers, scores)), comparable,
    )  # fmt: skip


def chosen(data: Data, sentence: str, trajectory: str) -> Data:
    """The same data with other advice."""
    return replace(data, advice=replace(data.advice, sentence=sentence), best=trajectory)


def _prefixed(answer: Mapping[str, Any]) -> dict[str, Any]:
    """A study among several: its name precedes those of its groups."""
    study = answer["study"]
    return {
        **answer,
        "trajectories": [
            {**one, "id": f"{study}: {one['id']}", "group": f"{study}: {one['group']}"}
            for one in answer["trajectories"]
        ],
    }


def _together(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    filled = [part for part in parts if not part.empty] or parts[:1]
    return pd.concat(filled, ignore_index=True) if len(filled) > 1 else filled[0]


def _advice(rows: pd.DataFrame, comparable: bool) -> analysis.Advice:
    """One advice; if studies are scored on different sets, the advice of each."""
    if comparable:
        advice = analysis.recommend(rows)
        if advice is None:
            raise NoData("no point has a KA and a ZS yet")
        return advice
    found = [analysis.recommend(members) for _, members in rows.groupby("study", sort=False)]
    told = [advice for advice in found if advice is not None]
    if not told:
        raise NoData("no point has a KA and a ZS yet")
    sentence = "The studies are scored on different sets, so their KA, ZS and GM cannot be compared with each other. "
    return replace(told[0], sentence=sentence + " ".join(advice.sentence for advice in told))


def _with_costs(last: pd.DataFrame, points: pd.DataFrame, costs: pd.DataFrame | None) -> pd.DataFrame:
    """Add the cost of a trajectory that is run alone, mean over seeds; missing if one was not measured."""
    if costs is None or costs.empty:
        return last.assign(**dict.fromkeys(COSTS, float("nan")))
    of_group = points.drop_duplicates("trajectory").set_index("trajectory")["group"]
    known = costs.assign(group=costs["trajectory"].map(of_group))
    means = known.groupby("group")[[*COSTS]].agg(lambda values: values.mean(skipna=False))
    return last.join(means, on="group")


def _comparisons(last: pd.DataFrame, axes: Axes) -> pd.DataFrame:
    """Add the columns by which figures compare: `slice` is equal in all but strategy and technique; a line of a scaling figure in
    all but its axis.
    """
    last = last.copy()
    deployable = last[~last["joint"]]
    last["front"] = analysis.pareto(deployable).reindex(last.index, fill_value=False)
    for cost in COSTS:
        priced = analysis.pareto(deployable, "gm", cost, cheap=True)
        last[f"front_{cost}"] = priced.reindex(last.index, fill_value=False)
    last["strategy"] = last["init"] + " → " + last["deploy"]
    last["choice"] = technique_label(last)
    last["settings"] = axes.slices().to_numpy()
    last["slice"] = axes.slices("strategy", "technique").to_numpy()
    last["budget_line"] = axes.slices("budget").to_numpy()
    last["horizon_line"] = axes.slices("stream", "budget").to_numpy()
    for what, column in SCALED.items():
        last[f"{what}_shown"] = _lines(last[~last["reference"]], f"{what}_line", column)
    return last


def _lines(rows: pd.DataFrame, line: str, column: str) -> pd.Series:
    """The best lines by name, all others as `OTHER`; missing for groups that are on no line."""
    several = rows[rows.groupby(line)[column].transform("nunique") > 1]
    best = several.groupby(line, sort=False)["gm"].max().nlargest(len(COLOURS)).index
    return several[line].where(several[line].isin(best), OTHER)


def _rows(answers: Sequence[Mapping[str, Any]], scores: pd.DataFrame) -> list[str]:
    """Datasets as rows under headings: the learnt ones in order of arrival, then the held-out ones, replayed ones first."""
    names = dict(zip(scores["dataset"], scores["row"]))
    arrival = scores.groupby("dataset")["arrival"].min()
    learnt = [*dict.fromkeys(chain.from_iterable(answer["adaptation"] for answer in answers))]
    learnt.sort(key=lambda name: arrival.get(name, float("inf")) if arrival.notna().any() else 0)
    held = [*dict.fromkeys(chain.from_iterable(answer["held_out"] for answer in answers))]
    held = [name for name in held if name not in learnt]
    replayed = set(chain.from_iterable(a.get("zero_shot_groups", {}).get(REPLAYED, ()) for a in answers))
    parts = [(TASKS, learnt)]
    if set(held) & replayed and set(held) - replayed:
        parts += [
            (text, [n for n in held if (n in replayed) is which]) for which, text in OF_HELD_OUT.items()
        ]
    else:
        parts.append((HELD_OUT, held))
    found = []
    for heading, members in parts:
        known = [names[name] for name in members if name in names]
        found += [heading, *known] if known else []
    return found


def _row(dataset: str, measure: str) -> str:
    return dataset if measure == frames.ACCURACY else f"{dataset} ({measure})"
