"""`temporal-merge report OUT`: from what lies in OUT to OUT/report.

Invariant: a report is built beside the old one and replaces it whole; looking changes nothing else in OUT; what a study has
not scored yet is said, and a figure that cannot be drawn is named with the reason.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import vl_convert

from merge_service.checkpoints import WEIGHTS_FILE
from merge_service.errors import UserError
from merge_service.similarity import similarity
from pipeline.plan.steps import TEST, VAL, Plan, total_gflops
from pipeline.report import figures as draw
from pipeline.report.cost import costs, elapsed
from pipeline.report.figures import Data, Figure, NoData
from pipeline.report.page import Words, page, records, spec_of, svg_of
from pipeline.results.over_time import OF_GROUPS, ReadOnce, on_split, results, sentence_of, splits_of
from pipeline.run.trace import read_timeline
from pipeline.store.artifact import Record
from pipeline.store.local import Store
from pipeline.store.versions import counted, mixed_text
from pipeline.workspace.opening import open_plan, open_store

EXPERTS = 12
"""More experts than this make a heat map nobody reads; the first are compared."""
UNSCORED = ("sharing", "similarity")
"""Figures that show no scores, and so are the same on every split."""
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
    *OF_GROUPS,
)
LAST = (
    "group", "t", "shown", "reference", "front", "model", "init", "deploy", "technique", "budget", "strategy", "ka", "zs",
    "gm", "forgetting", "bwt", *OF_GROUPS,
)  # fmt: skip
SCORES = ("trajectory", "t", "dataset", "role", "zero_shot", "score")


def build_report(out: Path, split: str | None = None) -> dict[str, Any]:
    """Write OUT/report, of the scores on one split. Raises UserError if OUT holds no run or nothing was scored yet.

    {"html", "split", "figures", "tables": paths, "missing": {title: why it was not drawn}, "complete", "advice"}.
    """
    plan, store = open_plan(out), open_store(out)
    read = ReadOnce(store)
    found = (read.record(step.kind, step.fingerprint) for step in plan.steps.values())
    made = [record for record in found if record is not None]
    answer = results(plan, read)
    return write_report(out, plan, answer, lambda best: compare(plan, store, best), made, split)


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
    split: str | None = None,
) -> dict[str, Any]:
    """As `build_report`, of results that are at hand; `compared` gives the pairs of experts of a trajectory, `made` are the
    records of the steps that are done.

    A report is of one split, `split` or else the first that is scored, for scores on two of them are not comparable. One on val
    lies in OUT/report-val where there are scores on test as well.
    """
    splits, split = splits_of(answer), _split_to_show(answer, split)
    data, answer = _prepared(out, plan, answer, split), on_split(answer, split)
    drawn, missing = draw_all(data, plan, compared)
    if split == VAL:
        drawn = [f if f.name in UNSCORED else replace(f, title=f"{f.title} (on {VAL})") for f in drawn]
    timeline = _timeline(out)
    spent = costs(plan, made, timeline)
    advice = f"{data.advice.sentence} {cost(plan, data.best, timeline)}"
    final = out / ("report" if split == splits[0] else f"report-{split}")
    stage = out / ".report.partial"
    shutil.rmtree(stage, ignore_errors=True)
    written = _write(stage, data, drawn, spent)
    unfinished = "" if answer["complete"] else _unfinished(plan, answer)
    partial = ". ".join(filter(None, [unfinished.removesuffix("."), mixed_text(counted(made))]))
    words = Words(
        plan.study,
        f"{len(answer['trajectories'])} trajectories, {len(data.last)} groups that differ in more than the seed"
        + _which(out, split, splits)
        + "".join(f". {text}" for base in answer.get("bases", ()) if (text := sentence_of(base)))
        + "".join(f". {note}" for note in notes_of(made)),
        partial,
        advice,
        f"temporal-merge report {out}",
    )
    text = page(words, data.last, spent, drawn, missing, frames_of(data, drawn))
    (stage / "report.html").write_text(text, encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    stage.replace(final)
    return {
        "html": str(final / "report.html"),
        "split": split,
        **{kind: [str(final / kind / name) for name in names] for kind, names in written.items()},
        "missing": missing,
        "complete": answer["complete"],
        "advice": advice,
    }


def _split_to_show(answer: Mapping[str, Any], asked: str | None) -> str:
    """The split that was asked for, else the first on which something is scored. Raises UserError."""
    splits = splits_of(answer)
    if asked not in (None, *splits):
        raise UserError(f"--split {asked}: the study is scored on {' and '.join(splits)}, so choose that")
    begun = (s for s in splits if any(one["steps"] for one in on_split(answer, s)["trajectories"]))
    return asked or next(begun, splits[0])


def _prepared(out: Path, plan: Plan, answer: Mapping[str, Any], split: str) -> Data:
    """What the figures of one split draw; the advice on test is chosen on val where that is scored too."""
    try:
        data = draw.prepare(on_split(answer, split))
    except NoData as why:
        raise UserError(
            f"{out} has nothing to report: {why}; run the study further (`temporal-merge run`), "
            f"`temporal-merge status {out}` says how far it is"
        ) from None
    chosen = None if split == VAL else choose(plan, answer, data)
    if chosen is None:
        return data
    return replace(data, advice=replace(data.advice, sentence=chosen[1]), best=chosen[0])


def choose(plan: Plan, answer: Mapping[str, Any], data: Data) -> tuple[str, str] | None:
    """Chosen on val, judged on test: the trajectory on test (`data` are its scores) that serves what is best on val, and the
    advice. None where nothing is scored on val, or what serves the same is not scored on test yet."""
    try:
        on_val = draw.prepare(on_split(answer, VAL))
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


def _which(out: Path, split: str, splits: Sequence[str]) -> str:
    """Which split the scores are on, where it goes without saying for nobody."""
    others = [one for one in splits if one != split]
    if not others and split == TEST:
        return ""
    see = "".join(f"; for those on {one}: temporal-merge report {out} --split {one}" for one in others)
    return f". Scores are on the {split} split{see}"


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
    shown = {trajectory["id"] for trajectory in answer["trajectories"]}
    total = sum(len(trajectory.points) for trajectory in plan.trajectories if trajectory.id in shown)
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
