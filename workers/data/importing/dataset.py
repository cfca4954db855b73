"""Import of one source: shards, class names, prompts and manifest in a data root, and its roles in `suite.json`.

Users have folders and tables, while training reads only validated shards; an import converts one into the other, once.
Invariant: the folder of the dataset is complete or absent, and equal sources give equal bytes. No picture is left out silently: every
unreadable one is named.
"""

import fcntl
import json
import os
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from merge_service.errors import UserError
from merge_service.files import replace_whole, sweep_directory, sync_directory
from workers.data.importing import pictures, shared
from workers.data.importing.dividing import Item, Shares, divide
from workers.data.importing.found import TEST, TRAIN, VAL, Columns, Found, Listing, refuse
from workers.data.importing.sources import DESCRIPTIONS, listing
from workers.data.manifest import ROLES, SUITE_FILE, DatasetInfo, describe, is_name, read_suite
from workers.data.writer import Encoded, StoredSample, write_dataset

NEEDS = {"adaptation": (TRAIN, TEST), "held_out": (TEST,), "pretraining": (TRAIN,)}
"""The splits that each role requires."""
_CODE = re.compile(r"[A-Za-z]{0,2}[0-9]+")
WORK = ".importing"
"""The folder of a root in which a dataset is written until it is complete."""
TEMPLATES = ("a photo of a {c}.",)


USUAL_COLUMNS = Columns()


@dataclass(frozen=True)
class Order:
    """An import: the source and its options.

    `classnames` is a YAML file, either a mapping of label to name or a list in the order of the labels. With `drop_equal`, a picture that
    occurs in several stated splits stays in one of them; with `drop_unreadable`, unreadable pictures are left out. Otherwise both
    are errors that name every such picture. `shares` None stands for `Shares.usual`.
    """

    source: Path
    name: str | None = None
    roles: Sequence[str] = ("adaptation",)
    templates: Sequence[str] = TEMPLATES
    classnames: Path | None = None
    columns: Columns = USUAL_COLUMNS
    shares: Shares | None = None
    drop_equal: bool = False
    drop_unreadable: bool = False


OPTIONS = (
    "name", "role", "template", "classnames", "val", "test", "seed", "equal", "unreadable", "image_column", "label_column",
    "caption_column", "split_column",
)  # fmt: skip
"""The keyword arguments of `order_of`: the options of `temporal-merge import-data`."""


def order_of(source: Path, **options: Any) -> Order:
    """The import that these `OPTIONS` describe; None stands for a default. Raises UserError for an unknown option or a bad value."""
    unknown = [name for name in options if name not in OPTIONS]
    if unknown:
        raise UserError(f"there is no option {unknown[0]!r}; choose from {', '.join(OPTIONS)}")
    given = {name: value for name, value in options.items() if value is not None}
    for name in ("equal", "unreadable"):
        if given.get(name, "refuse") not in ("refuse", "drop"):
            raise UserError(f"--{name} {given[name]}: choose refuse or drop")
    roles, templates = (
        _several(given.get(name, default))
        for name, default in (("role", "adaptation"), ("template", TEMPLATES))
    )
    shares = Shares.usual(roles, **{name: given[name] for name in ("val", "test", "seed") if name in given})
    columns = Columns(*(given.get(f"{role}_column") for role in ("image", "label", "caption", "split")))
    classnames = Path(given["classnames"]) if "classnames" in given else None
    drop = [given.get(name) == "drop" for name in ("equal", "unreadable")]
    return Order(source, given.get("name"), roles, templates, classnames, columns, shares, *drop)


def _several(value: str | Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys([value] if isinstance(value, str) else value))


@dataclass(frozen=True)
class Imported:
    """The result of an import. `written` is False if the root held the same dataset already; `samples` are counts by split."""

    root: Path
    name: str
    kind: str
    written: bool
    roles: tuple[str, ...]
    classes: int
    samples: Mapping[str, int]
    notes: tuple[str, ...] = field(default=())


def import_data(order: Order, root: Path, say: Callable[[str], None] = lambda line: None) -> Imported:
    """Write the dataset of `order` under `root` and enter it into the suite there.

    `say` gets lines about the progress. Raises UserError: an unreadable source or picture, a picture in two splits, an empty split that a
    role requires, an existing dataset of that name with other content.
    """
    name = _checked(order, root)
    found = listing(order.source, order.columns)
    say(f"{order.source}: {len(found.samples):,} samples; checking every picture")
    looked, faults = pictures.look(found.samples, say)
    if faults and not order.drop_unreadable:
        raise refuse(
            f"{order.source}: {len(faults)} pictures cannot be read", faults,
            "replace or remove them, or leave them out with --unreadable drop",
        )  # fmt: skip
    notes = [*found.notes, *(f"left out as unreadable: {fault}" for fault in faults)]
    samples, items = _items(found, looked)
    splits, more = divide(items, order.shares or Shares.usual(order.roles), order.drop_equal)
    _check_splits(order, splits)
    names = _class_names(order, found, samples)
    draft = _Draft(samples, splits, list(names), list(names.values()), tuple(order.templates))
    seen = {
        split: shared.digests(item.pixels for item, mine in zip(items, splits) if mine == split)
        for split in draft.present
    }
    notes += more + _class_notes(draft) + shared.notes(root, name, seen)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _alone(root):
            written = _put(draft, seen, root, name)
            _enter(root, name, order.roles)
    except OSError as error:
        raise UserError(f"{root} cannot be written ({error}); give another folder with --out") from error
    info = describe(root, name)
    counts = {split: info.splits[split].samples for split in (TRAIN, VAL, TEST) if split in info.splits}
    return Imported(
        root, name, info.kind, written, tuple(order.roles), len(info.classes), counts, tuple(notes)
    )


def _checked(order: Order, root: Path) -> str:
    """The name of the dataset. Raises UserError for mistakes that are visible before the source is read."""
    name = order.name or _usual_name(order.source.absolute())
    if not is_name(name) or "/" in name:
        raise UserError(
            f"{name!r} is not a valid dataset name: give --name with letters, digits, '.', '_', '-'"
        )
    wrong = [role for role in order.roles if role not in ROLES]
    if wrong:
        raise UserError(f"--role {wrong[0]}: there is no such role; choose from {', '.join(ROLES)}")
    if {"adaptation", "held_out"} <= set(order.roles):
        raise UserError("--role: a dataset is a task (adaptation) or held out, not both; choose one")
    for template in order.templates:
        if template.count("{c}") != 1:
            raise UserError(
                f"--template {template!r} must hold {{c}}, the place of the class name, exactly once"
            )
    if (root / SUITE_FILE).is_file() and read_suite(root).get("made_of"):
        raise UserError(
            f"{root} holds the mini suite, which cannot be changed; give another folder with --out"
        )
    return name


def _usual_name(source: Path) -> str:
    """The default name of a dataset: that of its folder or its table."""
    if source.is_dir():
        return source.name
    return source.parent.name if source.name in DESCRIPTIONS else source.stem


def _items(found: Listing, looked: Sequence[pictures.Looked | None]) -> tuple[list[Found], list[Item]]:
    """The samples with usable pictures, and the items from which their splits are decided."""
    usable = [(sample, seen) for sample, seen in zip(found.samples, looked) if seen is not None]
    items = [Item(one.where, seen.pixels, seen.content, one.label, one.split) for one, seen in usable]
    return [sample for sample, _ in usable], items


def _check_splits(order: Order, splits: Sequence[str | None]) -> None:
    for role in order.roles:
        lacking = [split for split in NEEDS[role] if split not in splits]
        if lacking:
            raise UserError(
                f"{order.source}: the role {role} needs samples for {' and '.join(lacking)}, and the source has none; add pictures, or give "
                "another --role, --val or --test"
            )


# --- classes ----------------------------------------------------------------------------------------------------------


def _class_names(order: Order, found: Listing, samples: Sequence[Found]) -> dict[str, str]:
    """The name of every label, in the order of the classes; {} if there are only captions. Raises UserError."""
    labels = sorted({sample.label for sample in samples if sample.label is not None}, key=_in_order)
    if not labels:
        return {}
    stated = _stated(order.classnames) if order.classnames else dict(found.names)
    lacking = [label for label in labels if label not in stated] if stated else []
    if lacking:
        raise UserError(
            f"{order.classnames or order.source} has no name for the label {lacking[0]!r}; name every class"
        )
    names = stated or {label: label.replace("_", " ") for label in labels}
    for name, times in Counter(names.values()).items():
        if times > 1:
            same = ", ".join(repr(label) for label, other in names.items() if other == name)
            raise UserError(
                f"the labels {same} have the same name, {name!r}; give each its own with --classnames"
            )
        if not name.strip() or "\n" in name:
            raise UserError(f"{name!r} is not a valid class name; give one line of text with --classnames")
    return names


def _in_order(label: str) -> tuple[bool, int, str]:
    number = label.isascii() and label.isdigit()
    return not number, int(label) if number else 0, label


def _stated(file: Path) -> dict[str, str]:
    try:
        body = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--classnames {file} cannot be read ({error})") from None
    if isinstance(body, list):
        body = dict(enumerate(body))
    if not isinstance(body, dict):
        raise UserError(
            f"--classnames {file}: write one `label: name` per line, or a list of names for the labels 0, 1, ..."
        )
    return {str(label): str(name).strip() for label, name in body.items()}


def _class_notes(draft: "_Draft") -> list[str]:
    """Caveats about the classes, for the reader of their scores."""
    said = []
    codes = [name for name in draft.classes if _CODE.fullmatch(name)]
    if len(codes) > 1:
        said.append(
            f"{len(codes)} classes are named by numbers or codes ({', '.join(codes[:3])}, ...), which mean nothing in a prompt; name them "
            "with --classnames"
        )
    alike = defaultdict(list)
    for name in draft.classes:
        alike[" ".join(name.lower().split())].append(name)
    for names in alike.values():
        if len(names) > 1:
            said.append(
                f"the classes {', '.join(map(repr, names))} differ in case or spaces only, which most tokenizers ignore: no score could tell "
                "them apart; name them with --classnames"
            )
    for split in (TRAIN, TEST):
        there = {sample.label for sample, mine in zip(draft.samples, draft.splits) if mine == split}
        empty = [name for label, name in zip(draft.labels, draft.classes) if there and label not in there]
        if empty:
            shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
            said.append(f"{len(empty)} classes have no sample for {split}: {shown}")
    return said


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Draft:
    """A dataset before it is written: samples with their splits, and labels in the order of the classes."""

    samples: Sequence[Found]
    splits: Sequence[str | None]
    labels: Sequence[str]
    classes: Sequence[str]
    templates: tuple[str, ...]

    @property
    def present(self) -> list[str]:
        """The splits that have samples."""
        return [split for split in (TRAIN, VAL, TEST) if split in self.splits]

    def write(self, home: Path) -> None:
        """Write the dataset into the folder `home`."""
        kind = "classification" if self.labels else "retrieval"
        write_dataset(
            home, kind=kind, classes=self.classes, templates=self.templates if self.labels else (),
            splits={split: self._of(split) for split in self.present},
        )  # fmt: skip

    def _of(self, split: str) -> Iterator[StoredSample]:
        number = {label: at for at, label in enumerate(self.labels)}
        for sample, mine in zip(self.samples, self.splits):
            if mine == split:
                label = None if sample.label is None else number[sample.label]
                yield StoredSample(_again(sample), label, sample.captions)


def _again(sample: Found) -> Encoded:
    try:
        return pictures.encoded(sample)
    except pictures.Unreadable as error:
        raise UserError(f"{sample.where} changed during the import ({error}); import again") from None


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Allow one import into a root at a time, and remove what interrupted imports left."""
    handle = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        shutil.rmtree(root / WORK, ignore_errors=True)
        sweep_directory(root)
        yield
    finally:
        os.close(handle)


def _put(draft: _Draft, seen: Mapping[str, shared.Digests], root: Path, name: str) -> bool:
    """Write the dataset and rename it into place; False if the root holds the same one. Raises UserError if it holds another."""
    work, home = root / WORK / name, root / name
    try:
        draft.write(work)
        shared.keep(work, seen)
        if home.exists():
            made, held = _described(work), _described(home)
            if made is None or held is None or made.digest != held.digest:
                raise UserError(
                    f"{home} exists already and holds something else; choose another --name, or remove it"
                )
            return False
        work.rename(home)
        sync_directory(root)
        return True
    finally:
        shutil.rmtree(root / WORK, ignore_errors=True)


def _described(home: Path) -> DatasetInfo | None:
    try:
        return describe(home.parent, home.name)
    except UserError:
        return None


def _enter(root: Path, name: str, roles: Sequence[str]) -> None:
    """Enter a dataset into the root's `suite.json`; the file is replaced atomically."""
    file = root / SUITE_FILE
    suite: dict[str, Any] = {"name": root.absolute().name, "roles": {role: [] for role in ROLES}}
    if file.is_file():
        suite = read_suite(root)
    for role in ROLES:
        others = [one for one in suite["roles"][role] if one != name]
        suite["roles"][role] = [*others, name] if role in roles else others
    groups = suite.get("zero_shot_groups")
    if groups is not None:
        for group in groups:
            groups[group] = [one for one in groups[group] if one != name]
        if "held_out" in roles:
            groups["replayed" if "pretraining" in roles else "never_replayed"].append(name)
    replace_whole(file, json.dumps(suite, indent=1) + "\n", sync=False)
