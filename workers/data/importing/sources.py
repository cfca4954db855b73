"""Samples from folders of classes, and from tables (CSV, TSV, JSON lines) of paths with captions or labels.

These are the usual forms of a user's own data, so importing them needs no conversion script.
Invariant: every file of a folder is a sample, or is named in a note or an error; no file is left out silently.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merge_service.errors import UserError
from workers.data.importing import tables
from workers.data.importing.found import (
    SPLIT_NAMES,
    Columns,
    Found,
    Listing,
    find_columns,
    refuse,
    split_name,
)

PICTURES = frozenset(
    {
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".webp",
        ".gif",
        ".bmp",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".heic",
        ".avif",
    }
)
"""Suffixes of picture files. Whether such a file is a readable picture is checked later."""
TABLES = (".csv", ".tsv", ".jsonl", ".json")
DESCRIPTIONS = ("metadata.csv", "metadata.jsonl")
"""Tables that are beside the pictures that they describe."""


def listing(source: Path, columns: Columns) -> Listing:
    """The samples of a source of any kind. Raises UserError naming the possible kinds, and for mistakes in the source."""
    if source.is_file() and source.suffix.lower() in TABLES:
        return _table(source, columns)
    if source.suffix.lower() in tables.SUFFIXES or tables.is_dataset(source):
        return tables.listing(source, columns)
    if source.is_dir():
        return _folder(source, columns)
    what = "is neither a table nor a dataset" if source.exists() else "does not exist"
    raise UserError(
        f"{source} {what}; give a folder of class folders, a {', '.join(TABLES)} or .parquet file, or a dataset that "
        "datasets.save_to_disk wrote"
    )


# --- folders ----------------------------------------------------------------------------------------------------------


def _folder(source: Path, columns: Columns) -> Listing:
    folders = _folders(source)
    tables_of = {one.name: _description(one) for one in folders if one.name.lower() in SPLIT_NAMES}
    if (whole := _description(source)) is not None:
        return _described(source, [(None, whole)], columns)
    if any(tables_of.values()):
        stated = [(split_name(name, str(source / name)), file) for name, file in tables_of.items() if file]
        return _described(source, stated, columns)
    if not folders:
        raise UserError(
            f"{source} holds no class folders; put the pictures of each class into a folder of its name, or give a table of paths"
        )
    splits = [one for one in folders if one.name.lower() in SPLIT_NAMES and not _pictures(one)]
    if splits and len(splits) < len(folders):
        others = ", ".join(one.name for one in folders if one not in splits)
        raise UserError(
            f"{source} holds splits ({', '.join(one.name for one in splits)}) beside other folders ({others}); move one of the two kinds away"
        )
    samples: list[Found] = []
    loose = _files(source) if splits else []
    ignored: list[Path] = []
    empty: list[Path] = []
    for place in splits or [source]:
        loose += _files(place)
        for home in _folders(place):
            found, others_ = _class_folder(home, split_name(place.name, str(place)) if splits else None)
            samples += found
            ignored += others_
            empty += [] if found else [home]
    if not samples:
        raise UserError(f"{source} holds no pictures; expected files such as {folders[0] / 'photo.jpg'}")
    ignored += [path for path in loose if not _is_picture(path)]
    stray = [path for path in loose if _is_picture(path)]
    return Listing(
        tuple(samples),
        notes=(
            *_note(stray, "pictures are in no class folder and were left out"),
            *_note(ignored, "files are not pictures and were left out"),
            *_note(empty, "folders hold no picture and are no class"),
        ),
    )


def _described(source: Path, stated: Sequence[tuple[str | None, Path]], columns: Columns) -> Listing:
    """The pictures of a folder that its tables list. `stated` are (split, table); None means that the rows state the split."""
    samples = [
        replace(sample, split=split or sample.split)
        for split, file in stated
        for sample in _table(file, columns).samples
    ]
    named = {sample.path for sample in samples}
    stray = sorted(path for path in source.rglob("*") if _is_picture(path) and path not in named)
    return Listing(
        tuple(samples), notes=_note(stray, f"pictures are in no row of {stated[0][1].name} and were left out")
    )


def _description(home: Path) -> Path | None:
    return next((home / name for name in DESCRIPTIONS if (home / name).is_file()), None)


def _pictures(home: Path) -> bool:
    return any(_is_picture(path) for path in home.iterdir())


def _class_folder(home: Path, split: str | None) -> tuple[list[Found], list[Path]]:
    """The pictures of one class, and the files that are not pictures."""
    deep = next((one for one in _folders(home) if any(_is_picture(path) for path in one.rglob("*"))), None)
    if deep is not None:
        raise UserError(
            f"{deep} is a folder inside a class folder; pictures of a class must be directly in its folder. If {home} is a separate "
            f"dataset, import it by itself: temporal-merge import-data {home}"
        )
    files = _files(home)
    pictures = [
        Found(str(path), path.read_bytes, home.name, split=split) for path in files if _is_picture(path)
    ]
    return pictures, [path for path in files if not _is_picture(path)]


def _files(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.is_file() and not path.name.startswith("."))


def _folders(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURES and not path.name.startswith(".")


def _note(paths: Sequence[Path], why: str) -> tuple[str, ...]:
    """A note that counts `paths` and names the first; none where there are no paths."""
    shown = ", ".join(map(str, paths[:3])) + (", ..." if len(paths) > 3 else "")
    return (f"{len(paths)} {why}: {shown}",) if paths else ()


# --- tables -----------------------------------------------------------------------------------------------------------


def _table(file: Path, stated: Columns) -> Listing:
    rows = list(_json_rows(file) if file.suffix.lower().startswith(".json") else _csv_rows(file))
    if not rows:
        raise UserError(f"{file} has no rows")
    there = list(dict.fromkeys(name for _, row in rows for name in row))
    columns = find_columns(there, stated, str(file))
    return Listing(tuple(_merged(_row(file, columns, line, row) for line, row in rows)))


def _csv_rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Line numbers and values by column. The separator is that of comma, tab and semicolon which is most frequent in the header."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            header = stream.readline()
            stream.seek(0)
            separator = max(",\t;", key=header.count)
            reader = csv.DictReader(stream, delimiter=separator, strict=True)
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(
                        f"{file}, line {reader.line_num} has a different number of values than the header; quote values that hold {separator!r}"
                    )
                yield reader.line_num, row
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
    except csv.Error as error:
        raise UserError(f"{file} is not CSV ({error})") from None


def _json_rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The objects of a file, one per line or all in one list, with their numbers."""
    with file.open(encoding="utf-8-sig") as stream:
        lines: Iterable[tuple[int, str]] = (
            [(1, stream.read())] if file.suffix.lower() == ".json" else enumerate(stream, start=1)
        )
        for number, line in lines:
            if not line.strip():
                continue
            try:
                body = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file}, line {number}: not JSON ({error})") from None
            several = isinstance(body, list) and file.suffix.lower() == ".json"
            for at, row in enumerate(body, start=1) if several else [(number, body)]:
                if not isinstance(row, dict):
                    raise UserError(f"{file}, line {at}: expected an object of column names and values")
                yield at, row


@dataclass(frozen=True)
class _Row:
    """One line of a table."""

    line: str
    path: Path
    found: Found


def _row(file: Path, columns: Columns, line: int, row: Mapping[str, Any]) -> _Row:
    where = f"{file}, line {line}"
    name = str(row.get(columns.image or "") or "").strip()
    if not name or "://" in name:
        raise UserError(
            f"{where}: {name!r} is not the path of a picture on this machine"
            + ("; download it first" if name else "")
        )
    label = (
        str(row.get(columns.label) if row.get(columns.label) is not None else "").strip()
        if columns.label
        else None
    )
    if label == "":
        raise UserError(f"{where}: the column {columns.label!r} is empty")
    text = row.get(columns.caption) if columns.caption else None
    captions = tuple(" ".join(str(one).split()) for one in (text if isinstance(text, list) else [text or ""]))
    captions = tuple(one for one in captions if one)
    if label is None and not captions:
        raise UserError(f"{where}: the column {columns.caption!r} is empty")
    split = split_name(str(row.get(columns.split) or ""), where) if columns.split else None
    path = file.parent / name
    return _Row(where, path, Found(f"{path} ({where})", path.read_bytes, label, captions, split, path))


def _merged(rows: Iterable[_Row]) -> Iterator[Found]:
    """One sample for each file, with the captions of all its rows. Raises UserError for contradicting labels or splits."""
    known: dict[Path, _Row] = {}
    faults = []
    for row in rows:
        first = known.setdefault(row.path, row)
        for what in ("label", "split"):
            mine, theirs = getattr(row.found, what), getattr(first.found, what)
            if mine != theirs:
                faults.append(
                    f"{row.path} has the {what} {theirs!r} in {first.line} and {mine!r} in {row.line}"
                )
        captions = tuple(dict.fromkeys((*first.found.captions, *row.found.captions)))
        known[row.path] = replace(first, found=replace(first.found, captions=captions))
    if faults:
        raise refuse(
            f"{len(faults)} rows contradict earlier rows of the same picture", faults, "keep one of each"
        )
    yield from (row.found for row in known.values())
