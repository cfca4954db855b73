"""The commands that maintain a run: export, verify, gc, pack, sync, ui.

Invariant: importing this module stays cheap; a command imports what it needs when it is called.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import AsJson, OutDir, print_json


def export(
    out: OutDir,
    trajectory: Annotated[
        str,
        typer.Option("--trajectory", metavar="NAME", help="Which strategy; `report` and `plan` list them."),
    ],
    target: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="The directory to write; it must be new.")
    ],
    t: Annotated[
        int | None,
        typer.Option("--t", min=0, help="After which task; by default after the last one, 0 is the base."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the model that a trajectory serves after a task, as a directory that open_clip opens.

    Weights that the store keeps as a recipe are made again, with the sha256 of their record.

    Example: temporal-merge export runs/demo --trajectory best_in_time --t 5 --out model
    """
    from pipeline.workspace.export import export as write

    answer = write(out, trajectory, t, target)
    made = "made from its recipe" if answer["made"] else "copied"
    print_json(answer) if as_json else print(
        f"{answer['out']}: {answer['trajectory']} at t = {answer['t']}, {made}, sha256 {answer['sha256']}"
    )


def verify(
    out: OutDir,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also make every merge again that is kept as a recipe.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read every artifact of a run again and check its bytes and its lineage.

    Ends with code 1 when something is wrong. Example: temporal-merge verify runs/demo
    """
    from pipeline.workspace.opening import open_store

    store = open_store(out)
    problems = store.verify()
    problems += store.recipes.problems() if deep and not problems else []
    if as_json:
        print_json({"problems": problems})
    else:
        for problem in problems:
            print(problem)
        print(
            f"{out}: {len(problems)} problems"
            if problems
            else f"{out}: every artifact and its lineage is intact"
        )
    if problems:
        raise typer.Exit(1)


def gc(
    out: OutDir,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; change nothing.")] = False,
    forget: Annotated[
        list[str] | None,
        typer.Option("--forget", metavar="NAME", help="Drop the registration of a study whose OUT is gone."),
    ] = None,
    set_aside: Annotated[
        bool,
        typer.Option("--set-aside", help="Also remove damaged artifacts and second results that were kept."),
    ] = False,
    keep: Annotated[
        str | None,
        typer.Option(
            "--keep",
            metavar="all|final|best|none",
            help="Which merges of this study stay as files (storage.keep); the others become recipes.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Remove from the store what no study refers to, and from OUT what finished steps left behind.

    Example: temporal-merge gc runs/demo --dry-run
    """
    from pipeline.workspace.gc import collect, describe

    answer = collect(out, dry_run, forget or [], set_aside, keep)
    print_json(answer) if as_json else print("\n".join(describe(answer)))


def pack(
    out: OutDir,
    undo: Annotated[bool, typer.Option("--undo", help="Make files of packed experts again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Store the experts of a run as their differences from the base, without loss: about .6 of the disk.

    They are unpacked where something reads them. Example: temporal-merge pack runs/demo
    """
    from pipeline.workspace.packing import describe
    from pipeline.workspace.packing import pack as carry_out

    answer = carry_out(out, undo)
    print_json(answer) if as_json else print("\n".join(describe(answer)))


def sync(out: OutDir, as_json: AsJson = False) -> None:
    """Deliver to the tracker what it has not received yet; goes on while rows arrive.

    Ends with code 1 while something is left. Example: temporal-merge sync runs/demo
    """
    from pipeline.tracking.tracker import sync as deliver

    def say(left: int) -> None:
        print(f"{out}: {left} rows to go", file=sys.stderr, flush=True)

    left, why = deliver(out, say=say)
    if as_json:
        print_json({"tracker_pending": left, "reason": why})
    else:
        print(
            f"{out}: everything is delivered" if not left else f"{out}: {left} rows are still pending ({why})"
        )
    if left:
        raise typer.Exit(1)


def ui(
    out: OutDir,
    port: Annotated[
        int, typer.Option("--port", min=1, max=65535, help="Where it listens, on loopback.")
    ] = 5000,
    as_json: AsJson = False,
) -> None:
    """Open the MLflow UI on a run's tracking store (on this machine only); its address is printed once it answers.

    Example: temporal-merge ui runs/demo
    """
    from pipeline.tracking.mlflow.ui_server import check_port, serve
    from pipeline.tracking.tracker import ui_command, ui_url
    from pipeline.workspace.opening import open_store

    open_store(out)
    check_port(port)
    command, url = ui_command(out, port=port), ui_url(out, port=port)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

    def ready() -> None:
        print_json({"url": url}) if as_json else print(f"MLflow UI (Ctrl-C ends it): {url}")
        sys.stdout.flush()

    try:
        code = serve(command, url, ready)
    except KeyboardInterrupt:  # the normal way to end the server
        code = 0
    raise typer.Exit(code)
