"""The commands that plan, run and look at studies: each reads its arguments, calls one function, shows the answer.

Invariant: importing this stays cheap; what a command needs is imported when it is called.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli_options import AsJson, Dashboard, OutDir, OutOption, Overrides, StudyFile, print_json


def run(
    study: StudyFile,
    overrides: Overrides = None,
    out: OutOption = None,
    address: Annotated[
        str,
        typer.Option("--address", metavar="local|auto|HOST:PORT", help="Which Ray cluster does the work."),
    ] = "local",
    strict_versions: Annotated[
        bool,
        typer.Option(
            "--strict-versions", help="Refuse artifacts in the store that other library versions have made."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a study, or go on where it stopped; what is in OUT already is not done again.

    Example: temporal-merge run configs/demo.yaml --set grid.seed=[0,1,2]
    """
    from cluster.session import check_address
    from pipeline.config import load_study
    from pipeline.driver import carry_out
    from pipeline.output import ReaderGone
    from pipeline.show import print_results, run_summary

    check_address(address)
    answer = carry_out(load_study(study, overrides or []), out, address, strict_versions=strict_versions)
    with suppress(ReaderGone):  # the study is done, whether anybody reads of it or not
        print_json(run_summary(*answer)) if as_json else print_results(*answer)


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
        print_json(summary)
    else:
        show_plan(workspace, summary)


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
        print_json(answer)
    elif not wait:
        print(answer["job"])
    raise typer.Exit(answer["exit_code"] or 0)


def stop(out: OutDir, address: Dashboard, as_json: AsJson = False) -> None:
    """End the job that works on OUT on a cluster; what is in OUT stays, and submitting again goes on from there.

    Example: temporal-merge stop /shared/runs/demo --address http://head:8265
    """
    from pipeline.submit import stop_study

    job = stop_study(out, address)
    print_json({"job": job, "state": "stopping"}) if as_json else print(f"job {job} is being stopped")


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

    Looking changes nothing; Ctrl-C ends the watching, never the run.

    Example: temporal-merge status runs/demo --watch
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
        print_json(answer) if as_json else show_status(out, answer)


def report(
    out: OutDir,
    track: Annotated[
        bool, typer.Option("--track/--no-track", help="File page and figures with the study's run in MLflow.")
    ] = True,
    split: Annotated[
        str | None,
        typer.Option(
            "--split",
            metavar="test|val",
            help="Report scores on this split, in OUT/report-val for val where both are scored; default test, else val.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write OUT/report: one HTML page that opens offline, figures (PNG, SVG) and tables (CSV); also of a study under way.

    Example: temporal-merge report runs/demo
    """
    from pipeline.report.build import build_report, file_report

    answer = build_report(out, split)
    answer["tracker_pending"], reason = file_report(out, answer) if track else (0, None)
    if as_json:
        print_json(answer)
        return
    print(answer["advice"])
    for title, why in answer["missing"].items():
        print(f"not drawn: {title} ({why})")
    print(f"{answer['html']}: {len(answer['figures']) // 2} figures, {len(answer['tables'])} tables")
    if answer["tracker_pending"]:
        print(f"not in MLflow yet ({reason}): temporal-merge sync {out}")
