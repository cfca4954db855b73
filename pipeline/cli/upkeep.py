"""The commands that keep a run in order: verify, gc, sync, ui.

Invariant: importing this stays cheap; what a command needs is imported when it is called.
"""

import os
import sys
from typing import Annotated

import typer

from pipeline.cli.options import AsJson, OutDir, print_json


def verify(out: OutDir, as_json: AsJson = False) -> None:
    """Read every artifact of a run again and check its bytes and its lineage.

    Ends with code 1 when something is wrong. Example: temporal-merge verify runs/demo
    """
    from pipeline.workspace.opening import open_store

    store = open_store(out)
    problems = store.verify()
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
    as_json: AsJson = False,
) -> None:
    """Remove from the store what no study refers to, and from OUT what finished steps left behind.

    Example: temporal-merge gc runs/demo --dry-run
    """
    from pipeline.workspace.gc import collect, describe

    answer = collect(out, dry_run, forget or [], set_aside)
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

    raise typer.Exit(serve(command, url, ready))
