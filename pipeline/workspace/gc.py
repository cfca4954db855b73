"""Garbage collection: remove from a store what no study refers to, and from OUT what finished steps left behind.

Invariant: whatever a registered study or the plan in OUT refers to stays. While the driver of another study may run,
everything made since its registration stays, too. A dry run changes nothing.
"""

import contextlib
import shutil
import socket
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict, cast

from merge_service.errors import UserError
from pipeline.errors import StoreError
from pipeline.plan.steps import Plan
from pipeline.results.over_time import results
from pipeline.store.local import Store
from pipeline.store.names import DIGITS
from pipeline.store.recipes import not_portable
from pipeline.store.upkeep import Entry, Upkeep, held_elsewhere, sizes_of, upkeep
from pipeline.study.sections import StorageSection
from pipeline.workspace.keeping import droppable, kept_at_the_end
from pipeline.workspace.lock import DriverState, read_driver, upkeep_lock
from pipeline.workspace.opening import open_plan, open_store
from pipeline.workspace.registrations import Registration, registration, registrations


class Removed(TypedDict):
    """An artifact that goes (`pipeline.store.upkeep.Entry`)."""

    kind: str
    digits: str
    place: str
    bytes: int
    made_ms: int | None
    linked: int


class Registered(TypedDict):
    """A study that the store knows: whether its OUT is gone, and whether its driver may be running."""

    name: str
    study: str
    host: str
    out: str
    gone: bool
    running: bool


class MadeRecipe(TypedDict):
    """A merge that becomes a recipe: the `bytes` that become free, none where `why` says what keeps it as a file."""

    place: str
    bytes: int
    why: str | None


class Collected(TypedDict):
    """What `collect` did or would do.

    `bytes` become free; `linked` are those of artifacts that go which other names hold on to. `scratch` are paths, `set_aside` bytes
    by name, `forgotten` names of registrations.
    """

    dry_run: bool
    store: str
    removed: list[Removed]
    bytes: int
    linked: int
    scratch: list[str]
    set_aside: dict[str, int]
    recipes: list[MadeRecipe]
    studies: list[Registered]
    forgotten: list[str]


def collect(
    out: Path, dry_run: bool, forget: list[str], set_aside: bool, keep: str | None = None
) -> Collected:
    """Remove from the store of OUT what nobody refers to; what goes (or would), stays set aside, and is registered.

    Raises UserError while a driver works on
    OUT, or for a name to forget that is not registered, whose OUT is still there, or that may be running elsewhere.

    With `keep` (a value of `storage.keep`) the merges of the study that it does not keep become recipes.
    """
    how = None if keep is None else _choice(keep)
    plan, store = open_plan(out), open_store(out)
    keeper, driver = upkeep(store), read_driver(out)
    with contextlib.ExitStack() as held:
        if not dry_run:
            held.enter_context(upkeep_lock(out))
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
        recipes = [] if how is None else _made_recipes(store, plan, out, how, dry_run)
        freed = sum(sizes_of(path)[0] for path in scratch) + (sum(aside.values()) if set_aside else 0)
        if not dry_run:
            _remove(keeper, scratch, list(aside) if set_aside else [])
    return {
        "dry_run": dry_run,
        "store": store.where,
        "removed": [cast(Removed, asdict(entry)) for entry in doomed],
        "recipes": recipes,
        "bytes": sum(entry.bytes for entry in doomed) + freed + sum(one["bytes"] for one in recipes),
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


def describe(answer: Collected) -> list[str]:
    """The answer of `collect` as lines of text."""
    verb = "would be removed" if answer["dry_run"] else "removed"
    lines = [f"{entry['bytes']:>16,}  {entry['place']}" for entry in answer["removed"]]
    lines += [f"{'scratch':>16}  {path}" for path in answer["scratch"]]
    lines += [
        f"{one['bytes']:>16,}  {one['place']} ({'stays: ' + one['why'] if one['why'] else 'weights become a recipe'})"
        for one in answer["recipes"]
    ]
    for study in answer["studies"]:
        gone = f"; it is gone: --forget {study['name']} drops it" if study["gone"] else ""
        running = "; it may be running, so what was made since it began stays too" if study["running"] else ""
        lines.append(f"kept for {study['study']} ({study['host']}:{study['out']}{gone}{running})")
    for name, size in answer["set_aside"].items():
        lines.append(f"set aside: {size:,} bytes in {name} (--set-aside removes it)")
    lines += held_elsewhere(answer["linked"], "more")
    return [
        *lines,
        f"{answer['store']}: {len(answer['removed'])} artifacts {verb}; bytes that become free: {answer['bytes']:,}",
    ]


def _choice(keep: str) -> StorageSection:
    try:
        return StorageSection.model_validate({"keep": keep})
    except ValueError:
        raise UserError(f"--keep {keep}: choose all, final, best or none") from None


def _made_recipes(
    store: Store, plan: Plan, out: Path, how: StorageSection, dry_run: bool
) -> list[MadeRecipe]:
    """Make recipes of the merges that are not kept. "bytes" are those that become free: none where a name elsewhere holds them."""
    if type(store) is not Store:
        raise UserError(f"--keep needs a store in a directory; {store.where} keeps every merge")
    kept = kept_at_the_end(plan, how, results(plan, store))
    answer: list[MadeRecipe] = []
    for record in droppable(store, plan, out, kept):
        size = sum(sizes_of(record.path / name)[0] for name in record.droppable)
        why = not_portable(record) if dry_run else store.recipes.drop(record)
        answer.append({"place": str(record.path), "bytes": 0 if why else size, "why": why})
    return answer


def _unreferenced(keeper: Upkeep, plan: Plan, left: list[Registration], since: int | None) -> list[Entry]:
    """Items that nothing refers to, made before `since` (ms) if other drivers may have run since then."""
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
    """Files in OUT/scratch of steps that are done or no longer in the plan, and streaming states."""
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


def _is_at(one: Registration, out: Path, driver: DriverState) -> bool:
    """Whether a registration is of this OUT: the same path, from this host or from the host of its last driver.

    The same path on any other host may be another directory.
    """
    return one.out == str(out.absolute()) and one.host in (socket.gethostname(), driver.get("host"))
