"""Answers as tables on a terminal: plans, progress, results and techniques.

Invariant: only output; nothing here decides or changes anything.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.cli.show_files import new_table
from pipeline.console import BUSY, ERROR, GOOD, WARNING
from pipeline.console import console as made_console
from pipeline.plan.steps import TEST, Plan, TrajectoryPlan
from pipeline.results.over_time import grouped, on_split, splits_of, winner
from pipeline.results.over_time import summary as standings
from pipeline.run.progress import Moment, bar, running_table, standings_table, troubles_of
from pipeline.run.timing.pace import duration
from pipeline.store.versions import mixed_text

STATES = {"running": BUSY, "starting": BUSY, "done": GOOD, "failed": ERROR, "partial": WARNING}
UNDER_WAY = frozenset({"running", "starting"})


SHOWN_EVENTS = 8
"""Events that `status` shows; all of them are in OUT/events.jsonl."""
LISTED = 60
"""Lines of trajectories that a plan shows."""


def show_plan(workspace: Any, summary: Mapping[str, Any]) -> None:
    """Counts per kind, cost, and the trajectories."""
    console = made_console()
    steps = new_table(
        f"{summary['study']}: {summary['trajectories']} trajectories",
        "steps",
        "unique",
        "one by one",
        "in store",
    )
    for kind, counts in summary["steps"].items():
        steps.add_row(kind, str(counts["unique"]), str(counts["naive"]), str(counts["cached"]))
    console.print(steps)
    gflops, naive = summary["gflops"], summary["gflops_naive"]
    cost = "compute not measured" if gflops is None else f"{gflops:,.0f} GFLOPs"
    if naive:
        cost += f" (one by one {naive:,.0f})"
    if summary.get("gflops_measuring"):
        cost += f", {summary['gflops_measuring']:,.0f} of them to measure experts"
    if summary.get("gflops_learning"):
        cost += f", {summary['gflops_learning']:,.0f} of them to learn merges"
    console.print(f"still to do: {cost}, {_room(summary)} in {workspace.out}")
    if summary["seconds"]:
        work, longest = (duration(summary["seconds"][key]) for key in ("work", "longest_chain"))
        console.print(
            f"that takes about {work} one step after the other, at least {longest} on any number of workers"
        )
    path = summary["critical_path"]
    chain = ", ".join(f"{path[kind]} {kind}" for kind in summary["steps"])
    console.print(f"longest chain of steps that must follow one another: {path['steps']} ({chain})\n")
    console.print(_trajectories(workspace.plan))
    if workspace.plan.splits != (TEST,):
        console.print(f"scores are on {' and '.join(workspace.plan.splits)}")
    for warning in workspace.study.warnings:
        console.print(Text.assemble(("warning:", WARNING), f" {warning}"))
    for note in summary["notes"]:
        console.print(Text.assemble(("note:", WARNING), f" {note}"), soft_wrap=True)
    if summary["missing"]:
        console.print(
            f"provisional: {len(summary['missing'])} datasets or weights are not there ({', '.join(summary['missing'][:3])}, ...): "
            "sizes come from the suite's description, and the study cannot run yet",
            markup=False, soft_wrap=True,
        )  # fmt: skip


def _room(summary: Mapping[str, Any]) -> str:
    """The disk space of a study; if some merges are recipes, also what must be free, the most at a time and the size of all."""
    stays, least, peak, everything = (
        f"{summary[f'disk_{key}'] / 2**20:,.0f} MiB"
        for key in ("bytes", "least_bytes", "peak_bytes", "all_bytes")
    )
    resume = summary["resume_bytes"] / 2**20
    beside = f", for every expert in training up to {resume:,.0f} MiB more" if resume >= 1 else ""
    if stays == everything:
        return stays + beside
    return f"{stays} ({least} must be free, {peak} are used at most; storage.keep: all would take {everything}){beside}"


def _trajectories(plan: Plan) -> Table:
    """One line for trajectories that differ in the seed alone; columns are left out if all have the same value."""
    groups: dict[str, list[TrajectoryPlan]] = {}
    for trajectory in plan.trajectories:
        groups.setdefault(trajectory.group, []).append(trajectory)
    several = len(plan.bases) > 1
    columns = ["trajectory", *(["model"] if several else []), "init", "deploy", "technique", "seeds", "tasks"]
    table = new_table("trajectories", *columns, "steps per task", "per chain")
    for group, members in list(groups.items())[:LISTED]:
        one = members[0]
        steps = one.budget["steps_per_task"] if plan.trains(one) else 0
        table.add_row(
            group, *([one.model] if several else []), one.init, one.deploy, one.technique or "-",
            ",".join(str(member.seed) for member in members), str(len(one.stream)), f"{steps:,}",
            f"{steps * len(one.stream):,}",
        )  # fmt: skip
    if len(groups) > LISTED:
        table.add_row(f"... and {len(groups) - LISTED} more")
    return table


def status_view(out: Path, answer: Mapping[str, Any]) -> Group:
    """State and counts, running steps, standings of trajectories, failures, rows that wait for the tracker.

    `answer` is that of `status.Look`, or of a cluster (then with its "job", and only the parts that exist so far).
    """
    done = answer.get("steps", {}).get("done")
    total = sum(answer["steps"].values()) if done is not None else 0
    parts: list[Any] = [Text(f"{out}: {answer['state']}", style=STATES.get(answer["state"], ""))]
    if total:
        elapsed, left = answer.get("elapsed"), answer.get("remaining")
        parts.append(
            bar(
                Moment(done, total, elapsed or 0.0, left, answer.get("share") or done / total),
                elapsed is not None,
            )
        )
    parts += troubles_of(answer.get("troubles", {}))
    if answer.get("job"):
        parts.append(Text(f"job {answer['job']['id']}: {answer['job']['state']}"))
    if answer.get("kinds") and answer["state"] != "done":
        table = new_table("", "steps", "done", "running", "of")
        for kind, counts in answer["kinds"].items():
            table.add_row(kind, str(counts["done"]), str(counts["running"]), str(counts["total"]))
        parts.append(table)
    if answer.get("trajectories"):
        rows = [tuple(row.values()) for row in answer["trajectories"]]
        parts.append(standings_table(rows, answer["more_trajectories"], answer.get("splits", ())))
    if answer.get("running"):
        running = [(step["label"], step["progress"], step["seconds"] or 0.0) for step in answer["running"]]
        parts.append(running_table(running))
    parts += [Text(f"waiting for {step['holder']}: {step['label']}") for step in answer.get("waiting", ())]
    if answer.get("versions"):
        parts.append(Text(mixed_text(answer["versions"]), style=WARNING))
    if answer.get("events"):
        parts.append(_events(answer["events"]))
    if answer.get("failure"):
        failure = answer["failure"]
        parts.append(Text(f"failed: {failure['step']}: {failure['error']}", style=ERROR))
    if answer.get("other_plans"):
        names = ", ".join(answer["other_plans"])
        parts.append(
            Text(
                f"other plans of this study ran here: {names}; their artifacts stay until `temporal-merge gc {out}`"
            )
        )
    if answer.get("results_of"):
        parts.append(Text(f"results.json is still that of {answer['results_of']}", style=WARNING))
    if answer.get("tracker_pending"):
        text = f"the tracker waits for {answer['tracker_pending']} rows: temporal-merge sync {out}"
        parts.append(Text(text, style=WARNING))
    return Group(*parts)


def _events(events: Sequence[Mapping[str, Any]]) -> Table:
    """The last events of a run, oldest first."""
    table = new_table("", "events", "")
    table.columns[1].justify = "left"
    for event in events[-SHOWN_EVENTS:]:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
        table.add_row(when, Text(f"{event['kind']}: {event['text']}"))
    return table


def show_status(out: Path, answer: Mapping[str, Any]) -> None:
    """Print the state of a run, once."""
    made_console().print(status_view(out, answer))


def watch_status(
    out: Path, look: Callable[[], Mapping[str, Any]], seconds: float, console: Console | None = None
) -> None:
    """Show the state of a run repeatedly until it ends; without a terminal, print a line per change.

    Watching may be interrupted at any time; the run continues.
    """
    console = console or made_console()
    live = Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext()
    said = ""
    with live as screen:
        while True:
            answer = look()
            if screen is not None:
                screen.update(status_view(out, answer), refresh=True)
            else:
                counts = ", ".join(f"{n} {name}" for name, n in answer.get("steps", {}).items() if n)
                line = f"{out}: {answer['state']}" + (f" ({counts})" if counts else "")
                if line != said:
                    console.print(line, markup=False, highlight=False, soft_wrap=True)
                said = line
            if answer["state"] not in UNDER_WAY:
                break
            time.sleep(seconds)
    if screen is None:
        console.print(status_view(out, answer))


def print_results(out: Path, answer: Mapping[str, Any], tracking: Any) -> None:
    """The tables of KA, ZS (and of its groups if both hold sets) and GM over t, one split at a time, and the next commands."""
    console = made_console()
    titles = {"ka": "KA, knowledge accumulation", "zs": "ZS, zero-shot retention"}
    if grouped(answer):
        titles |= {
            "zs_replayed": "ZS of what is replayed",
            "zs_never_replayed": "ZS of what is never replayed",
        }
    for split in splits_of(answer):
        on = "" if splits_of(answer) == (TEST,) else f" (on {split})"
        for key, title in (titles | {"gm": "GM"}).items():
            console.print(results_table(on_split(answer, split), key, title + on))
            console.print()
    console.print(f"results: {out / 'results.json'}", markup=False, soft_wrap=True)
    if tracking.pending:
        reason = tracking.tracker.last_error or "it did not answer in time"
        console.print(
            f"tracker: {tracking.pending} rows are pending ({reason}); deliver them with: temporal-merge sync {out}",
            markup=False, soft_wrap=True,
        )  # fmt: skip
    console.print(f"MLflow UI: temporal-merge ui {out}", markup=False, soft_wrap=True)


def run_summary(out: Path, answer: Mapping[str, Any], tracking: Any) -> dict[str, Any]:
    """The result of a run for programs: where the results are, standings per group, the trajectory to deploy."""
    return {
        "out": str(out),
        "results": str(out / "results.json"),
        "complete": answer["complete"],
        "standings": standings(answer),
        "best": winner(answer),
        "tracker_pending": tracking.pending,
    }


def results_table(answer: Mapping[str, Any], key: str, title: str) -> Table:
    """One score per trajectory and t; the best final value is bold."""
    trajectories = answer["trajectories"]
    times = sorted({step["t"] for trajectory in trajectories for step in trajectory["steps"]})
    table = new_table(title, "trajectory", *(f"t={t}" for t in times))
    last = {trajectory["id"]: trajectory["steps"][-1][key] for trajectory in trajectories}
    best = max((value for value in last.values() if value is not None), default=None)
    for trajectory in trajectories:
        by_t = {step["t"]: step[key] for step in trajectory["steps"]}
        cells = ["-" if by_t.get(t) is None else f"{by_t[t]:.3f}" for t in times]
        style = "bold" if best is not None and last[trajectory["id"]] == best else None
        table.add_row(trajectory["id"], *cells, style=style)
    return table


def show_scores(answer: Mapping[str, Any]) -> None:
    """Scores of one checkpoint, with the requested details."""
    on = "" if answer["split"] == TEST else f" on {answer['split']}"
    details = answer.get("details", {})
    extra = [name for name in MEANS if any(name in one for one in details.values())]
    table = new_table(
        f"{answer['checkpoint']}{on}", "dataset", "score", *(MEANS[name] for name in extra), "samples"
    )
    for name, score in answer["scores"].items():
        more = [_share(details.get(name, {}).get(one)) for one in extra]
        table.add_row(name, f"{score:.4f}", *more, str(answer["samples"][name]))
    console = made_console()
    console.print(table)
    if "gm" in answer:
        names = {
            "ka": "KA",
            "zs": "ZS",
            "gm": "GM",
            "zs_replayed": "ZS replayed",
            "zs_never_replayed": "ZS never replayed",
        }
        known = {name: answer[key] for key, name in names.items() if answer[key] is not None}
        console.print("  ".join(f"{name} {value:.4f}" for name, value in known.items()) + on)
    for name, one in details.items():
        if "per_class" in one:
            console.print(f"\n{name}: classes, the worst first", markup=False)
            classes = new_table("", "class", "score", "samples")
            for which, found in sorted(one["per_class"].items(), key=lambda entry: entry[1]["score"]):
                classes.add_row(Text(which), f"{found['score']:.4f}", str(found["samples"]))
            console.print(classes)
        if one.get("confusion"):
            console.print(f"\n{name}: what was taken for what", markup=False)
            pairs = new_table("", "class", "taken for", "samples")
            for true, taken, count in one["confusion"][:LISTED]:
                pairs.add_row(Text(true), Text(taken), str(count))
            console.print(pairs)
            if len(one["confusion"]) > LISTED:
                console.print(f"and {len(one['confusion']) - LISTED} more pairs (--json)")


MEANS = {
    "top5": "top-5",
    "mean_per_class": "mean per class",
    "image_to_text": "image to text",
    "text_to_image": "text to image",
}
"""Details with one number per dataset."""


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
