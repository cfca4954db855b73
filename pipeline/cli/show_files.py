"""Answers about files for people: the parameters that were written, the techniques, how the task vectors of a merge lie.

Apart from `show`, which needs plans and results: a merge of two files starts without them. Invariant: as of `show`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from merge_service.errors import UserError
from merge_service.merging import MergePlan
from merge_service.techniques import broken, get
from pipeline.cli.options import print_json
from pipeline.console import WARNING, complain
from pipeline.console import console as made_console
from pipeline.merging.compare import Comparison
from pipeline.merging.planning import check_room
from pipeline.merging.techniques import techniques_as_json


def parameters_from(overrides: Sequence[str]) -> dict[str, Any]:
    """`p=v` pairs as a mapping; values are read as those of a study. Raises UserError."""
    if not overrides:
        return {}
    from pipeline.study.yaml_input import parse

    answer = {}
    for text in overrides:
        key, found, value = text.partition("=")
        if not found or not key.strip():
            raise UserError(f"--set {text!r}: write parameter=value, e.g. --set density=0.2")
        answer[key.strip()] = parse(value, f"--set {text!r}")
    return answer


def new_table(title: str, *columns: str) -> Table:
    """A table without a frame, the first column of which is text and the others numbers."""
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def show_comparison(found: Comparison) -> None:
    """Task vectors of a merge: norm, cosine with the merged one, and for each the most opposed other expert."""
    shown = new_table(
        "task vectors", "expert", "norm", "cosine with merged", "lowest cosine", "most sign conflicts"
    )
    last = len(found.names) - 1
    for at, name in enumerate(found.names):
        others = [other for other in range(last) if other != at]
        row = [f"{found.norms[at]:.4g}", "" if at == last else _number(found.cosines[at][last])]
        shown.add_row(Text(name), *row, *(["", ""] if at == last else _most_against(found, at, others)))
    made_console().print(shown)


def show_plan(plan: MergePlan, as_json: bool) -> None:
    """The plan of a merge; raises UserError after it where the result has no room."""
    answer: dict[str, Any] = {
        "technique": plan.technique,
        "experts": plan.experts,
        "inputs_bytes": plan.inputs,
        "read_bytes": {"total": sum(plan.read.values()), **plan.read},
        "passes": round(plan.passes, 2),
        "written_bytes": plan.written,
        "shards": plan.shards,
        "memory_bytes": plan.memory,
        "disk": {"needed_bytes": plan.disk, "free_bytes": plan.free, "place": str(plan.place), "fits": plan.fits},
        "seconds": round(plan.seconds, 1),
        "throughput": {"bytes_per_second": int(plan.throughput.rate), "source": plan.throughput.source},
        **({"worker_bytes": list(plan.shares)} if plan.shares else {}),
        "notes": list(plan.notes),
    }  # fmt: skip
    if as_json:
        print_json(answer)
    else:
        read = ", ".join(f"{name} {size_of(size)}" for name, size in plan.read.items())
        print(f"{plan.technique} of {plan.experts} checkpoints; nothing is written by a plan")
        print(f"inputs   {size_of(plan.inputs)}")
        print(
            f"read     {size_of(sum(plan.read.values()))} in {plan.passes:.1f} passes over the inputs: {read}"
        )
        print(f"written  {size_of(plan.written)} in {plan.shards} file{'s' * (plan.shards > 1)}")
        print(f"disk     {size_of(plan.disk)} at {plan.place}, {size_of(plan.free)} free")
        print(f"memory   about {size_of(plan.memory)}, pages of files not counted")
        for at, size in enumerate(plan.shares):
            print(f"worker {at}  reads {size_of(size)} in a pass")
        pace = f"{size_of(int(plan.throughput.rate))}/s and thread, {plan.throughput.source}"
        print(f"seconds  about {plan.seconds:,.0f} ({pace})")
        for note in plan.notes:
            print(f"note: {note}")
    check_room(plan)


def size_of(size: int) -> str:
    """Bytes as people write them, in decimal units."""
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size / 1e3:,.1f} kB"


def _most_against(found: Comparison, at: int, others: Sequence[int]) -> list[str]:
    """The lowest cosine and the most sign conflicts of one expert with another, each with the other's name."""
    cosines = [(value, other) for other in others if (value := found.cosines[at][other]) is not None]
    conflicts = [(value, other) for other in others if (value := found.conflicts[at][other]) is not None]
    chosen = [min(cosines, default=None), max(conflicts, default=None)]
    formats = ("{:.3f} ({})", "{:.1%} ({})")
    return [
        "" if one is None else form.format(one[0], found.names[one[1]]) for one, form in zip(chosen, formats)
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _needs(one: Mapping[str, Any]) -> list[str]:
    """What is needed besides experts: the base, statistics by kind."""
    return [*one["needs"], *one["statistics"]]


def _data(one: Mapping[str, Any]) -> str:
    """The data in a word: none, unlabelled, labelled."""
    return str(one["data"]).split()[0] if one["data"] else "none"


def show_techniques(name: str | None) -> None:
    """The catalogue, or one technique in full."""
    console = made_console()
    if name is None:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("technique", "forms", "needs", "data", "state", "arrival", "parameters", "paper"):
            table.add_column(column)
        for one in techniques_as_json(None):
            parameters = ", ".join(f"{key}={entry['default']}" for key, entry in one["params"].items())
            table.add_row(
                one["name"],
                " ".join(one["forms"]),
                " ".join(_needs(one)) or "-",
                _data(one),
                one["state"],
                one["arrival"],
                parameters,
                one["paper"],
            )
        console.print(table)
        for which, why in broken().items():
            complain("warning", f"technique {which} cannot be used: {why}", WARNING)
        return
    one = techniques_as_json(name)
    console.print(f"{one['name']}\n  {one['formula']}\n  paper: {one['paper'] or '-'}", markup=False)
    origin = get(name).origin
    if origin is not None:
        console.print(f"  written in: {origin.module} (sha256 {origin.source})", markup=False, soft_wrap=True)
    console.print(
        f"  forms: {', '.join(one['forms'])}\n  needs: {', '.join(_needs(one)) or 'nothing but the checkpoints'}"
    )
    console.print(
        f"  data: {one['data'] or 'none'}\n  state: {one['state']}\n  an arrival costs: {one['arrival']}",
        markup=False,
    )
    for key, entry in one["params"].items():
        allowed = f" [{' | '.join(entry['choices'])}]" if entry["choices"] else ""
        console.print(f"  {key} = {entry['default']}{allowed}: {entry['doc']}", markup=False)
