"""The commands that reach a service over HTTP: serve, arrive, next, and what `service ...` prints of a service at a URL.

Invariant: as for `pipeline.cli`, importing this module stays cheap. Token and address come from the environment; a token is never an
argument, which other users of the machine could read.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import AsJson, Overrides, print_json

if TYPE_CHECKING:
    from pipeline.service.client import Service
    from pipeline.service.http.live.schemas import ArrivalShown, TokenShown

TOKEN, URL = "TEMPORAL_MERGE_TOKEN", "TEMPORAL_MERGE_URL"
Url = Annotated[
    str | None,
    typer.Option(
        "--url", metavar="URL", help=f"A running service, e.g. http://127.0.0.1:8420; by default ${URL}. The token is in ${TOKEN}."
    ),
]  # fmt: skip
Task = Annotated[str, typer.Option("--task", metavar="TASK", help="What the expert is for.")]


def serve(
    config: Annotated[Path, typer.Argument(metavar="SERVICE.yaml", help="A configuration.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where everything goes; default service/NAME.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only check the configuration.")] = False,
    suggest_gates: Annotated[
        Path | None,
        typer.Option(
            "--suggest-gates",
            metavar="STUDY_OUT",
            help="Only print margins for the gates, read off a finished study of the same strategy.",
        ),
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Serve the model that arriving experts make, until Ctrl-C. The same command goes on where it ended.

    It prints its address, and the file of the first token. docs/service.md has the way of an expert.

    Example: temporal-merge serve configs/service.yaml
    """
    from merge_service.errors import UserError
    from pipeline.service.config import read_config

    found = read_config(config, overrides or [])
    if suggest_gates is not None:
        from pipeline.results.margins import Wanted, block, losses
        from pipeline.results.over_time import read_finished

        if as_json:
            raise UserError("--suggest-gates prints YAML for the configuration; leave --json out")
        wanted = Wanted(found.timeline, found.model.config, found.gates.split)
        print(block(losses(read_finished(suggest_gates), wanted), str(suggest_gates), wanted))
        return
    if found.resources.home == "ray":
        from cluster.serve import check_installed

        check_installed()
    if check:
        strategy = found.timeline
        merged = f" by {strategy.technique}" if strategy.technique else ""
        text = f"{config}: service {found.name}: init {strategy.init}, deploy {strategy.deploy}{merged}"
        body = {"init": strategy.init, "deploy": strategy.deploy, "technique": strategy.technique}
        _print(as_json, {"name": found.name, **body}, text)
        return
    if as_json:
        raise UserError("--json is for the answer of --check; a service that runs answers at /v1/status")
    from pipeline.service.processes.together import serve as served

    served(out or Path("service") / found.name, found)


def arrive(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help="A weights directory, file or index of shards, or an adapter's folder."
        ),
    ],
    task: Task,
    url: Url = None,
    owner: Annotated[
        str | None,
        typer.Option("--owner", metavar="NAME", help="Whose expert it is; by default as the token says."),
    ] = None,
    license: Annotated[str, typer.Option("--license", metavar="NAME", help="Its licence.")] = "",
    note: Annotated[str, typer.Option("--note", metavar="TEXT", help="A remark, e.g. on the data.")] = "",
    ticket: Annotated[
        Path | None,
        typer.Option("--ticket", metavar="FILE", help="The start ticket, a file that `next` has written."),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Until the service has decided.")] = False,
    as_json: AsJson = False,
) -> None:
    """Send an expert to a running service. Parts that came before are not sent again, so a command that was cut off is given again.

    With --wait it ends with code 0 if the expert is promoted or held, and 3 if it is quarantined or rejected.

    Example: temporal-merge arrive expert --task letters --license MIT --wait
    """
    said = {"owner": owner, "license": license, "note": note}
    proof = _ticket(ticket) if ticket else None
    with connected(url) as service:
        came = service.arrive(
            checkpoint, task, proof, _progress, **{key: value for key, value in said.items() if value}
        )
        if not wait:
            _print(as_json, came.model_dump(), f"{came.id} ({task}): {came.status}")
            return
        print(f"{came.id} ({task}) came", file=sys.stderr)
        say(service.wait(came.id), as_json)


def _ticket(file: Path) -> str:
    """The text of a ticket. Raises UserError."""
    from merge_service.errors import UserError

    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"--ticket {file} is no file of text; give the one that `next` has written") from None


def next(
    task: Task,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A directory for weights and ticket.")],
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Fetch the weights that the next expert of a task starts from, and a ticket. Train from them, then `arrive --ticket DIR/ticket`.

    Example: temporal-merge next --task letters --out start
    """
    with connected(url) as service:
        start = service.next(task, out)
    text = f"{out}: t = {start.t}, sha256 {start.sha256}; send the expert with --ticket {out / 'ticket'}"
    _print(as_json, start.model_dump(), text)


def tokens(
    url: Url = None,
    issue: Annotated[
        str | None,
        typer.Option(
            "--issue",
            metavar="reader|submitter|operator",
            help="Issue a token of this role; its text is shown once.",
        ),
    ] = None,
    revoke: Annotated[
        str | None, typer.Option("--revoke", metavar="ID", help="End a token, at once.")
    ] = None,
    days: Annotated[float, typer.Option("--days", metavar="N", help="How long a new one is good for.")] = 90,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="TASK", help="What a new one is for; may be repeated."),
    ] = None,
    owner: Annotated[
        list[str] | None,
        typer.Option("--owner", metavar="NAME", help="Whose experts a new one may send; may be repeated."),
    ] = None,
    per_day: Annotated[
        int | None,
        typer.Option("--per-day", metavar="N", help="How many experts a new one may send in 24 hours."),
    ] = None,
    note: Annotated[str, typer.Option("--note", metavar="TEXT", help="A name for a new one.")] = "",
    as_json: AsJson = False,
) -> None:
    """List the tokens of a running service, issue one, or revoke one.

    Example: temporal-merge service tokens --issue submitter --owner ann --per-day 10
    """
    from merge_service.errors import UserError

    if issue and revoke:
        raise UserError("--issue and --revoke: give one of them")
    with connected(url) as service:
        if revoke:
            service.revoke(revoke)
            _print(as_json, {"revoked": revoke}, f"{revoke} opens nothing any more")
        elif issue:
            new = service.issue(
                issue, days, tasks=task or None, owners=owner or None, per_day=per_day, note=note
            )
            _print(as_json, new.model_dump(), new.token)
        else:
            found = service.tokens()
            lines = [f"{one.id}  {one.role:10} {_ends(one)}  {one.note}".rstrip() for one in found.tokens]
            _print(as_json, found.model_dump(), "\n".join(lines))


def connected(url: str | None) -> "Service":
    """The service at a URL, or at that of the environment. Raises UserError."""
    from merge_service.errors import UserError
    from pipeline.service.client import Service

    address, token = url or os.environ.get(URL), os.environ.get(TOKEN)
    if not address:
        raise UserError(f"no service is named: give --url, or set {URL}")
    if not token:
        raise UserError(
            f"{TOKEN} is not set: it holds the token of the service, whose first one is in OUT/service/NAME/door"
        )
    return Service(address, token.strip())


def is_remote(out: Path | None, url: str | None) -> bool:
    """Whether a command is about a service at a URL, not in a directory. Raises UserError unless it is exactly one of the two."""
    from merge_service.errors import UserError

    if out is not None and url is not None:
        raise UserError("--out names a service in a directory, --url one over HTTP: give one of them")
    if out is None and url is None and not os.environ.get(URL):
        raise UserError(
            f"give --out DIR for a service in a directory, or --url URL (or {URL}) for one that runs"
        )
    return out is None


def say(one: "ArrivalShown", as_json: bool) -> None:
    """One arrival with its gates. Ends with code 3 if it was stopped."""
    if as_json:
        print_json(one.model_dump())
    else:
        _describe(one)
    if one.status in ("quarantined", "rejected"):
        raise typer.Exit(3)


def _describe(one: "ArrivalShown") -> None:
    print(f"{one.id} ({one.task}, of {one.owner}): {one.status}{f', t = {one.t}' if one.t else ''}")
    if one.reasons:
        print(f"  {', '.join(one.reasons)}: {one.detail}")
    for gate in one.verdicts:
        figures = (
            ""
            if gate.difference is None
            else f" {gate.difference:+.4f} ({gate.low:+.4f} to {gate.high:+.4f})"
        )
        print(f"  {gate.gate:34} {gate.verdict:9}{figures}, margin {gate.margin:g}")
    if one.scored and one.scored.gm is not None:
        print(f"  KA {one.scored.ka:.4f}, ZS {one.scored.zs:.4f}, GM {one.scored.gm:.4f}")


def status(url: str | None, as_json: bool) -> None:
    """What is served, what is accepted, and what is on its way."""
    with connected(url) as service:
        found = service.status()
    live = found.live
    if as_json or live is None:
        print_json(found.model_dump())
        return
    print("\n".join(live.lines()))


def arrivals(url: str | None, as_json: bool) -> None:
    """Every arrival with what became of it."""
    with connected(url) as service:
        found = [*service.arrivals()]
    if as_json:
        print_json([one.model_dump() for one in found])
        return
    for one in found:
        t = f"t {one.t}" if one.t else ""
        print(f"{one.id}  {one.status:12} {t:6} {one.task:16} {', '.join(one.reasons)}".rstrip())


def act(url: str | None, as_json: bool, done: "Callable[[Service], ArrivalShown]") -> "ArrivalShown":
    """Do something about an arrival, print it, and return it."""
    with connected(url) as service:
        one = done(service)
    if as_json:
        print_json(one.model_dump())
    else:
        _describe(one)
    return one


def rollback(url: str | None, t: int, reason: str, hold: bool) -> None:
    """Serve the model of another time step."""
    with connected(url) as service:
        live = service.rollback(t, reason, hold)
        while (
            live.asked is not None and (now := service.status().live) is not None
        ):  # weights that must be made first
            live = now
            time.sleep(0.2)
    print(f"t = {live.served.t} of {live.t} is served, sha256 {live.served.sha256}")


def remove(url: str | None, as_json: bool, done: "Callable[[Service], ArrivalShown]") -> None:
    """Remove an arrival, and print it. Ends with code 3 if a gate has kept it."""
    if act(url, as_json, done).t is not None:
        raise typer.Exit(3)


def _ends(token: "TokenShown") -> str:
    from datetime import UTC, datetime

    if token.revoked is not None:
        return "revoked"
    return "" if token.expires is None else f"until {datetime.fromtimestamp(token.expires, UTC):%Y-%m-%d}"


def _progress(there: int, every: int) -> None:
    if sys.stderr.isatty():
        print(
            f"\r{there:,} of {every:,} bytes are there", end="\n" if there == every else "", file=sys.stderr
        )


def _print(as_json: bool, body: dict[str, object], text: str) -> None:
    if as_json:
        print_json(body)
    else:
        print(text)
