"""`temporal-merge report OUT ...`: writes OUT/report from the results in OUT.

Invariant: a report is built beside the old one and replaces it as a whole; nothing else in OUT changes. The page states what is
not scored yet, and names every figure that cannot be drawn with the reason.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import vl_convert

from merge_service.errors import UserError
from pipeline.plan.steps import TEST, VAL, Plan, critical_path, total_gflops
from pipeline.report import figures as draw
from pipeline.report.cost import costs, elapsed, own_costs
from pipeline.report.data import chosen
from pipeline.report.figures import Data, Figure, NoData
from pipeline.report.page import Page, frames_of, page, records, spec_of, still, svg_of
from pipeline.report.sources import Studied, compare, curves, notes_of
from pipeline.report.style import OTHER
from pipeline.report.summary import summary_of
from pipeline.report.winner import command_of, weight_to_try, winner_of
from pipeline.results.over_time import on_split, splits_of
from pipeline.store.versions import counted, mixed_text
from pipeline.study.mistakes import short

REPORT, PAGE = "report", "report.html"
UNSCORED = ("sharing", "similarity", "training")
"""Figures that show no scores, and are therefore the same on every split."""


def build_report(
    out: Path, split: str | None = None, *, more: Sequence[Path] = (), to: Path | None = None
) -> dict[str, Any]:
    """Write OUT/report, with the scores on one split. Raises UserError if OUT holds no run or nothing was scored yet.

    With `more` runs the report covers all of them, in `to` or else in a directory beside the first that is named after them.
    Returns {"html", "split", "figures", "tables": paths, "missing": {title: why it was not drawn}, "complete", "advice"}.
    """
    places = [*dict.fromkeys(path.absolute() for path in (out, *more))]
    if len(places) < 1 + len(more):
        raise UserError(f"{short([str(out), *map(str, more)])}: a run is named twice; name each once")
    studies = _named_apart([Studied.read(path) for path in (out, *more)])
    return write_report(studies, split, to)


def file_report(out: Path, answer: Mapping[str, Any]) -> tuple[int, str | None]:
    """Attach a report's page and pictures to the study's run in MLflow: (rows still pending, why)."""
    from pipeline.tracking.tracker import file_with_study
    from pipeline.workspace.opening import open_plan

    pictures = [path for path in answer["figures"] if path.endswith(".png")]
    names = [str(Path(path).relative_to(out)) for path in (answer["html"], *pictures)]
    return file_with_study(out, open_plan(out).fingerprint, names, timeout=20)


def write_report(
    studies: Sequence[Studied], split: str | None = None, to: Path | None = None
) -> dict[str, Any]:
    """As `build_report`, for runs that have been read.

    A report is of one split, `split` or else the first that is scored, because scores on two splits are not comparable. A report
    on val goes to OUT/report-val if there are scores on test as well.
    """
    splits = tuple(s for s in (TEST, VAL) if any(s in splits_of(one.answer) for one in studies))
    split = _split_to_show(studies, splits, split)
    final = _free(to or _place(studies, REPORT if split == splits[0] else f"{REPORT}-{split}"))
    data = _prepared(studies, split)
    drawn, missing = draw_all(data, studies)
    if split == VAL:
        drawn = [f if f.name in UNSCORED else replace(f, title=f"{f.title} (on {VAL})") for f in drawn]
    said = _page(studies, data, split, splits)
    stage = final.with_name(f".{final.name}.partial")
    shutil.rmtree(stage, ignore_errors=True)
    written = _write(stage, data, drawn, pd.concat([table.assign(study=name) for name, table in said.spent]))
    said = replace(said, figures=drawn, missing=missing, here=final)
    (stage / PAGE).write_text(page(said, data), encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    stage.replace(final)
    return {
        "html": str(final / PAGE),
        "split": split,
        **{kind: [str(final / kind / name) for name in names] for kind, names in written.items()},
        "missing": missing,
        "complete": all(one.answer["complete"] for one in studies),
        "advice": said.advice,
    }


def _named_apart(studies: Sequence[Studied]) -> list[Studied]:
    """Add the directory to the names of studies that have the same name."""
    names = [one.plan.study for one in studies]
    return [
        one
        if names.count(one.plan.study) == 1
        else replace(one, answer={**one.answer, "study": f"{one.plan.study} in {one.out}"})
        for one in studies
    ]


def _free(place: Path) -> Path:
    """The directory of a report. Raises UserError if it holds something else, because a report replaces its directory."""
    if place.exists() and not (
        place.is_dir() and ((place / PAGE).is_file() or not any(place.iterdir()) or place.name == REPORT)
    ):
        raise UserError(
            f"{place} is there and is no report, and a report would replace it; give --to another directory"
        )
    return place if place.name else place.absolute()


def _place(studies: Sequence[Studied], name: str) -> Path:
    first = studies[0].out
    if len(studies) == 1:
        return first / name
    return first.parent / "-".join([name, *(one.out.name for one in studies)])[:120]


def _split_to_show(studies: Sequence[Studied], splits: Sequence[str], asked: str | None) -> str:
    """The requested split, else the first on which something is scored. Raises UserError."""
    if asked not in (None, *splits):
        raise UserError(f"--split {asked}: the study is scored on {' and '.join(splits)}, so choose that")
    begun = (
        split
        for split in splits
        if any(t["steps"] for one in studies for t in on_split(one.answer, split)["trajectories"])
    )
    return asked or next(begun, splits[0])


def _prepared(studies: Sequence[Studied], split: str) -> Data:
    """The data of the figures on one split; the advice on test is chosen on val if that is scored too."""
    priced = [own_costs(one.plan, one.records) for one in studies]
    if len(studies) > 1:
        priced = [p.assign(trajectory=f"{one.answer['study']}: " + p["trajectory"]) for one, p in zip(studies, priced)]  # fmt: skip
    try:
        data = draw.prepare([on_split(one.answer, split) for one in studies], pd.concat(priced))
    except NoData as why:
        places = " and ".join(str(one.out) for one in studies)
        raise UserError(
            f"{places} has nothing to report: {why}; run the study further (`temporal-merge run`), "
            f"`temporal-merge status {studies[0].out}` says how far it is"
        ) from None
    on_val = None if split == VAL or len(studies) > 1 else choose(studies[0].plan, studies[0].answer, data)
    return data if on_val is None else chosen(data, on_val[1], on_val[0])


def choose(plan: Plan, answer: Mapping[str, Any], data: Data) -> tuple[str, str] | None:
    """The trajectory on test (`data` are its scores) whose served models are the best on val, and the advice: chosen on val,
    judged on test. None if nothing is scored on val, or if the same models are not scored on test yet.
    """
    if VAL not in splits_of(answer):
        return None
    try:
        on_val = draw.prepare([on_split(answer, VAL)])
    except NoData:
        return None
    named = {trajectory.id: trajectory for trajectory in plan.trajectories}
    twin = plan.served_alike(named[on_val.best], TEST)
    if twin is None or twin.group not in set(data.last["group"]):
        return None
    val = on_val.last.set_index("group").loc[on_val.advice.group]
    test = data.last.set_index("group").loc[twin.group]
    best = data.last.set_index("group").loc[data.advice.group]
    sentence = f"Deploy {twin.group}: chosen on {VAL} (GM {val['gm']:.3f} at t={val['t']}); on {TEST} its GM is {test['gm']:.3f} at t={test['t']}"
    if data.advice.group != twin.group:
        sentence += f", {best['gm'] - test['gm']:.3f} below the best there, {data.advice.group}, which was not known when choosing"
    return twin.id, f"{sentence}."


def owner(studies: Sequence[Studied], trajectory: str) -> tuple[Studied, str]:
    """The study of a trajectory of the report, and the trajectory's own name there."""
    if len(studies) == 1:
        return studies[0], trajectory
    for one in studies:
        prefix = f"{one.answer['study']}: "
        if trajectory.startswith(prefix):
            return one, trajectory.removeprefix(prefix)
    raise KeyError(trajectory)


def draw_all(data: Data, studies: Sequence[Studied]) -> tuple[list[Figure], dict[str, str]]:
    """The figures that have data, in the order of the page, and by title why the others have none."""
    home, best = owner(studies, data.best)
    wanted: list[tuple[str, Callable[[], Figure]]] = [
        ("Knowledge accumulation against zero-shot retention", lambda: draw.plane(data)),
        ("GM over time", lambda: draw.over_time(data)),
        ("KA over time", lambda: draw.over_time(data, "ka")),
        ("ZS over time", lambda: draw.over_time(data, "zs")),
        ("Score per dataset over time", lambda: draw.matrix(data)),
        ("Difference of two trajectories", lambda: draw.difference(data)),
        ("Forgetting per task", lambda: draw.forgetting(data)),
        ("Forgetting and backward transfer", lambda: draw.transfer(data)),
        ("Technique by strategy", lambda: draw.techniques(data)),
        ("What matters: the strategy or the technique", lambda: draw.spread(data)),
        ("Scaling with the budget", lambda: draw.scaling(data, "steps_per_task", "budget", "steps per task")),
        ("Scaling with the horizon", lambda: draw.scaling(data, "tasks", "horizon", "tasks")),
        ("GM against cost in GFLOPs", lambda: draw.price(data, "gflops")),
        ("GM against cost in seconds", lambda: draw.price(data, "seconds")),
        ("What it cost, and what was shared", lambda: draw.sharing(_shared(studies))),
        ("Training curves", lambda: draw.training(_curves(data, studies), data)),
        ("How alike the experts are", lambda: draw.similarity(compare(home, best))),
    ]
    drawn, missing = [], {}
    for title, make in wanted:
        try:
            drawn.append(make())
        except NoData as why:
            missing[title] = str(why)
    return drawn, missing


def _curves(data: Data, studies: Sequence[Studied]) -> pd.DataFrame:
    """Training curves of the coloured groups, of their first seed each."""
    known = data.points[data.points["shown"] != OTHER].drop_duplicates("group")["trajectory"]
    parts = []
    for name in known:
        home, own = owner(studies, name)
        parts.append(curves(home, [own]).assign(trajectory=name))
    return pd.concat(parts, ignore_index=True)


def _shared(studies: Sequence[Studied]) -> dict[str, Any]:
    """The summary of a plan, or of several together; a step that two of them need counts once."""
    plans = [one.plan for one in studies]
    steps = {name: step for plan in plans for name, step in plan.steps.items()}
    naive = [plan.naive_gflops for plan in plans]
    return {
        "steps": {
            kind: {
                "unique": sum(step.kind == kind for step in steps.values()),
                "naive": sum(plan.naive[kind] for plan in plans),
            }
            for kind in plans[0].naive
        },
        "gflops": total_gflops(step.gflops for step in steps.values()),
        "gflops_naive": total_gflops(naive),
        "critical_path": critical_path(steps),
    }


def cost_of(studied: Studied, trajectory: str) -> str:
    """The cost of the advised trajectory and of the whole study, in a sentence; costs that were not measured are left out."""
    plan, one = studied.plan, studied.trajectory(trajectory)
    experts = dict.fromkeys(point.train for point in one.points if point.train)
    own = total_gflops(plan.steps[fp].gflops for fp in experts)
    parts = [f"It trains {len(experts)} experts"]
    if experts and own is not None:
        parts[0] += f" ({own:,.0f} GFLOPs)"
    total = total_gflops(step.gflops for step in plan.steps.values())
    if total is not None:
        parts.append(
            f"the whole study {sum(s.kind == 'train' for s in plan.steps.values())} ({total:,.0f} GFLOPs)"
        )
    seconds = elapsed(studied.timeline)
    if seconds:
        parts.append(f"in {seconds / 60:,.1f} minutes")
    return ", ".join(parts) + "."


def _page(studies: Sequence[Studied], data: Data, split: str, splits: Sequence[str]) -> Page:
    """The text of the page; figures are added later."""
    home, best = owner(studies, data.best)
    partial = [
        text for one in studies for text in (_unfinished(one, split), mixed_text(counted(one.made))) if text
    ]
    names = [str(one.answer["study"]) for one in studies]
    total = sum(len(on_split(one.answer, split)["trajectories"]) for one in studies)
    scope = [f"{total} trajectories, {len(data.last)} groups that differ in more than the seed"]
    scope += _which(studies, split, splits)
    scope += [note for one in studies for note in notes_of(one.made)]
    return Page(
        title=" and ".join(names),
        scope=". ".join(scope).rstrip(".") + ".",
        partial=" ".join(partial),
        advice=f"{data.advice.sentence} {cost_of(home, best)}{weight_to_try(home, best)}",
        winner=winner_of(home, best),
        command=f"temporal-merge report {' '.join(str(one.out) for one in studies)}",
        made_by=tuple(command_of(one.out) for one in studies),
        summaries=tuple(
            (
                name,
                summary_of(
                    replace(one, answer=on_split(one.answer, split)),
                    data.axes,
                    data.last[data.last["study"] == name],
                ),
            )
            for name, one in zip(names, studies)
        ),
        spent=tuple((name, costs(one.plan, one.made, one.timeline)) for name, one in zip(names, studies)),
    )


def _which(studies: Sequence[Studied], split: str, splits: Sequence[str]) -> list[str]:
    """Which split the scores are on; nothing if it is the only one, test."""
    others = [one for one in splits if one != split]
    if not others and split == TEST:
        return []
    outs = " ".join(str(one.out) for one in studies)
    see = "".join(f"; for those on {one}: temporal-merge report {outs} --split {one}" for one in others)
    return [f"Scores are on the {split} split{see}"]


def _unfinished(studied: Studied, split: str) -> str:
    plan, answer = studied.plan, on_split(studied.answer, split)
    if answer["complete"]:
        return ""
    there = sum(len(trajectory["steps"]) for trajectory in answer["trajectories"])
    shown = {trajectory["id"] for trajectory in answer["trajectories"]}
    total = sum(len(trajectory.points) for trajectory in plan.trajectories if trajectory.id in shown)
    return (
        f"The study is not finished: {there} of {total} points are scored. This report is of what is there, and its "
        "advice may change; a group stands at the last t that all its seeds have reached."
    )


def _write(stage: Path, data: Data, drawn: list[Figure], spent: pd.DataFrame) -> dict[str, list[str]]:
    """Write figures and tables; returns their file names by folder."""
    tables = {figure.name: figure.table for figure in drawn}
    tables |= {"points": data.points, "standing": data.last, "cost": spent}
    for folder in ("figures", "tables"):
        (stage / folder).mkdir(parents=True)
    for name, table in tables.items():
        table.to_csv(stage / "tables" / f"{name}.csv", index=False)
    frames = frames_of(data, drawn)
    frames["scores"] = frames["scores"][
        frames["scores"]["trajectory"].isin([data.best, data.second])
    ]  # a picture has no drop-down to choose others
    rows = {name: records(frame) for name, frame in frames.items()}
    for figure in drawn:
        spec = {**still(spec_of(figure)), "datasets": {name: rows[name] for name in figure.data}}
        spec["title"] = {"text": figure.title, "anchor": "start"}
        svg = svg_of(spec)
        (stage / "figures" / f"{figure.name}.svg").write_text(svg, encoding="utf-8")
        (stage / "figures" / f"{figure.name}.png").write_bytes(vl_convert.svg_to_png(svg, scale=2))
    return {
        "figures": [f"{figure.name}.{kind}" for figure in drawn for kind in ("png", "svg")],
        "tables": [f"{name}.csv" for name in tables],
    }
