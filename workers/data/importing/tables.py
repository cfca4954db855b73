"""Samples from Hugging Face datasets on disk: what `datasets.save_to_disk` wrote (Arrow), and Parquet files that hold pictures.

Only pyarrow is needed, not `datasets`, and no code of a dataset is run. Columns are found by the feature description that both
formats carry, otherwise by name.
Invariant: one part of a file is in memory at a time, however large the dataset is.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from merge_service.errors import UserError
from workers.data.importing.found import SPLIT_NAMES, Columns, Found, Listing, find_columns, split_name

SUFFIXES = (".parquet", ".arrow")
STATE_FILE, DICT_FILE = "state.json", "dataset_dict.json"


def is_dataset(place: Path) -> bool:
    """Whether a folder is a dataset on disk, or holds Parquet files."""
    return place.is_dir() and (
        (place / STATE_FILE).is_file() or (place / DICT_FILE).is_file() or bool(_files_of(place))
    )


def listing(source: Path, stated: Columns) -> Listing:
    """The samples of a dataset. Raises UserError: a missing column, an unreadable file, an unknown split, splits that differ."""
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"reading {source} needs pyarrow; install it: pip install pyarrow") from None
    samples: list[Found] = []
    names: Mapping[str, str] | None = None
    for split, file in _files(source):
        try:
            opened = _opened(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{file} cannot be read ({error}); write the dataset again") from None
        features = opened.features
        columns = find_columns(opened.columns, stated, str(file), _typed(features))
        mine = _names(features, columns.label)
        if names is not None and mine != names:
            raise UserError(
                f"{file} has other class names than the files before it; write all splits with the same class names"
            )
        names = mine
        samples += _samples(opened, columns, split)
    if not samples:
        raise UserError(f"{source} holds no rows")
    return Listing(tuple(samples), names or {})


# --- files ------------------------------------------------------------------------------------------------------------


def _files(source: Path) -> Iterator[tuple[str | None, Path]]:
    """Every file of a dataset with the split it belongs to."""
    if source.is_file():
        yield _split_of(source), source
    elif (source / DICT_FILE).is_file():
        for name in _json(source / DICT_FILE).get("splits", ()):
            split = split_name(str(name), str(source / DICT_FILE))
            yield from ((split, file) for file in _saved(source / str(name)))
    elif (source / STATE_FILE).is_file():
        yield from ((None, file) for file in _saved(source))
    else:
        files = _files_of(source)
        stated = [_split_of(file) for file in files]
        several = None in stated and set(stated) != {None}
        if several:
            raise UserError(
                f"{files[stated.index(None)]}: its name does not begin with a split, but names of other files do; name it train-..., validation-... or test-..."
            )
        yield from zip(stated, files)


def _files_of(place: Path) -> list[Path]:
    return sorted([*place.glob("*.parquet"), *place.glob("data/*.parquet")])


def _split_of(file: Path) -> str | None:
    return SPLIT_NAMES.get(file.stem.partition("-")[0].lower())


def _saved(home: Path) -> list[Path]:
    """The Arrow files of one split, in the order of its state. Raises UserError."""
    named = [entry["filename"] for entry in _json(home / STATE_FILE).get("_data_files", ())]
    files = [home / Path(name).name for name in named]
    lacking = [str(file) for file in files if not file.is_file()]
    if lacking:
        raise UserError(f"{home} lacks {', '.join(lacking)}; save the dataset again")
    return files


def _json(file: Path) -> dict[str, Any]:
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); save the dataset again") from None
    return body if isinstance(body, dict) else {}


# --- rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Opened:
    """A file and its parts (record batches of Arrow, row groups of Parquet). `sizes` are the rows of each part."""

    file: Path
    columns: tuple[str, ...]
    features: Mapping[str, Any]
    sizes: tuple[int, ...]


def _opened(file: Path) -> _Opened:
    if file.suffix == ".parquet":
        import pyarrow.parquet

        parquet = pyarrow.parquet.ParquetFile(file)
        schema = parquet.schema_arrow
        sizes = [parquet.metadata.row_group(at).num_rows for at in range(parquet.metadata.num_row_groups)]
    else:
        schema, sizes = _stream(file).schema, [batch.num_rows for batch in _batches(file)]
    return _Opened(file, tuple(schema.names), _features(file, schema), tuple(sizes))


def _stream(file: Path) -> Any:
    import pyarrow

    return pyarrow.ipc.open_stream(pyarrow.memory_map(str(file)))


@lru_cache(maxsize=4)
def _batches(file: Path) -> Sequence[Any]:
    """The batches of an Arrow file; their data stays mapped."""
    return list(_stream(file))


@lru_cache(maxsize=1)
def _group(file: Path, part: int) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(file).read_row_group(part)


def _part(file: Path, part: int) -> Any:
    return _group(file, part) if file.suffix == ".parquet" else _batches(file)[part]


def _features(file: Path, schema: Any) -> Mapping[str, Any]:
    """The features that `datasets` declares by column: {"_type": "Image"}, {"_type": "ClassLabel", "names": [...]}, ..."""
    kept = (schema.metadata or {}).get(b"huggingface")
    beside = file.parent / "dataset_info.json"
    body = json.loads(kept).get("info", {}) if kept else _json(beside) if beside.is_file() else {}
    features = body.get("features") or {}
    return {name: one for name, one in features.items() if isinstance(one, dict)}


def _typed(features: Mapping[str, Any]) -> dict[str, list[str]]:
    kinds = {"image": "Image", "label": "ClassLabel"}
    return {
        role: [name for name, one in features.items() if one.get("_type") == kind]
        for role, kind in kinds.items()
    }


def _names(features: Mapping[str, Any], label: str | None) -> dict[str, str]:
    stated = features.get(label or "", {}).get("names") or ()
    return {str(number): str(name) for number, name in enumerate(stated)}


def _samples(opened: _Opened, columns: Columns, split: str | None) -> Iterator[Found]:
    """The rows of a file; a picture is read when its sample is."""
    texts = [name for name in (columns.label, columns.caption, columns.split) if name is not None]
    number = 0
    for part, size in enumerate(opened.sizes):
        values = {name: _part(opened.file, part).column(name).to_pylist() for name in texts}
        for at in range(size):
            where = f"{opened.file}, row {number}"
            number += 1
            label = values[columns.label][at] if columns.label else None
            if columns.label and (label is None or label == -1):
                raise UserError(
                    f"{where} has no label in {columns.label!r}; remove rows or splits without labels"
                )
            text = values[columns.caption][at] if columns.caption else None
            captions = _captions(text)
            if not columns.label and not captions:
                raise UserError(f"{where} has no caption in {columns.caption!r}")
            mine = split_name(str(values[columns.split][at]), where) if columns.split else split
            read = partial(_picture, opened.file, part, at, columns.image or "")
            yield Found(where, read, None if label is None else str(label), captions, mine)


def _captions(value: Any) -> tuple[str, ...]:
    several = value if isinstance(value, list) else [value or ""]
    return tuple(text for text in (" ".join(str(one).split()) for one in several) if text)


def _picture(file: Path, part: int, at: int, column: str) -> bytes:
    """The bytes of a picture, from the row or from the file that the row names. Raises OSError."""
    value = _part(file, part).column(column)[at].as_py()
    held = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(held, bytes):
        return held
    named = value.get("path") if isinstance(value, dict) else value
    if not isinstance(named, str) or not named:
        raise OSError(
            f"column {column!r} holds {type(value).__name__}, neither the bytes of a picture nor a path"
        )
    return (file.parent / named).read_bytes()
