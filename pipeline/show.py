"""Answers for people: plans, progress, results and techniques as tables on a terminal.

Invariant: showing reads; nothing here decides or changes anything.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from merge_service.errors import UserError
from merge_service.own import broken
from merge_service.techniques import get, names
from pipeline.console import BUSY, ERROR, GOOD, WARNING, complain
from pipeline.console import console as made_console
from pipeline.progress import running_table, standings_table
from pipeline.results import grouped, on_split, splits_of, winner
from pipeline.results import summary as standings
from pipeline.steps import TEST, Plan, TrajectoryPlan
from pipeline.versions import mixed_text

STATES = {"running": BUSY, "starting": BUSY, "done": GOOD, "failed": ERROR, "partial": WARNING}
UNDER_WAY = frozenset({"running", "starting"})


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def parameters_from(overrides: Sequence[str]) -> dict[str, Any]:
    """`p=v` pairs as a mapping; values are read as YAML. Raises UserError."""
    answer = {}
    for text in overrides:
        key, found, value = text.partition("=")
        if not found or not key.strip():
            raise UserError(f"--set {text!r}: write parameter=value, e.g. --set density=0.2")
        try:
            answer[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            why = getattr(error, "problem", None) or str(error).splitlines()[0]
            raise UserError(f"--set {text!r}: the value is not YAML ({why})") from None
    return answer


SHOWN_EVENTS = 8
"""Events that `status` shows; all of them are in OUT/events.jsonl."""
LISTED = 60
"""Lines of trajectories that a plan shows."""


def show_plan(workspace: Any, summary: Mapping[str, Any]) -> None:
    """Counts per kind, cost, and the trajectories."""
    console = made_console()
    steps = _table(
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
    console.print(f"still to do: {cost}, {summary['disk_bytes'] / 2**20:,.0f} MiB in {workspace.out}")
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


def _trajectories(plan: Plan) -> Table:
    """One line for those that differ in the seed alone; what all have in common is left out."""
    groups: dict[str, list[TrajectoryPlan]] = {}
    for trajectory in plan.trajectories:
        groups.setdefault(trajectory.group, []).append(trajectory)
    several = len(plan.bases) > 1
    columns = ["trajectory", *(["model"] if several else []), "init", "deploy", "technique", "seeds", "tasks"]
    table = _table("trajectories", *columns, "steps per task", "per chain")
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
    """State and counts, what is running, where trajectories stand, what failed, what the tracker waits for.

    `answer` is that of `status.Look`, or of a cluster (then with its "job", and as far as the job has come).
    """
    done = answer.get("steps", {}).get("done")
    total = sum(answer["steps"].values()) if done is not None else 0
    head = f"{out}: {answer['state']}" + (f", {done} of {total} steps done" if total else "")
    parts: list[Any] = [Text(head, style=STATES.get(answer["state"], ""))]
    if answer.get("job"):
        parts.append(Text(f"job {answer['job']['id']}: {answer['job']['state']}"))
    if answer.get("kinds") and answer["state"] != "done":
        table = _table("", "steps", "done", "running", "of")
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
    table = _table("", "events", "")
    table.columns[1].justify = "left"
    for event in events[-SHOWN_EVENTS:]:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
        table.add_row(when, Text(f"{event['kind']}: {event['text']}"))
    return table


def show_status(out: Path, answer: Mapping[str, Any]) -> None:
    """How a run stands, once."""
    made_console().print(status_view(out, answer))


def watch_status(
    out: Path, look: Callable[[], Mapping[str, Any]], seconds: float, console: Console | None = None
) -> None:
    """How a run stands, look after look, until it is no longer under way; on no terminal a line per change.

    Watching may end at any time: the run goes on.
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
    """The tables of KA, ZS (and of its groups where both hold sets) and GM over t, a split at a time, and where to go next."""
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
    """How a run ended, for programs: where the results are, standings per group, the trajectory to deploy."""
    return {
        "out": str(out),
        "results": str(out / "results.json"),
        "complete": answer["complete"],
        "standings": standings(answer),
        "best": winner(answer),
        "tracker_pending": tracking.pending,
    }


def results_table(answer: Mapping[str, Any], key: str, title: str) -> Table:
    """One score per trajectory and t; the best last value of all is bold."""
    trajectories = answer["trajectories"]
    times = sorted({step["t"] for trajectory in trajectories for step in trajectory["steps"]})
    table = _table(title, "trajectory", *(f"t={t}" for t in times))
    last = {trajectory["id"]: trajectory["steps"][-1][key] for trajectory in trajectories}
    best = max((value for value in last.values() if value is not None), default=None)
    for trajectory in trajectories:
        by_t = {step["t"]: step[key] for step in trajectory["steps"]}
        cells = ["-" if by_t.get(t) is None else f"{by_t[t]:.3f}" for t in times]
        style = "bold" if best is not None and last[trajectory["id"]] == best else None
        table.add_row(trajectory["id"], *cells, style=style)
    return table


def show_scores(answer: Mapping[str, Any]) -> None:
    """Scores of one checkpoint."""
    on = "" if answer["split"] == TEST else f" on {answer['split']}"
    table = _table(f"{answer['checkpoint']}{on}", "dataset", "score", "samples")
    for name, score in answer["scores"].items():
        table.add_row(name, f"{score:.4f}", str(answer["samples"][name]))
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


def techniques_as_json(name: str | None) -> Any:
    """One technique, or all, as plain values."""
    if name is not None:
        return _technique(name)
    return [_technique(one) for one in names()]


def show_techniques(name: str | None) -> None:
    """The catalogue, or one technique in full."""
    console = made_console()
    if name is None:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("technique", "forms", "needs", "parameters", "paper"):
            table.add_column(column)
        for one in map(_technique, names()):
            parameters = ", ".join(f"{key}={entry['default']}" for key, entry in one["params"].items())
            table.add_row(
                one["name"], " ".join(one["forms"]), " ".join(one["needs"]) or "-", parameters, one["paper"]
            )
        console.print(table)
        for which, why in broken().items():
            complain("warning", f"technique {which} cannot be used: {why}", WARNING)
        return
    one = _technique(name)
    console.print(f"{one['name']}\n  {one['formula']}\n  paper: {one['paper'] or '-'}", markup=False)
    origin = get(name).origin
    if origin is not None:
        console.print(f"  written in: {origin.module} (sha256 {origin.source})", markup=False, soft_wrap=True)
    console.print(
        f"  forms: {', '.join(one['forms'])}\n  needs: {', '.join(one['needs']) or 'nothing but the checkpoints'}"
    )
    for key, entry in one["params"].items():
        allowed = f" [{' | '.join(entry['choices'])}]" if entry["choices"] else ""
        console.print(f"  {key} = {entry['default']}{allowed}: {entry['doc']}", markup=False)


def _technique(name: str) -> dict[str, Any]:
    one = get(name)
    return {
        "name": one.name,
        "formula": one.formula,
        "paper": one.paper,
        "needs": sorted(one.needs),
        "forms": sorted(one.forms),
        "params": {
            param.name: {"default": param.default, "doc": param.doc, "choices": list(param.choices or ())}
            for param in one.params
        },
    }
