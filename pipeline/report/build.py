"""`temporal-merge report OUT`: from what lies in OUT to OUT/report.

Invariant: a report is built beside the old one and replaces it whole; looking changes nothing else in OUT; what a study has
not scored yet is said, and a figure that cannot be drawn is named with the reason.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import vl_convert

from merge_service.checkpoint import WEIGHTS_FILE
from merge_service.errors import UserError
from merge_service.similarity import similarity
from pipeline.plan.planner import Plan
from pipeline.plan.steps import total_gflops
from pipeline.report import figures as draw
from pipeline.report.cost import costs, elapsed
from pipeline.report.figures import Data, Figure, NoData
from pipeline.report.page import page, records, spec_of, svg_of
from pipeline.results.over_time import ReadOnce, results, sentence_of
from pipeline.store.artifact import Record
from pipeline.store.local import Store
from pipeline.store.versions import counted, mixed_text
from pipeline.timeline import read_timeline
from pipeline.workspace.opening import open_plan, open_store

EXPERTS = 12
"""More experts than this make a heat map nobody reads; the first are compared."""
POINTS = (
    "group",
    "t",
    "shown",
    "reference",
    "model",
    "init",
    "deploy",
    "technique",
    "budget",
    "seed",
    "ka",
    "zs",
    "gm",
)
LAST = (
    "group", "t", "shown", "reference", "front", "model", "init", "deploy", "technique", "budget", "strategy", "ka", "zs",
    "gm", "forgetting", "bwt",
)  # fmt: skip
SCORES = ("trajectory", "t", "dataset", "role", "score")


def build_report(out: Path) -> dict[str, Any]:
    """Write OUT/report. Raises UserError if OUT holds no run or nothing was scored yet.

    {"html", "figures", "tables": paths, "missing": {title: why it was not drawn}, "complete", "advice"}.
    """
    plan, store = open_plan(out), open_store(out)
    read = ReadOnce(store)
    found = (read.record(step.kind, step.fingerprint) for step in plan.steps.values())
    made = [record for record in found if record is not None]
    return write_report(out, plan, results(plan, read), lambda best: compare(plan, store, best), made)


def file_report(out: Path, answer: Mapping[str, Any]) -> tuple[int, str | None]:
    """File a report's page and pictures with the study's run in MLflow: (rows still pending, why)."""
    from pipeline.tracking.tracker import file_with_study

    pictures = [path for path in answer["figures"] if path.endswith(".png")]
    names = [str(Path(path).relative_to(out)) for path in (answer["html"], *pictures)]
    return file_with_study(out, open_plan(out).fingerprint, names, timeout=20)


def write_report(
    out: Path,
    plan: Plan,
    answer: Mapping[str, Any],
    compared: Callable[[str], pd.DataFrame | None] = lambda best: None,
    made: Sequence[Record] = (),
) -> dict[str, Any]:
    """As `build_report`, of results that are at hand; `compared` gives the pairs of experts of a trajectory, `made` are the
    records of the steps that are done."""
    try:
        data = draw.prepare(answer)
    except NoData as why:
        raise UserError(
            f"{out} has nothing to report: {why}; run the study further (`temporal-merge run`), "
            f"`temporal-merge status {out}` says how far it is"
        ) from None
    drawn, missing = draw_all(data, plan, compared)
    timeline = _timeline(out)
    spent = costs(plan, made, timeline)
    advice = f"{data.advice.sentence} {cost(plan, data.best, timeline)}"
    final = out / "report"
    stage = out / ".report.partial"
    shutil.rmtree(stage, ignore_errors=True)
    written = _write(stage, data, drawn, spent)
    unfinished = "" if answer["complete"] else _unfinished(plan, answer)
    partial = ". ".join(filter(None, [unfinished.removesuffix("."), mixed_text(counted(made))]))
    text = page(
        plan.study,
        f"{len(answer['trajectories'])} trajectories, {len(data.last)} groups that differ in more than the seed"
        + "".join(f". {text}" for base in answer.get("bases", ()) if (text := sentence_of(base)))
        + "".join(f". {note}" for note in notes_of(made)),
        partial,
        advice,
        f"temporal-merge report {out}",
        data.last,
        spent,
        drawn,
        missing,
        frames_of(data, drawn),
    )
    (stage / "report.html").write_text(text, encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    stage.replace(final)
    return {
        "html": str(final / "report.html"),
        **{kind: [str(final / kind / name) for name in names] for kind, names in written.items()},
        "missing": missing,
        "complete": answer["complete"],
        "advice": advice,
    }


def notes_of(made: Sequence[Record]) -> list[str]:
    """What merges said of their results, each thing once, with how many said it."""
    said = Counter(
        note for record in made if record.kind == "merge" for note in record.result.get("notes", ())
    )
    return [f"{note} ({count} merge{'s' * (count != 1)})" for note, count in said.items()]


def draw_all(
    data: Data, plan: Plan, compared: Callable[[str], pd.DataFrame | None]
) -> tuple[list[Figure], dict[str, str]]:
    """The figures that have data, in the order of the page, and why the others (by title) have none."""
    wanted: list[tuple[str, Callable[[], Figure]]] = [
        ("Knowledge accumulation against zero-shot retention", lambda: draw.plane(data)),
        ("GM over time", lambda: draw.over_time(data)),
        ("Technique by strategy", lambda: draw.techniques(data)),
        ("What matters: the strategy or the technique", lambda: draw.spread(data)),
        ("Accuracy per dataset over time", lambda: draw.matrix(data)),
        ("Forgetting and backward transfer", lambda: draw.transfer(data)),
        ("Scaling with the budget", lambda: draw.scaling(data, "steps_per_task", "budget", "steps per task")),
        ("Scaling with the horizon", lambda: draw.scaling(data, "tasks", "horizon", "tasks")),
        ("What it cost, and what was shared", lambda: draw.sharing(plan.summary())),
        ("How alike the experts are", lambda: draw.similarity(compared(data.best))),
    ]
    drawn, missing = [], {}
    for title, make in wanted:
        try:
            drawn.append(make())
        except NoData as why:
            missing[title] = str(why)
    return drawn, missing


def frames_of(data: Data, drawn: list[Figure]) -> dict[str, pd.DataFrame]:
    """Every frame that the figures name, with the columns they use."""
    own = {figure.data[0]: figure.table for figure in drawn if len(figure.data) == 1}
    shared = {
        "points": data.points[list(POINTS)],
        "last": data.last[list(LAST)],
        "scores": data.scores[list(SCORES)],
    }
    return {**own, **shared}


def compare(plan: Plan, store: Store, trajectory: str) -> pd.DataFrame | None:
    """Pairs of a trajectory's experts: part (the model, a tower, a block), one, other, cosine, conflict; None if fewer than
    two have weights in the store."""
    (chosen,) = (one for one in plan.trajectories if one.id == trajectory)
    base = store.record("base", chosen.base)
    experts = {}
    for point in chosen.points:
        record = store.record("train", point.train) if point.train else None
        if record is not None:
            experts[f"t{point.t} {point.task}"] = record.path / WEIGHTS_FILE
    if base is None or len(experts) < 2:
        return None
    found = similarity(base.path / WEIGHTS_FILE, dict(list(experts.items())[:EXPERTS]))
    towers = sorted({tower for tower, _ in found.parts})
    parts: list[tuple[str, str | None, int | None]] = [("whole model", None, None)]
    parts += [(f"{tower} tower", tower, None) for tower in towers]
    parts += [
        (f"{tower} block {block}", tower, block)
        for tower, block in sorted((t, b) for t, b in found.parts if b is not None)
    ]
    rows = []
    for name, tower, block in parts:
        cosine, conflict = found.cosine(tower, block), found.conflict(tower, block)
        rows += [
            {"part": name, "one": one, "other": other, "cosine": float(cosine[i, j]), "conflict": float(conflict[i, j])}
            for i, one in enumerate(found.names)
            for j, other in enumerate(found.names)
        ]  # fmt: skip
    return pd.DataFrame(rows)


def cost(plan: Plan, trajectory: str, timeline: list[dict[str, Any]]) -> str:
    """What the advised trajectory and the whole study took, in a sentence; what was not measured is left out."""
    (chosen,) = (one for one in plan.trajectories if one.id == trajectory)
    experts = dict.fromkeys(point.train for point in chosen.points if point.train)
    own = total_gflops(plan.steps[fp].gflops for fp in experts)
    parts = [f"It trains {len(experts)} experts"]
    if experts and own is not None:
        parts[0] += f" ({own:,.0f} GFLOPs)"
    total = total_gflops(step.gflops for step in plan.steps.values())
    if total is not None:
        parts.append(
            f"the whole study {sum(s.kind == 'train' for s in plan.steps.values())} ({total:,.0f} GFLOPs)"
        )
    seconds = elapsed(timeline)
    if seconds:
        parts.append(f"in {seconds / 60:,.1f} minutes")
    return ", ".join(parts) + "."


def _timeline(out: Path) -> list[dict[str, Any]]:
    try:
        return read_timeline(out)
    except OSError:
        return []


def _unfinished(plan: Plan, answer: Mapping[str, Any]) -> str:
    there = sum(len(trajectory["steps"]) for trajectory in answer["trajectories"])
    total = sum(len(trajectory.points) for trajectory in plan.trajectories)
    return (
        f"The study is not finished: {there} of {total} points are scored. This report is of what is there, and its "
        "advice may change; a group stands at the last t that all its seeds have reached."
    )


def _write(stage: Path, data: Data, drawn: list[Figure], spent: pd.DataFrame) -> dict[str, list[str]]:
    """Figures and tables; their file names by folder."""
    tables = {figure.name: figure.table for figure in drawn}
    tables |= {"points": data.points, "standing": data.last, "cost": spent}
    for folder in ("figures", "tables"):
        (stage / folder).mkdir(parents=True)
    for name, table in tables.items():
        table.to_csv(stage / "tables" / f"{name}.csv", index=False)
    rows = {name: records(frame) for name, frame in frames_of(data, drawn).items()}
    rows["scores"] = [
        row for row in rows["scores"] if row["trajectory"] == data.best
    ]  # a picture has no drop-down
    for figure in drawn:
        spec = {**spec_of(figure), "datasets": {name: rows[name] for name in figure.data}}
        spec["title"] = {"text": figure.title, "anchor": "start"}
        (stage / "figures" / f"{figure.name}.svg").write_text(svg_of(spec), encoding="utf-8")
        (stage / "figures" / f"{figure.name}.png").write_bytes(vl_convert.vegalite_to_png(spec, scale=2))
    return {
        "figures": [f"{figure.name}.{kind}" for figure in drawn for kind in ("png", "svg")],
        "tables": [f"{name}.csv" for name in tables],
    }
