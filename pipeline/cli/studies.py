"""The commands that plan, run and inspect studies: each reads its arguments, calls one function, shows the answer.

Invariant: importing this module stays cheap; a command imports what it needs when it is called.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.options import (
    AsJson,
    Dashboard,
    Modules,
    OutDir,
    OutOption,
    Overrides,
    StudyFile,
    print_json,
    use_modules,
)
from pipeline.cli.remote import TOKEN, connected

if TYPE_CHECKING:
    from pipeline.workspace.workspace import Beside

Deliver = Annotated[
    str | None,
    typer.Option(
        "--deliver", metavar="URL",
        help=f"Send every expert that is trained to the live service there, in time-step order. The token is in ${TOKEN}.",
    ),
]  # fmt: skip
License = Annotated[
    str, typer.Option("--license", metavar="NAME", help="With --deliver: the licence of the experts.")
]


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
    modules: Modules = None,
    deliver: Deliver = None,
    license: License = "",
    as_json: AsJson = False,
) -> None:
    """Run a study, or go on where it stopped; what is in OUT already is not done again.

    Example: temporal-merge run configs/demo.yaml --set grid.seed=[0,1,2]
    """
    from cluster.session import check_address
    from pipeline.cli.show import print_results, run_summary
    from pipeline.run.driver import carry_out
    from pipeline.run.output import ReaderGone
    from pipeline.study.config import load_study

    check_address(address)
    use_modules(modules)
    with _delivery(deliver, license) as beside:
        found = load_study(study, overrides or [])
        answer = carry_out(found, out, address, strict_versions=strict_versions, beside=beside)
    with suppress(ReaderGone):  # the study is done, even if its output is not read
        print_json(run_summary(*answer)) if as_json else print_results(*answer)


def _delivering(url: str | None, license: str) -> list[str]:
    """The options of a delivery. Raises UserError."""
    from merge_service.errors import UserError

    if license and url is None:
        raise UserError("--license is said of experts that are delivered: give --deliver URL as well")
    return [*(("--deliver", url) if url else ()), *(("--license", license) if license else ())]


@contextmanager
def _delivery(url: str | None, license: str) -> "Iterator[Beside]":
    """What delivers the experts of a run; nothing without a URL. Raises UserError."""
    _delivering(url, license)
    if url is None:
        yield nullcontext
        return
    from pipeline.service.client.delivery import Delivery

    with connected(url) as service:
        yield Delivery(service, {"license": license} if license else {})


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
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate", help="Train a few steps of each model here, to estimate how long the study takes."
        ),
    ] = False,
    modules: Modules = None,
    as_json: AsJson = False,
) -> None:
    """Show what would run: steps shared between trajectories, compute, disk. Needs no cluster.

    Example: temporal-merge plan configs/demo.yaml --json
    """
    from pipeline.cli.show import show_plan
    from pipeline.run.timing.outlook import calibrate as measure
    from pipeline.run.timing.outlook import estimate, pace_known
    from pipeline.workspace.workspace import Workspace

    use_modules(modules)
    workspace = Workspace.open(study, overrides or [], out, provisional=True)
    if save_streams is not None:
        workspace.save_streams(save_streams)
    pace = pace_known(workspace)
    if calibrate:
        measure(workspace, pace, lambda text: print(text, file=sys.stderr, flush=True))
    summary = {**workspace.summary(), "seconds": estimate(workspace, pace)}
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
    modules: Modules = None,
    deliver: Deliver = None,
    license: License = "",
    as_json: AsJson = False,
) -> None:
    """Run a study as a job on a Ray cluster; submitted again, it attaches to the running job.

    The code, the study, the files it names by relative path and modules are sent; data and OUT are on storage that all nodes share.
    The job outlives this command. The exit code is the run's.

    Example: temporal-merge submit configs/demo.yaml --address http://head:8265 --out /shared/runs/demo --set data.root=/shared/data/mini
    """
    from pipeline.run.submit import Along, submit_study

    use_modules(modules)
    show = (sys.stderr if as_json else sys.stdout) if wait else None
    along = Along(modules or [], _delivering(deliver, license))
    answer = submit_study(study, overrides or [], out, address, along=along, show=show)
    if as_json:
        print_json(answer)
    elif not wait:
        print(answer["job"])
    raise typer.Exit(answer["exit_code"] or 0)


def stop(out: OutDir, address: Dashboard, as_json: AsJson = False) -> None:
    """End the job that works on OUT on a cluster; what is in OUT stays, and submitting again goes on from there.

    Example: temporal-merge stop /shared/runs/demo --address http://head:8265
    """
    from pipeline.run.submit import stop_study

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
    from pipeline.cli.show import show_status, watch_status

    look: Callable[[], Mapping[str, Any]]
    if watch and as_json:
        raise UserError("--watch is for people and --json for programs; leave one out (a program asks again)")
    if address:
        from pipeline.run.submit import remote_status

        look, seconds = partial(remote_status, out, address), 10.0
    else:
        from pipeline.run.status import Look

        look, seconds = Look(out), 1.0
    if watch:
        watch_status(out, look, seconds)
    else:
        answer = look()
        print_json(answer) if as_json else show_status(out, answer)


def report(
    outs: Annotated[
        list[Path],
        typer.Argument(
            metavar="OUT...",
            help="The directory of a run, e.g. runs/demo; several make one report that compares them.",
        ),
    ],
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
    to: Annotated[
        Path | None,
        typer.Option(
            "--to",
            metavar="DIR",
            help="Where the report is written, a directory that it replaces; default OUT/report, and for several runs report-NAME-NAME "
            "beside the first.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write OUT/report: one HTML page that opens offline, figures (PNG, SVG) and tables (CSV); also of a study under way.

    A report of several runs, or one written elsewhere, is not filed in MLflow.

    Example: temporal-merge report runs/demo
    """
    from pipeline.report.build import build_report, file_report

    out, *more = outs
    answer = build_report(out, split, more=more, to=to)
    filed = track and not more and to is None
    answer["tracker_pending"], reason = file_report(out, answer) if filed else (0, None)
    if as_json:
        print_json(answer)
        return
    print(answer["advice"])
    for title, why in answer["missing"].items():
        print(f"not drawn: {title} ({why})")
    print(f"{answer['html']}: {len(answer['figures']) // 2} figures, {len(answer['tables'])} tables")
    if answer["tracker_pending"]:
        print(f"not in MLflow yet ({reason}): temporal-merge sync {out}")
