"""The commands of a live service in a directory: experts in, what became of them, and taking back.

Invariant: as for `pipeline.cli`, importing this module stays cheap. An operation is durable in the service's log when its command ends;
work that it needs is done by the command too, unless a running service does it.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.cli import remote
from pipeline.cli.options import AsJson, Overrides, print_json
from pipeline.cli.remote import Url, is_remote

if TYPE_CHECKING:
    from merge_service.live import Entry, State
    from pipeline.service.home import Home

app = typer.Typer(
    name="service",
    help="A live merge service: experts arrive, pass gates, are merged, promoted, rolled back and removed.",
    epilog="A service is a directory: its log says what came and what became of it, its store holds the weights.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
ServiceDir = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="The directory of the service, e.g. service/zoo.")
]
MaybeDir = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="The directory of the service, e.g. service/zoo.")
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="SERVICE.yaml",
        help="The configuration; needed to begin a service, and to set another one.",
    ),
]
Arrival = Annotated[str, typer.Argument(metavar="ARRIVAL", help="The id of an arrival, e.g. a-000003.")]
Reason = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why, for the log.")]


def arrive(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help="A weights directory, file or index of shards, or an adapter's folder."
        ),
    ],
    task: Annotated[str, typer.Option("--task", metavar="TASK", help="What the expert was trained for.")],
    out: ServiceDir,
    config: ConfigFile = None,
    overrides: Overrides = None,
    owner: Annotated[str, typer.Option("--owner", metavar="NAME", help="Whose expert it is.")] = "local",
    license: Annotated[str, typer.Option("--license", metavar="NAME", help="Its licence.")] = "",
    note: Annotated[str, typer.Option("--note", metavar="TEXT", help="A remark, e.g. on the data.")] = "",
    init: Annotated[
        str,
        typer.Option(
            "--init",
            metavar="base|foreign|SHA256",
            help="The weights that training started from: the base, unknown ones, or a version of this service by its sha256.",
        ),
    ] = "base",
    replaces: Annotated[
        str | None,
        typer.Option("--replaces", metavar="ARRIVAL", help="Take the place of this accepted arrival."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Bring an expert, and work until it is decided: promoted, held, quarantined or rejected.

    Ends with code 3 when it is quarantined or rejected. The same bytes again are the first arrival.

    Example: temporal-merge service arrive expert --task letters --license MIT --out service/zoo --config configs/service.yaml
    """
    from pipeline.service.operations import Operations, Sender

    home = _with(out, config, overrides)
    name = Operations(home).arrive(checkpoint, Sender(task, owner, license, note, init, replaces))
    state = _work(home, lambda state: state.arrivals[name].is_final)
    _show(state, name, as_json)
    if state.shown(name) in ("quarantined", "rejected"):
        raise typer.Exit(3)


def work(out: ServiceDir, config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Do whatever there is to do, then end.

    Example: temporal-merge service work --out service/zoo
    """
    _say(_work(_with(out, config, overrides)))


def status(out: MaybeDir = None, url: Url = None, as_json: AsJson = False) -> None:
    """What is served, what is accepted, and what is on its way.

    Example: temporal-merge service status --out service/zoo
    """
    if is_remote(out, url):
        remote.status(url, as_json)
        return
    assert out is not None
    from pipeline.service.http.schemas import Standing

    state = _open(out).log.state
    if as_json:
        print_json(Standing.of(state).model_dump())
        return
    _say(state)


def arrivals(out: MaybeDir = None, url: Url = None, as_json: AsJson = False) -> None:
    """Every arrival with what became of it.

    Example: temporal-merge service arrivals --out service/zoo
    """
    if is_remote(out, url):
        remote.arrivals(url, as_json)
        return
    assert out is not None
    from pipeline.service.home import Home

    state = Home.open(out).log.state
    if as_json:
        print_json([_arrival(state, name) for name in state.arrivals])
        return
    for one in state.arrivals.values():
        t = f"t {one.t}" if one.t else ""
        print(f"{one.id}  {state.shown(one.id):12} {t:6} {one.task:16} {', '.join(one.reasons)}".rstrip())


def show(arrival: Arrival, out: MaybeDir = None, url: Url = None, as_json: AsJson = False) -> None:
    """One arrival with every gate: difference, interval and margin.

    Example: temporal-merge service show a-000003 --out service/zoo
    """
    if is_remote(out, url):
        remote.act(url, as_json, lambda service: service.show(arrival))
        return
    assert out is not None
    from merge_service.live import arrival_called
    from pipeline.service.home import Home

    state = Home.open(out).log.state
    arrival_called(state, arrival)
    _show(state, arrival, as_json)


def log(
    out: MaybeDir = None,
    url: Url = None,
    after: Annotated[int, typer.Option("--after", min=0, help="Only entries with higher numbers.")] = 0,
    as_json: AsJson = False,
) -> None:
    """The entries of the log, oldest first; with --json one line each, exactly as they are chained.

    Example: temporal-merge service log --out service/zoo --after 10
    """
    from datetime import UTC, datetime

    for entry in _entries(out, url, after):
        if as_json:
            print(entry.text.decode(), end="")
            continue
        at = datetime.fromtimestamp(entry.time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
        print(
            f"{entry.seq:6} {at} {entry.kind:15} {entry.arrival or '':10} {entry.actor} {entry.sha256[:12]}"
        )


def release(
    arrival: Arrival, reason: Reason, out: MaybeDir = None, url: Url = None, as_json: AsJson = False
) -> None:
    """Let a held, quarantined or rejected arrival go on; a held candidate is promoted by this.

    Example: temporal-merge service release a-000003 --reason "checked by hand" --out service/zoo
    """
    _decide("release", arrival, reason, out, url, as_json)


def promote(
    arrival: Arrival, reason: Reason, out: MaybeDir = None, url: Url = None, as_json: AsJson = False
) -> None:
    """Serve what an accepted arrival brought, which undoes a rollback; or let a held one go on.

    Example: temporal-merge service promote a-000003 --reason "complaints are settled" --out service/zoo
    """
    _decide("promote", arrival, reason, out, url, as_json)


def reject(
    arrival: Arrival, reason: Reason, out: MaybeDir = None, url: Url = None, as_json: AsJson = False
) -> None:
    """Refuse a held arrival.

    Example: temporal-merge service reject a-000003 --reason "not what it says" --out service/zoo
    """
    _decide("reject", arrival, reason, out, url, as_json, works=False)


def rollback(
    t: Annotated[int, typer.Argument(metavar="T", min=0, help="The time step to serve; 0 is the base.")],
    reason: Reason,
    out: MaybeDir = None,
    url: Url = None,
    hold: Annotated[bool, typer.Option("--hold", help="Promote nothing until another rollback.")] = False,
) -> None:
    """Serve the model of another time step; the accepted sequence stays as it is.

    Example: temporal-merge service rollback 3 --reason "complaints" --out service/zoo
    """
    if is_remote(out, url):
        remote.rollback(url, t, reason, hold)
        return
    assert out is not None
    from pipeline.service.operations import Operations

    home = _open(out)
    Operations(home).roll_back(t, reason, hold)
    _say(_work(home))


def remove(
    arrival: Arrival,
    reason: Reason,
    out: MaybeDir = None,
    url: Url = None,
    descendants: Annotated[
        str,
        typer.Option(
            "--descendants",
            metavar="keep|remove|retrain",
            help="What becomes of experts that were trained from weights that held it; retrain: removed, and listed to be trained again.",
        ),
    ] = "none",
    force: Annotated[bool, typer.Option("--force", help="Also if a gate fails without it.")] = False,
    purge: Annotated[
        bool, typer.Option("--purge", help="Delete its bytes as well, and refuse them for ever.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Take an expert out of all merges: the model is made again, byte for byte as if the expert had never come.

    Example: temporal-merge service remove a-000003 --reason takedown --out service/zoo
    """
    from merge_service.errors import UserError
    from merge_service.live import Removed
    from pipeline.service.operations import Operations

    if descendants not in ("none", "keep", "remove", "retrain"):
        raise UserError(f"--descendants {descendants}: choose keep, remove or retrain")
    if is_remote(out, url):
        return remote.remove(
            url, as_json, lambda service: service.remove(arrival, reason, descendants, force, purge)
        )
    assert out is not None
    home = _open(out)
    decided: Literal["none", "keep", "remove", "retrain"] = descendants  # type: ignore[assignment]
    Operations(home).remove(arrival, Removed(reason, force, decided))
    state = _work(home)
    if purge and state.arrivals[arrival].status != "accepted":
        Operations(home).purge(arrival, reason)
        state = _work(home)
    _show(state, arrival, as_json)
    if state.arrivals[arrival].status == "accepted":
        raise typer.Exit(3)


def verify(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory of a service.")],
    as_json: AsJson = False,
) -> None:
    """Check the chain of the log, every digest, and the lineage of what is accepted.

    Ends with code 1 when something is wrong. Example: temporal-merge service verify service/zoo
    """
    from pipeline.service.verify import verify as problems_of

    problems = problems_of(out)
    if as_json:
        print_json({"problems": problems})
    else:
        print("\n".join(problems) or f"{out}: the log is whole, and everything is what it says")
    if problems:
        raise typer.Exit(1)


def replay(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory of a service.")],
    target: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new directory.")],
    as_json: AsJson = False,
) -> None:
    """Make a service anew from its experts and its log, and check that the same bytes come out.

    Example: temporal-merge service replay service/zoo --out service/again
    """
    from merge_service.live import plain
    from pipeline.service.verify import replay as made

    found = made(out, target)
    if as_json:
        print_json({"served": plain(found.served), "versions": [plain(one) for one in found.versions]})
        return
    print(f"{target}: t = {found.served.t} is served, sha256 {found.served.sha256}, as in {out}")


def _entries(out: Path | None, url: str | None, after: int) -> "Iterator[Entry]":
    """The entries of a log in a directory, or at a URL."""
    if is_remote(out, url):
        with remote.connected(url) as service:
            yield from service.log(after)
        return
    from pipeline.service.home import Home

    assert out is not None
    yield from Home.open(out).log.entries(after)


def _with(out: Path, config: Path | None, overrides: list[str] | None) -> "Home":
    """The service in OUT, with a configuration if one is given."""
    from merge_service.errors import UserError
    from pipeline.service.config import read_config
    from pipeline.service.home import Home, check_unserved

    if config is None:
        if overrides:
            raise UserError("--set changes values of a configuration; give it with --config")
        return Home.open(out)
    found = read_config(config, overrides or [])
    check_unserved(out, found)
    return Home.open(out, found)


def _open(out: Path) -> "Home":
    from pipeline.service.home import Home

    return Home.open(out)


def _work(home: "Home", until: Any = lambda _: False) -> "State":
    """Work until there is nothing to do, or `until` says so; where a running service does the work, wait for it."""
    from pipeline.service.home import Busy

    try:
        with home.working():
            return home.worker().run(until)
    except Busy:
        while not until(state := home.log.refresh()) and home.next_task(state) is not None:
            time.sleep(0.2)
        return state


def _say(state: "State") -> None:
    from pipeline.service.http.schemas import Standing

    print("\n".join(Standing.of(state).lines()))


def _decide(
    verb: Literal["release", "promote", "reject"],
    arrival: str,
    reason: str,
    out: Path | None,
    url: str | None,
    as_json: bool,
    works: bool = True,
) -> None:
    """Carry out a decision about an arrival at a running service or in its directory, where what follows is done as well if it `works`."""
    if is_remote(out, url):
        remote.act(url, as_json, lambda service: getattr(service, verb)(arrival, reason))
        return
    assert out is not None
    from pipeline.service.operations import Operations

    home = _open(out)
    getattr(Operations(home), verb)(arrival, reason)
    _show(_work(home) if works else home.log.state, arrival, as_json)


def _show(state: "State", name: str, as_json: bool) -> None:
    if as_json:
        print_json(_arrival(state, name))
        return
    one = state.arrivals[name]
    print(f"{name} ({one.task}, of {one.owner}): {state.shown(name)}{f', t = {one.t}' if one.t else ''}")
    if one.reasons:
        print(f"  {', '.join(one.reasons)}: {one.detail}")
    for gate in one.verdicts:
        print(
            f"  {gate.gate:34} {gate.verdict:9} {gate.difference:+.4f} ({gate.low:+.4f} to {gate.high:+.4f}), margin {gate.margin:g}"
        )
    if one.scored and one.scored.gm is not None:
        print(f"  KA {one.scored.ka:.4f}, ZS {one.scored.zs:.4f}, GM {one.scored.gm:.4f}")


def _arrival(state: "State", name: str) -> dict[str, Any]:
    from merge_service.live import plain

    return {**plain(state.arrivals[name]), "status": state.shown(name)}


COMMANDS = (
    arrive, work, status, arrivals, show, log, release, promote, reject, rollback, remove, remote.tokens, verify,
    replay,
)  # fmt: skip
