"""The mini suite: twelve small real-image datasets made from ordinary pip packages, for the demo and the tests.

Six sets are the tasks of the stream. Six are held out: test sides of what experts replay, and sets of kinds that occur in no training
batch of an expert. Building is deterministic and takes about a minute; the suite is written beside its place and renamed
into it.
Invariant: no picture, nor a near-duplicate of one, is in two splits or two sets. A folder with a `suite.json` is a complete suite, and
building again with the same packages changes nothing.
"""

import fcntl
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path

from merge_service.errors import UserError
from workers.data.manifest import SUITE_FILE
from workers.data.mini import drawings, emoji, fonts, scans
from workers.data.mini.alike import distinct, joined, looks
from workers.data.mini.packages import versions
from workers.data.mini.pictures import SIZE, Draft
from workers.data.writer import write_dataset

NAME = "mini"
EDITION = 2
YOUNG_SECONDS = 60.0
MAKERS: dict[str, Callable[[], Draft]] = {
    "mnist": scans.mnist,
    "digits8": scans.digits8,
    "animals": scans.animals,
    "photos_a": scans.photos_a,
    "icons": drawings.icons,
    "emoji_names": emoji.emoji_names,
    "photos_b": scans.photos_b,
    "icon_style": drawings.icon_style,
    "emoji_group": emoji.emoji_group,
    "skin_tone": emoji.skin_tone,
    "letters": fonts.letters,
    "scripts": fonts.scripts,
}
"""In the order in which sets choose their pictures: a near-duplicate of a picture in an earlier set is dropped."""
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
    """Write the suite into `root`, unless `root` holds it, made from the same packages; returns whether it was written.

    `say` gets one line per dataset. The bytes do not depend on the number of `processes`.
    Raises UserError: a demo package is missing, or `root` holds something else or cannot be written.
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
            f"the mini suite cannot be written to {root} ({error}); set data.root to a writable folder, or to one that holds the suite"
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
    """Whether `root` holds this edition of the suite, made from these package versions (default: those installed)."""
    path = root / SUITE_FILE
    if not path.is_file():
        return False
    suite = json.loads(path.read_text(encoding="utf-8"))
    made_of = versions() if made_of is None else made_of
    return suite.get("edition") == EDITION and suite.get("roles") == ROLES and suite.get("made_of") == made_of


def _write(work: Path, say: Callable[[str], None], processes: int) -> dict[str, float]:
    """Write all sets; returns the radius of near-duplicates of each."""
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
    """Remove the folders of interrupted builds. A build locks its folder soon after creating it, so young folders stay."""
    for work in place.parent.glob(f".{place.name}.partial-*"):
        if time.time() - work.stat().st_mtime < YOUNG_SECONDS:
            continue
        handle = os.open(work, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(work, ignore_errors=True)
        except OSError:
            pass  # a build is running there, or the file system has no locks
        finally:
            os.close(handle)


def _put(work: Path, place: Path) -> None:
    """Rename the finished suite into place, after removing an older one. If another process was first, its suite stays."""
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
