"""Taking out of a store what no study refers to, and out of OUT what finished steps left behind.

Invariant: what any registered study, or the plan in OUT, refers to stays; while another study's driver may run, so does
whatever was made since it registered. A dry run changes nothing.
"""

import contextlib
import shutil
import socket
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from merge_service.errors import UserError
from pipeline.errors import StoreError
from pipeline.plan.steps import Plan
from pipeline.store.local import Store
from pipeline.store.names import DIGITS
from pipeline.store.upkeep import Entry, Upkeep, sizes_of, upkeep
from pipeline.workspace.lock import driver_lock, read_driver, write_driver
from pipeline.workspace.opening import open_plan, open_store
from pipeline.workspace.registrations import Registration, registration, registrations


def collect(out: Path, dry_run: bool, forget: list[str], set_aside: bool) -> dict[str, Any]:
    """Remove from the store of OUT what nobody refers to; what goes (or would), stays set aside, and is registered.

    {"dry_run", "store", "removed": [{kind, digits, place, bytes, made_ms, linked}], "bytes", "linked", "scratch": [path],
    "set_aside": {name: bytes}, "studies": [{name, study, host, out, gone, running}], "forgotten"}. "bytes" are those that
    become free, "linked" those of artifacts that go which other names hold on to. Raises UserError while a driver works on
    OUT, or for a name to forget that is not registered, whose OUT is still there, or that may be running elsewhere.
    """
    plan, store = open_plan(out), open_store(out)
    keeper, driver = upkeep(store), read_driver(out)
    with contextlib.ExitStack() as held:
        if not dry_run:
            held.enter_context(_held(out))
        with keeper.exclusively() if not dry_run else contextlib.nullcontext():
            _check_forgotten(keeper, forget)
            if not dry_run:
                for name in forget:
                    keeper.drop_note(name)
            left = [one for one in registrations(keeper) if one.name not in forget]
            running = [one for one in left if one.may_run and not _is_at(one, out, driver)]
            doomed = _unreferenced(keeper, plan, left, min((one.time_ms for one in running), default=None))
            if not dry_run:
                for entry in doomed:
                    keeper.take_out(entry, files_too=not running)
        scratch, aside = _scratch(out, plan, store), keeper.aside()
        freed = sum(sizes_of(path)[0] for path in scratch) + (sum(aside.values()) if set_aside else 0)
        if not dry_run:
            _remove(keeper, scratch, list(aside) if set_aside else [])
    return {
        "dry_run": dry_run,
        "store": store.where,
        "removed": [asdict(entry) for entry in doomed],
        "bytes": sum(entry.bytes for entry in doomed) + freed,
        "linked": sum(entry.linked for entry in doomed),
        "scratch": [str(path) for path in scratch],
        "set_aside": aside,
        "studies": [
            {
                "name": one.name,
                "study": one.study,
                "host": one.host,
                "out": one.out,
                "gone": one.is_gone,
                "running": one in running,
            }
            for one in left
        ],
        "forgotten": forget,
    }


def describe(answer: dict[str, Any]) -> list[str]:
    """The answer of `collect` in lines for people."""
    verb = "would be removed" if answer["dry_run"] else "removed"
    lines = [f"{entry['bytes']:>16,}  {entry['place']}" for entry in answer["removed"]]
    lines += [f"{'scratch':>16}  {path}" for path in answer["scratch"]]
    for study in answer["studies"]:
        gone = f"; it is gone: --forget {study['name']} drops it" if study["gone"] else ""
        running = "; it may be running, so what was made since it began stays too" if study["running"] else ""
        lines.append(f"kept for {study['study']} ({study['host']}:{study['out']}{gone}{running})")
    for name, size in answer["set_aside"].items():
        lines.append(f"set aside: {size:,} bytes in {name} (--set-aside removes it)")
    if answer["linked"]:
        lines.append(
            f"{answer['linked']:,} bytes more stay on the disk: other names hold them (hard links, such as the files of MLflow's "
            "artifacts); they go when those are deleted too"
        )
    return [
        *lines,
        f"{answer['store']}: {len(answer['removed'])} artifacts {verb}; bytes that become free: {answer['bytes']:,}",
    ]


def _unreferenced(keeper: Upkeep, plan: Plan, left: list[Registration], since: int | None) -> list[Entry]:
    """What nobody refers to, made before `since` (ms) if other drivers may run since then."""
    kept = {fp[:DIGITS] for fp in (*plan.bases, *plan.steps)}
    kept |= {fp[:DIGITS] for one in left for fp in one.fingerprints}
    doomed = []
    for entry in keeper.entries():
        young = since is not None and (entry.made_ms is None or entry.made_ms >= since)
        if not young and (entry.digits not in kept or entry.made_ms is None):
            doomed.append(entry)
    return doomed


def _check_forgotten(keeper: Upkeep, forget: list[str]) -> None:
    known = keeper.notes()
    for name in forget:
        if name not in known:
            raise UserError(
                f"--forget {name}: no such study is registered; there are {', '.join(known) or 'none'}"
            )
        try:
            one = registration(name, known[name])
        except StoreError:
            continue
        if one.host == socket.gethostname() and not one.is_gone:
            raise UserError(f"--forget {name}: its OUT {one.out} is still there; remove that first")
        if one.host != socket.gethostname() and one.may_run:
            raise UserError(
                f"--forget {name}: it may be running in {one.out} on {one.host}, which has not said that it ended; end it there, "
                "or wait a week after it began"
            )


def _scratch(out: Path, plan: Plan, store: Store) -> list[Path]:
    """What steps that are done, or that the plan no longer has, left in OUT/scratch, and streaming states."""
    found = []
    finished = all(store.has(step.kind, fp) for fp, step in plan.steps.items())
    for path in sorted((out / "scratch").glob("*")):
        step = plan.steps.get(path.name)
        if path.name == "limits":
            done = finished
        else:
            done = step is None or store.has(step.kind, step.fingerprint)
        if done:
            found.append(path)
    return found


def _remove(keeper: Upkeep, scratch: list[Path], aside: list[str]) -> None:
    keeper.clear()
    for path in scratch:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for name in aside:
        keeper.remove_aside(name)


@contextlib.contextmanager
def _held(out: Path) -> Iterator[None]:
    """The driver's lock, leaving what the last driver said of itself as it was."""
    said = read_driver(out)
    with driver_lock(out):
        try:
            yield
        finally:
            write_driver(out, said)


def _is_at(one: Registration, out: Path, driver: dict[str, Any]) -> bool:
    """Whether a registration is of this very OUT: the same path, from this host or from the one that last drove it.

    The same path on any other host may be another directory.
    """
    return one.out == str(out.absolute()) and one.host in (socket.gethostname(), driver.get("host"))
