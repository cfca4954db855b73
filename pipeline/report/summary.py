"""The summary of a study: its command, data and dates, and what all its trajectories have in common.

Invariant: only what the plan, the results and the records contain; a line without content is left out.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pandas as pd

from pipeline.report.axes import Axes, text_of
from pipeline.report.frames import mixture_text, settings_of
from pipeline.report.sources import Studied
from pipeline.report.winner import command_of
from pipeline.results.over_time import sentence_of, splits_of
from pipeline.store.artifact import Record

MANY = 12
"""Most values of an axis that are listed."""
ELSEWHERE = (
    "technique.",
    "stream.id",
    "evaluation.split",
    "evaluation.sets",
    "model.sha256",
    "recipe.mixture.",
)
"""Settings that other lines show."""
CODE = frozenset({"Made by", "Where", "Plan"})
"""Lines that are names to copy, not prose."""


def summary_of(studied: Studied, axes: Axes, data: pd.DataFrame) -> list[tuple[str, str]]:
    """Title and text of every line of the summary of one study; `data` are its rows of `last`."""
    answer, plan = studied.answer, studied.plan
    trajectories = answer["trajectories"]
    streams = dict.fromkeys(tuple(one["stream"]) for one in trajectories)
    varied = [f"{axis}: {_values(data, axis)}" for axis in axes.shown if axis in data and data[axis].map(text_of).nunique() > 1]  # fmt: skip
    seeds = sorted({one["seed"] for one in trajectories})
    lines = [
        ("Made by", command_of(studied.out)),
        ("Where", str(studied.out.absolute())),
        ("When", when(studied.records.values())),
        ("Base", "; ".join(_base(base) for base in answer.get("bases", ()))),
        ("Trajectories", f"{len(trajectories)} in {len(data)} groups; seeds: {', '.join(map(str, seeds[:MANY]))}"),
        ("Differ in", "; ".join(varied)),
        ("In common", ", ".join(f"{key} {text_of(value)}" for key, value in _common(trajectories, data, axes).items())),
        ("Tasks in order", "; or ".join(_order(stream) for stream in list(streams)[:MANY])),
        ("KA is over", _names(answer["adaptation"], answer)),
        ("ZS is over", _names(answer["held_out"], answer)),
        ("Scored on", " and ".join(splits_of(answer))),
        ("Steps", ", ".join(f"{kind} {n}" for kind, n in _steps(studied).items())),
        ("Library versions", versions(studied.records.values())),
        ("Plan", plan.fingerprint[:16]),
    ]  # fmt: skip
    return [(title, text) for title, text in lines if text]


def when(records: Any) -> str:
    """The times of the first and the last finished step, in UTC."""
    stamps = sorted(record.created_ms for record in records if record.created_ms)
    if not stamps:
        return ""
    first, last = (datetime.fromtimestamp(one / 1000, UTC).strftime("%Y-%m-%d %H:%M") for one in (stamps[0], stamps[-1]))  # fmt: skip
    return f"{first} to {last} UTC" if first != last else f"{first} UTC"


def versions(records: Any) -> str:
    """The versions of the libraries that computed the steps; all of them if they differ."""
    found: dict[str, set[str]] = {}
    for record in records:
        _note(found, record)
    return ", ".join(f"{name} {' and '.join(sorted(values))}" for name, values in sorted(found.items()))


def _note(found: dict[str, set[str]], record: Record) -> None:
    for name, version in record.versions.items():
        found.setdefault(name, set()).add(str(version))


def _base(base: Mapping[str, Any]) -> str:
    told = sentence_of(base) or str(base["model"])
    return f"{told.rstrip('.')} (sha256 {str(base['sha256'])[:12]})"


def _order(stream: tuple[str, ...]) -> str:
    """A stream as text; both ends of a long one."""
    return " → ".join(stream if len(stream) <= 2 * MANY else [*stream[:MANY], "…", *stream[-3:]])


def _values(rows: pd.DataFrame, axis: str) -> str:
    values = list(dict.fromkeys(rows[axis].map(text_of)))
    return ", ".join(values[:MANY]) + (f" and {len(values) - MANY} more" if len(values) > MANY else "")


def _common(trajectories: Any, data: pd.DataFrame, axes: Axes) -> dict[str, Any]:
    """Settings that all trajectories but references share, and that no other line shows."""
    references = {str(group).rpartition(": ")[2] for group in data.loc[data["reference"], "group"]}
    found: dict[str, set[str]] = {}
    for trajectory in trajectories:
        if trajectory["group"] not in references:
            told = settings_of(trajectory)
            for key, value in {**told, "mixture": mixture_text(told)}.items():
                found.setdefault(key, set()).add(text_of(value))
    return {
        key: next(iter(values))
        for key, values in found.items()
        if len(values) == 1 and key not in axes.values and not key.startswith(ELSEWHERE)
    }


def _steps(studied: Studied) -> dict[str, str]:
    kinds = dict.fromkeys(studied.plan.kinds.values())
    total = {kind: sum(one == kind for one in studied.plan.kinds.values()) for kind in kinds}
    return {str(kind): f"{n} ({studied.plan.naive[str(kind)]} one by one)" for kind, n in total.items()}


def _names(names: list[str], answer: Mapping[str, Any]) -> str:
    retrieval = set(answer.get("retrieval", ()))
    return ", ".join(f"{name} (recall@5)" if name in retrieval else name for name in names)
