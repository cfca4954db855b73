"""The `temporal-merge` command: read the arguments, call one function, show its answer.

Invariant: importing this module stays cheap (no torch, ray or mlflow), and a person's mistake ends with exit code 2 and
one clear message; 0 is done, 1 is a failure that is not the user's, 130 and 143 are signals.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from pipeline.cli_options import (
    AsJson,
    Base,
    DeviceName,
    KeepThresholds,
    MergedOut,
    OutDir,
    OutOption,
    Overrides,
    Parameters,
    ShardSize,
    StudyFile,
    Threads,
    Workers,
    WorkersAddress,
)

app = typer.Typer(
    name="temporal-merge",
    help="Train experts as tasks arrive, merge them over time, and know which strategy to deploy.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Dashboard = Annotated[
    str,
    typer.Option(
        "--address",
        metavar="http://HEAD:8265",
        help="The dashboard of the cluster's head.",
        show_default=False,
    ),
]


@app.command()
def run(
    study: StudyFile,
    overrides: Overrides = None,
    out: OutOption = None,
    address: Annotated[
        str,
        typer.Option("--address", metavar="local|auto|HOST:PORT", help="Which Ray cluster does the work."),
    ] = "local",
) -> None:
    """Run a study, or go on where it stopped; what is in OUT already is not done again.

    Example: temporal-merge run configs/demo.yaml --set grid.seed=[0,1,2]
    """
    from pipeline.driver import run_study

    run_study(study, overrides or [], out, address)


@app.command()
def plan(
    study: StudyFile,
    overrides: Overrides = None,
    out: OutOption = None,
    save_streams: Annotated[
        Path | None,
        typer.Option(
            "--save-streams", metavar="DIR", help="Also write every stream there as a file to share."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what would run: steps shared between trajectories, compute, disk. Needs no cluster.

    Example: temporal-merge plan configs/demo.yaml --json
    """
    from pipeline.show import show_plan
    from pipeline.workspace import Workspace

    workspace = Workspace.open(study, overrides or [], out, provisional=True)
    if save_streams is not None:
        workspace.save_streams(save_streams)
    summary = workspace.summary()
    if as_json:
        _print_json(summary)
    else:
        show_plan(workspace, summary)


@app.command()
def submit(
    study: StudyFile,
    address: Dashboard,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="On storage that all nodes of the cluster share; absolute."
        ),
    ] = None,
    wait: Annotated[
        bool,
        typer.Option("--wait/--no-wait", help="Show its progress to the end, or print its id and leave."),
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Have a Ray cluster run a study as a job; submitted again, it attaches to the job under way instead of doubling it.

    The code, the study and the files it names by relative path go along; data and OUT are on storage that all nodes share.
    The job outlives this command. The exit code is the run's.

    Example: temporal-merge submit configs/demo.yaml --address http://head:8265 --out /shared/runs/demo --set data.root=/shared/data/mini
    """
    from pipeline.submit import submit_study

    answer = submit_study(study, overrides or [], out, address, wait=wait, quiet=as_json)
    if as_json:
        _print_json(answer)
    elif not wait:
        print(answer["job"])
    raise typer.Exit(answer["exit_code"] or 0)


@app.command()
def stop(out: OutDir, address: Dashboard) -> None:
    """End the job that works on OUT on a cluster; what is in OUT stays, and submitting again goes on from there."""
    from pipeline.submit import stop_study

    print(f"job {stop_study(out, address)} is being stopped")


@app.command()
def status(
    out: OutDir,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="http://HEAD:8265",
            help="Ask the cluster that has OUT, through its dashboard.",
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Stay, and show it as it goes on, until the run ends.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say how far a run is, and what the tracker has not received yet; with --address, on a cluster and with its job.

    Looking changes nothing; Ctrl-C ends the watching, never the run. Example: temporal-merge status runs/demo --watch
    """
    from merge_service.errors import UserError
    from pipeline.show import show_status, watch_status

    look: Callable[[], dict[str, Any]]
    if watch and as_json:
        raise UserError("--watch is for people and --json for programs; leave one out (a program asks again)")
    if address:
        from pipeline.submit import remote_status

        look, seconds = partial(remote_status, out, address), 10.0
    else:
        from pipeline.status import Look

        look, seconds = Look(out), 1.0
    if watch:
        watch_status(out, look, seconds)
    else:
        answer = look()
        _print_json(answer) if as_json else show_status(out, answer)


@app.command()
def merge(
    experts: Annotated[list[Path], typer.Argument(metavar="EXPERT...", help="Checkpoints, oldest first.")],
    technique: Annotated[str, typer.Option("--technique", metavar="NAME", help="See `techniques`.")],
    out: MergedOut,
    base: Base = None,
    overrides: Parameters = None,
    threads: Threads = None,
    workers: Workers = 1,
    address: WorkersAddress = None,
    device: DeviceName = None,
    shard_size: ShardSize = None,
    keep_thresholds: KeepThresholds = False,
    as_json: AsJson = False,
) -> None:
    """Merge checkpoints on disk; no study, and no cluster unless asked for. Memory does not grow with their number.

    With --workers or --address Ray workers merge, each its part of the tensors: all files must be on storage they share.
    A checkpoint is a .safetensors file, a sharded *.safetensors.index.json, or a directory holding either.

    Example: temporal-merge merge --technique ties --base base.safetensors --set density=0.2 --out m.safetensors a.safetensors b.safetensors
    """
    from pipeline.api import merge_files
    from pipeline.show import parameters_from

    report = merge_files(
        technique,
        parameters_from(overrides or []),
        base,
        experts,
        out,
        threads=threads,
        workers=workers,
        address=address,
        device=device,
        shard_size=shard_size,
        keep_thresholds=keep_thresholds,
    )
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    answer = {
        "out": str(report.out),
        "technique": technique,
        "experts": len(experts),
        "seconds": round(report.seconds, 3),
    }
    _print_json(answer) if as_json else print(
        f"{report.out}: {technique} of {len(experts)} checkpoints in {report.seconds:.2f} s"
    )


@app.command()
def evaluate(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A weights directory or a .safetensors file.")
    ],
    study: Annotated[
        Path, typer.Option("--study", metavar="STUDY.yaml", help="Says which data and which model.")
    ],
    datasets: Annotated[
        str | None, typer.Option("--datasets", metavar="a,b", help="Default: all that the study scores.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Score one checkpoint exactly as a run would: zero-shot top-1, retrieval recall@5, KA, ZS and GM."""
    from pipeline.evaluation import evaluate_checkpoint
    from pipeline.show import show_scores

    names = [name.strip() for name in datasets.split(",") if name.strip()] if datasets else None
    answer = evaluate_checkpoint(checkpoint, study, overrides or [], names)
    _print_json(answer) if as_json else show_scores(answer)


@app.command()
def techniques(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One technique in full.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the merging techniques, or explain one: formula, parameters, needs, forms, paper."""
    from pipeline.show import show_techniques, techniques_as_json

    _print_json(techniques_as_json(name)) if as_json else show_techniques(name)


@app.command()
def verify(out: OutDir, as_json: AsJson = False) -> None:
    """Read every artifact of a run again and check its bytes and its lineage."""
    from pipeline.status import open_store

    store = open_store(out)
    problems = store.verify()
    if as_json:
        _print_json({"problems": problems})
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


@app.command()
def check(
    suite: Annotated[
        Path,
        typer.Argument(metavar="SUITE.yaml", help="A suite file, e.g. configs/fomo_in_flux/datasets.yaml."),
    ],
    root: Annotated[Path, typer.Option("--root", metavar="DIR", help="The folder that holds the datasets.")],
    deep: Annotated[bool, typer.Option("--deep", help="Read every shard whole, not only manifests.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say which datasets of a suite are there, which are missing or wrong, and what to do about each.

    Ends with code 2 while something is missing or wrong. Example: temporal-merge check configs/fomo_in_flux/datasets.yaml --root /data/fomo_in_flux
    """
    from pipeline.suites import check as check_root
    from pipeline.suites import read_suite_file, summary

    asked = read_suite_file(suite)
    answer = summary(asked, root, check_root(asked, root, deep))
    if as_json:
        _print_json(answer)
    else:
        for finding in answer["findings"]:
            print(f"{finding['what']:8} {finding['dataset']} ({finding['role']}): {finding['text']}")
        print(f"{root}: {answer['usable']} of {answer['datasets']} datasets of {asked.name} are ready")
    if not answer["complete"]:
        raise typer.Exit(2)


@app.command()
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
    from pipeline.gc import collect, describe

    answer = collect(out, dry_run, forget or [], set_aside)
    _print_json(answer) if as_json else print("\n".join(describe(answer)))


@app.command()
def report(
    out: OutDir,
    track: Annotated[
        bool, typer.Option("--track/--no-track", help="File page and figures with the study's run in MLflow.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Write OUT/report: one HTML page that opens offline, figures (PNG, SVG) and tables (CSV); also of a study under way.

    Example: temporal-merge report runs/demo
    """
    from pipeline.report.build import build_report, file_report

    answer = build_report(out)
    answer["tracker_pending"], why = file_report(out, answer) if track else (0, None)
    if as_json:
        _print_json(answer)
        return
    print(answer["advice"])
    for title, why in answer["missing"].items():
        print(f"not drawn: {title} ({why})")
    print(f"{answer['html']}: {len(answer['figures']) // 2} figures, {len(answer['tables'])} tables")
    if answer["tracker_pending"]:
        print(f"not in MLflow yet ({why}): temporal-merge sync {out}")


@app.command()
def sync(out: OutDir) -> None:
    """Deliver to the tracker what it has not received yet."""
    from pipeline.tracking import sync as deliver

    left, why = deliver(out)
    print(f"{out}: everything is delivered" if not left else f"{out}: {left} rows are still pending ({why})")
    if left:
        raise typer.Exit(1)


@app.command()
def ui(out: OutDir, port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 5000) -> None:
    """Open the MLflow UI on a run's tracking store (on this machine only)."""
    from pipeline.status import open_store
    from pipeline.tracking import ui_command, ui_url

    open_store(out)
    command = ui_command(out, port=port)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    print(f"MLflow UI (Ctrl-C ends it): {ui_url(out, port=port)}", flush=True)
    os.execv(command[0], command)


def _print_json(answer: Any) -> None:
    print(json.dumps(answer, indent=2))


def main() -> NoReturn:
    """Entry point of the console script."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(_main())


def _main() -> int:
    from merge_service.errors import UserError

    try:
        return app(standalone_mode=False) or 0
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except Exception as error:
        if hasattr(error, "show"):  # wrong usage, as the command line library tells it
            error.show()
            return 2
        if isinstance(error, UserError) or getattr(error, "exit_code", None) == 2:
            print(f"error: {error}", file=sys.stderr)
            return 2
        if os.environ.get("TEMPORAL_MERGE_TRACEBACK"):
            raise
        print(f"failed: {type(error).__name__}: {error}", file=sys.stderr)
        print("(set TEMPORAL_MERGE_TRACEBACK=1 for the traceback)", file=sys.stderr)
        return 1


if __name__ == "__main__":
    main()
