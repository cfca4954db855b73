"""The fault matrix: its rows, the tests that prove them, and the table.

A test belongs to a row by `@pytest.mark.fault("F1")`. Each of its cases that passes counts as one, or as many as it records with
`record_property("cases", n)`. Every other record (`record_property("restart seen after", "1.4 s")`) is a measured figure of its
rows. `pytest -m fault --matrix FILE` writes the table between two marks of FILE, or a file of its own.

Invariant: a row without a passing case, or with a failing or a skipped one, fails the whole run.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

BEGIN, END = "<!-- fault matrix: begin -->", "<!-- fault matrix: end -->"

ROWS = {
    "F1": ("expert worker killed while it trains", "same bytes; at most the steps since the last checkpoint again; past the limit `StepFailed`"),
    "F2": ("process killed at each named point", "rerun: same bytes, nothing finished is done again, nothing half-made is readable"),
    "F3": ("merge actor killed in and after a merge", "same bytes; each merge committed once; no arrival lost"),
    "F4": ("driver killed, rerun beside its orphans", "same bytes; nothing trained twice; orphans end or change nothing"),
    "F5": ("two drivers on one OUT", "one works, the other says who; one MLflow run"),
    "F6": ("node removed under an expert", "its steps go elsewhere; no place left: an error that names what is missing"),
    "F7": ("node partitioned, then back", "a second copy runs; the late one's commit is the same bytes; one artifact"),
    "F8": ("network cut between two hosts", "as F7; no wait without an end"),
    "F9": ("head of the cluster dies", "driver ends with what to do; on a new cluster nothing finished is done again"),
    "F10": ("tracker down: from the start, in the middle, to the end", "training goes on, exit 0; `status` counts, `sync` delivers exactly once"),
    "F11": ("tracker slow, failing, or losing its answers", "one point for every metric and step; one run"),
    "F12": ("tracker hostile", "typed error, outbox kept, nothing written outside"),
    "F13": ("tracker's sqlite locked", "outbox waits, driver does not"),
    "F14": ("disk full", "`StorageFull` with bytes; what was finished stays; rerun: same bytes"),
    "F15": ("artifact or checkpoint torn, flipped, gone", "found on reading; made again or named; never merged"),
    "F16": ("safetensors header bombs", "refused at once without memory"),
    "F17": ("expert or loss not finite", "named with task, t and tensor; nothing committed"),
    "F18": ("expert of another architecture", "refused with its differences"),
    "F19": ("the same arrival twice, or two for one place", "no-op; conflict with both hashes"),
    "F20": ("arrivals late or in any order", "the same bytes in every order; one that never comes ends in an error"),
    "F21": ("any schedule of arrivals, crashes, restarts", "invariants hold after each; the end is the same"),
    "F22": ("shard with code in it, URL instead of a path", "refused by name; nothing runs"),
    "F23": ("shard with paths, links, devices", "refused; nothing written"),
    "F24": ("shard cut, flipped, or a bomb", "found before training"),
    "F25": ("fewer samples or shards than workers", "refused with both numbers; equal steps on all ranks"),
    "F26": ("malicious or broken study file", "`ConfigError` with the key; nothing imported or made"),
    "F27": ("Ray open to the world", "refused with the fix; token never shown; no other machine reaches a study on this one"),
    "F28": ("other code on a worker", "`CodeMismatch` before any step"),
    "F29": ("worker out of memory", "error names the budget; tried again at most twice; others unharmed"),
    "F30": ("step stuck: stopped, endless, collective on a dead rank", "ended at its deadline, tried again; then `StepTimeout`; no process left"),
    "F31": ("signals to the driver", "ends within seconds with 130 or 143; rerun: same bytes"),
    "F32": ("clock set back or forward, between runs and within one", "same bytes, same order in MLflow"),
    "F33": ("store not writable, files deleted, rename failing", "typed error with the path; nothing half-made; rerun goes on"),
    "F34": ("DeepSpeed: parity and crash while saving", "same keys and shapes, bounded difference; the last whole checkpoint is used"),
    "F35": ("chaos: runs with random faults", "every run the same bytes; nothing leaked"),
    "F36": ("power cut at any moment", "what has its name is whole: files forced to disk before names, the record last"),
}  # fmt: skip
"""Row: what is done to the software, and what must then happen."""

EXTERNAL = {"F35": "`make soak`"}
"""Rows with a command of their own, whose figures stand below the table."""


@dataclass
class _Row:
    cases: int = 0
    bad: list[str] = field(default_factory=list)
    tests: set[str] = field(default_factory=set)
    figures: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


_rows: dict[str, _Row] = defaultdict(_Row)
_of: dict[str, list[str]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", metavar="FILE", help="write the table of the fault matrix into FILE")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        rows = [row for mark in item.iter_markers("fault") for row in mark.args]
        unknown = set(rows) - set(ROWS)
        assert not unknown, f"{item.nodeid}: no such row of the fault matrix: {unknown}"
        if rows:
            _of[item.nodeid] = rows


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for name in _of.get(report.nodeid, ()):
        row = _rows[name]
        if report.outcome != "passed":
            row.bad.append(report.nodeid)
        elif report.when == "call":
            found: dict[str, Any] = dict(report.user_properties)
            row.cases += int(found.pop("cases", 1))
            row.tests.add(report.nodeid.partition("[")[0])
            for what, value in found.items():
                row.figures[what].append(str(value))


def pytest_sessionfinish(session: pytest.Session) -> None:
    where = session.config.getoption("--matrix")
    if not where:
        return
    lacking = [name for name in ROWS if name not in EXTERNAL and (_rows[name].bad or not _rows[name].cases)]
    _put(Path(where), table())
    total = sum(row.cases for row in _rows.values())
    print(f"\nfault matrix: {len(ROWS) - len(lacking)} of {len(ROWS)} rows, {total} cases, in {where}")
    if lacking:
        print(f"not proven: {', '.join(lacking)}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def table() -> str:
    """The matrix as Markdown: fault, required outcome, cases, figures and tests of every row."""
    lines = [
        "| row | what is done | what happens | cases | measured | proven by |",
        "|---|---|---|---|---|---|",
    ]
    for name, (done, happens) in ROWS.items():
        row = _rows[name]
        figures = "; ".join(
            f"{what} {_span(values)}" for what, values in sorted(row.figures.items())
        )  # fmt: skip
        tests = "<br>".join(sorted(f"`{test.removeprefix('tests/')}`" for test in row.tests))
        cases = str(row.cases) if row.cases else ""
        if name in EXTERNAL:
            figures, tests = "below", EXTERNAL[name]
        lines.append(f"| {name} | {done} | {happens} | {cases} | {figures} | {tests or 'not proven'} |")
    return "\n".join(lines)


def _span(values: list[str]) -> str:
    """One figure of several cases: the value, or its least and most."""
    distinct = sorted(set(values), key=lambda value: (_number(value), value))
    return distinct[0] if len(distinct) == 1 else f"{distinct[0]} to {distinct[-1]}"


def _number(value: str) -> float:
    try:
        return float(value.split()[0].replace(",", ""))
    except (ValueError, IndexError):
        return 0.0


def _put(path: Path, text: str) -> None:
    old = path.read_text() if path.exists() else f"{BEGIN}\n{END}\n"
    before, _, rest = old.partition(BEGIN)
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}")
