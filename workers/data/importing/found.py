"""The samples that a source lists before any picture is read, with labels, captions and splits, and the rule that finds columns.

All kinds of sources share this form, so that splits, checks and writing exist once.
Invariant: the order of samples depends on names or lines of the source only, never on a file system.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from merge_service.errors import UserError

TRAIN, VAL, TEST = "train", "val", "test"
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), VAL),
    **dict.fromkeys(("test", "testing"), TEST),
}
"""Names of splits in sources, in lower case, and the corresponding names here."""
LISTED = 50
"""The number of faults that an error lists."""


@dataclass(frozen=True)
class Found:
    """One sample of a source. `where` names it in messages; `read` returns the bytes of its picture (raises OSError).

    `label` is its class in the terms of the source. `split` is train, val or test, or None if the source states none. `path` is the
    file of its picture if a table names one.
    """

    where: str
    read: Callable[[], bytes]
    label: str | None = None
    captions: tuple[str, ...] = ()
    split: str | None = None
    path: Path | None = None


@dataclass(frozen=True)
class Listing:
    """All samples of a source. `names` is the name of every label, in the order of the classes, if the source states names."""

    samples: tuple[Found, ...]
    names: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Columns:
    """Names of columns. In a user's options, None stands for a column with a usual name."""

    image: str | None = None
    label: str | None = None
    caption: str | None = None
    split: str | None = None


USUAL = {
    "image": (
        "filepath", "file_path", "path", "file_name", "filename", "file", "image_path", "image", "img_path", "img", "picture",
    ),
    "label": ("label", "labels", "class", "class_name", "category", "target"),
    "caption": ("caption", "captions", "text", "title", "sentence", "description"),
    "split": ("split", "set", "subset", "partition"),
}  # fmt: skip
"""The usual names of columns, in lower case."""


def find_columns(
    there: Sequence[str], stated: Columns, where: str, typed: Mapping[str, Sequence[str]] | None = None
) -> Columns:
    """The column of each role. `typed` are the columns that a schema declares as image or label.

    Raises UserError if a stated column is missing, if there is no column of pictures, if there are neither labels nor captions, or if
    several columns are possible.
    """
    found: dict[str, str | None] = {}
    for role, usual in USUAL.items():
        chosen = getattr(stated, role)
        if chosen is not None:
            if chosen not in there:
                raise UserError(
                    f"{where} has no column {chosen!r} (--{role}-column); it has {', '.join(there)}"
                )
            found[role] = chosen
            continue
        declared = (typed or {}).get(role, ())
        likely = list(declared) or [name for name in there if name.lower() in usual]
        if len(likely) > 1:
            raise UserError(
                f"{where} has several columns that may be the {role}: {', '.join(likely)}; choose one with --{role}-column"
            )
        found[role] = likely[0] if likely else None
    if found["image"] is None:
        raise UserError(
            f"{where} has no column of pictures; name one of {', '.join(there)} with --image-column"
        )
    if found["label"] is None and found["caption"] is None:
        raise UserError(
            f"{where} has neither labels nor captions; name a column of {', '.join(there)} with --label-column or --caption-column"
        )
    return Columns(**found)


def split_name(stated: str, where: str) -> str:
    """train, val or test, for the name of a split in a source. Raises UserError for an unknown name."""
    known = SPLIT_NAMES.get(stated.strip().lower())
    if known is None:
        raise UserError(f"{where}: {stated!r} is not the name of a split; use train, val or test")
    return known


def refuse(what: str, faults: Sequence[str], advice: str) -> UserError:
    """One error that lists the faults, at most `LISTED` of them."""
    more = [f"... and {len(faults) - LISTED} more"] if len(faults) > LISTED else []
    return UserError("\n  ".join([f"{what}; {advice}:", *faults[:LISTED], *more]))
