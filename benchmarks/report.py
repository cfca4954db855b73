"""Medians, ratios and tables of the measurements of `merge.py`, in Markdown.

Invariant: a ratio is between medians of the same repeats on the same inputs, and a failure is shown as a failure.
"""

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from process import MIB, Run

Runs = list[dict[str, Any]]


def one(run: Run) -> str:
    """One run in a few words."""
    if run.failure:
        return f"FAILED, {run.failure}"
    merge = f", merge {run.answer['seconds']:.3f} s" if "seconds" in run.answer else ""
    return f"wall {run.wall:.2f} s, CPU {run.cpu:.2f} s, peak {run.peak / MIB:.0f} MiB{merge}"


def summary(runs: dict[str, Runs]) -> dict[str, Any]:
    """By contender: medians of seconds and bytes, or why it failed; and the ratios between them.

    `merge` is merging and saving without imports, `unsynced` the same without waiting for the disk, `merge_cpu` its CPU
    seconds.
    """
    found: dict[str, Any] = {name: _medians(of) for name, of in runs.items() if name != "limit"}
    found["limit"] = limit = _limit(runs["limit"])
    ours = found["ours"]
    if "failure" in ours or "failure" in limit:
        return found
    found["to_limit"] = {key: ours[key] / limit[key] for key in ("unsynced", "merge", "merge_cpu")}
    whole = found.get("cli", ours).get("process", ours["process"])
    for peer in ("mergekit", "fusionbench"):
        if peer in found and "failure" not in found[peer]:
            merge, process = found[peer]["merge"], found[peer]["process"]
            found[peer] |= {f"merge_over_{key}": merge / ours[key] for key in ("merge", "unsynced")}
            found[peer]["cpu_over_cpu"] = found[peer]["merge_cpu"] / ours["merge_cpu"]
            found[peer]["process_over_process"] = process / whole
    return found


def tables(settings: dict[str, Any], results: dict[str, Any]) -> str:
    """Everything that a reader wants to see."""
    cases = {name: case["summary"] for name, case in results["cases"].items()}
    head = (
        f"{settings['size']}, {settings['experts']} experts of {settings['checkpoint_bytes'] / MIB:.0f} MiB, "
        f"{settings['threads']} threads, medians of {settings['repeats']}"
    )
    parts = [f"\n## {head}\n"]
    if "start_up" in results:
        parts += ["\n### Start-up\n", _start_up(results["start_up"])]
    parts += ["\n### Ours, and the limit (seconds; MiB)\n", _ours(cases), *_incomplete(cases)]
    if any(peer in case for case in cases.values() for peer in ("mergekit", "fusionbench")):
        parts += ["\n### Ours, and other tools (seconds; MiB)\n", _peers(cases)]
    if "comparison" in results:
        parts += ["\n### Differences of the results\n", differences(results["comparison"])]
    return "\n".join(parts)


def _incomplete(cases: dict[str, Any]) -> list[str]:
    return [
        f"- {name}, {contender}: of {found['of']} only, then: {found['then']}"
        for name, case in cases.items()
        for contender, found in case.items()
        if "then" in found
    ]


def differences(comparison: dict[str, dict[str, Any]]) -> str:
    """A table of what `compare` found."""
    columns = ("result", "elements", "differing", "fraction", "largest", "relative to the task vector")
    rows = (
        [
            name,
            f["elements"],
            f["differing"],
            f"{f['fraction']:.2g}",
            f"{f['largest']:.2g}",
            f"{f['relative']:.2g}",
        ]
        if "failure" not in f
        else [name, f["failure"]]
        for name, f in comparison.items()
    )
    return table(columns, rows)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Markdown, its columns aligned; short rows are filled up."""
    lines = [[str(cell) for cell in row] + [""] * (len(columns) - len(row)) for row in (columns, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines
    ]
    return "\n".join([text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *text[1:]])


def _medians(runs: Runs) -> dict[str, Any]:
    """Of the runs that ended well, and how many they are if not all did."""
    good = [run for run in runs if not run["failure"]]
    if not good:
        return {"failure": runs[0]["failure"]}
    found: dict[str, Any] = {name: median(run[name] for run in good) for name in ("wall", "cpu", "peak")}
    found["process"] = median(run["wall"] - run["answer"].get("load", 0) for run in good)
    if all("seconds" in run["answer"] for run in good):
        found["merge"] = median(run["answer"]["seconds"] for run in good)
        found["merge_cpu"] = median(run["answer"]["merge_cpu"] for run in good)
        found["unsynced"] = median(run["answer"]["seconds"] - run["answer"].get("sync", 0) for run in good)
    if all("load" in run["answer"] for run in good):
        found["start_up"] = median(run["answer"]["import"] + run["answer"]["load"] for run in good)
    if len(good) < len(runs):
        found |= {"of": len(good), "then": runs[-1]["failure"]}
    return found


def _limit(runs: Runs) -> dict[str, Any]:
    """The way to read and write whose median is the lowest, without and with the sync."""
    if failure := next((run["failure"] for run in runs if run["failure"]), None):
        return {"failure": failure}
    ways = {way: [run["answer"][way] for run in runs] for way in runs[0]["answer"]}
    unsynced = {way: median(written for written, *_ in times) for way, times in ways.items()}
    synced = {way: median(sum(both) for *both, _ in times) for way, times in ways.items()}
    cpu = {way: median(spent for *_, spent in times) for way, times in ways.items()}
    best = min(unsynced, key=unsynced.__getitem__)
    least = {"unsynced": unsynced[best], "merge": min(synced.values()), "merge_cpu": min(cpu.values())}
    return {**least, "way": best, "ways": unsynced}


def _start_up(runs: dict[str, Runs]) -> str:
    found = {name: _medians(of) for name, of in runs.items()}
    rows = [
        [name, f["failure"]] if "failure" in f else [name, _s(f["wall"]), _s(f["cpu"]), _mib(f["peak"])]
        for name, f in found.items()
    ]
    return table(("`temporal-merge merge`", "wall", "CPU", "peak"), rows)


def _ours(cases: dict[str, Any]) -> str:
    columns = [
        "technique",
        "limit",
        "merge",
        "ratio",
        "limit, synced",
        "merge, synced",
        "ratio",
        "ratio of CPU",
        "start-up",
    ]
    columns += ["process", "CPU", "peak", "CLI", "CLI CPU", "CLI peak"]
    return table(columns, (_ours_row(name, case) for name, case in cases.items()))


def _ours_row(name: str, case: dict[str, Any]) -> list[str]:
    ours, limit, cli = case["ours"], case["limit"], case.get("cli", {})
    if "failure" in ours or "failure" in limit:
        return [name, ours.get("failure") or limit["failure"]]
    row = [name]
    for key in ("unsynced", "merge"):
        row += [_s(limit[key]), _s(ours[key]), f"{case['to_limit'][key]:.2f}"]
    row.append(f"{case['to_limit']['merge_cpu']:.2f}")
    row += [_s(ours["start_up"]), _s(ours["wall"]), _s(ours["cpu"]), _mib(ours["peak"])]
    if "failure" in cli:
        return [*row, cli["failure"]]
    return [*row, _s(cli["wall"]), _s(cli["cpu"]), _mib(cli["peak"])] if cli else row


def _peers(cases: dict[str, Any]) -> str:
    peers = [peer for peer in ("mergekit", "fusionbench") if any(peer in case for case in cases.values())]
    columns = ["technique", "ours: merge (synced)", "process", "peak"]
    for peer in peers:
        columns += [
            f"{peer}: merge",
            "times ours (synced)",
            "process",
            "times ours",
            "CPU",
            "times ours",
            "peak",
        ]
    rows = []
    for name, case in cases.items():
        ours = case["ours"]
        if "failure" in ours or not any(peer in case for peer in peers):
            continue
        whole = case.get("cli", ours)
        merge = f"{_s(ours['unsynced'])} ({_s(ours['merge'])})"
        row = [name, merge, _s(whole.get("process", ours["process"])), _mib(ours["peak"])]
        for peer in peers:
            row += _peer_cells(case.get(peer))
        rows.append(row)
    return table(columns, rows)


def _peer_cells(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return ["-"] * 7
    if "failure" in found:
        return [found["failure"], *["-"] * 6]
    merge = f"{found['merge_over_unsynced']:.1f} ({found['merge_over_merge']:.1f})"
    cpu = f"{found['cpu_over_cpu']:.1f}"
    process = f"{found['process_over_process']:.1f}"
    return [
        _s(found["merge"]),
        merge,
        _s(found["process"]),
        process,
        _s(found["merge_cpu"]),
        cpu,
        _mib(found["peak"]),
    ]


def _s(seconds: float) -> str:
    return f"{seconds:.3f}" if seconds < 1 else f"{seconds:.2f}"


def _mib(size: float) -> str:
    return f"{size / MIB:.0f}"
