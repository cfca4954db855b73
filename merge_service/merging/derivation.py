"""How a merged model is made, as values: operator, base and members; and execution options, which affect no byte of it.

The public functions of `merge_service.merge`, the streams of a study and the service build the same values, so equal merges have
one description.

Invariant: two derivations with equal operators, bytes and ids give equal bytes, whatever the `Way`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from merge_service.checkpoints.target import Target
from merge_service.engine.assembly import Execution
from merge_service.engine.inputs import Inputs
from merge_service.engine.split import Split
from merge_service.engine.thresholds_cache import Keep
from merge_service.errors import TechniqueError
from merge_service.techniques.definition import Form, Technique
from merge_service.techniques.registry import get

PathLike = Path | str


@dataclass(frozen=True)
class Operator:
    """A technique with every parameter resolved, and its form."""

    technique: Technique
    params: Mapping[str, Any]
    form: Form

    @classmethod
    def of(cls, technique: str, params: Mapping[str, Any], form: Form) -> "Operator":
        """Raises `TechniqueError` for an unknown technique or parameter, a value out of range, or a form that the technique
        lacks.
        """
        found = get(technique)
        return cls(found, found.resolve(params, form, strict=True), form)


@dataclass(frozen=True)
class Member:
    """One input of a merge: its id, its path, the sha256 of its weights file, and the file of its statistics with its sha256.

    An id of None is derived from content; statistics that a technique needs are looked for beside the weights.
    """

    id: str | None
    path: Path
    sha256: str | None = None
    statistics: Path | None = None
    statistics_sha256: str | None = None


def members_of(
    paths: Sequence[PathLike],
    ids: Sequence[str | None] | None,
    sha256: Mapping[str, str] | None,
    statistics: Sequence[PathLike | None] | None = None,
) -> tuple[Member, ...]:
    """Members in this order, with the known hashes by id. Raises `TechniqueError` if there is not one id, and where statistics are
    given one of these, for each.
    """
    if isinstance(statistics, str | Path | Mapping) or not all(
        isinstance(one, str | Path | None) for one in statistics or ()
    ):
        raise TechniqueError(
            "statistics is a list of files, one for each expert in their order; measure(..., out=FILE) writes one"
        )
    measured = [None] * len(paths) if statistics is None else list(statistics)
    if len(measured) != len(paths):
        raise TechniqueError(
            f"{len(measured)} files of statistics for {len(paths)} experts; give one for each, in the order of the experts"
        )
    names = [None] * len(paths) if ids is None else list(ids)
    if len(names) != len(paths):
        raise TechniqueError(f"{len(names)} ids for {len(paths)} experts")
    known = sha256 or {}
    return tuple(
        Member(
            name,
            Path(path),
            None if name is None else known.get(name),
            None if found is None else Path(found),
        )
        for name, path, found in zip(names, paths, measured)
    )


@dataclass(frozen=True)
class Derivation:
    """An operator, the base, and the members in the operator's order: oldest first, a running model before the new one.

    With `look`, or if an id is None, the output names file and sha256 of every input, and the versions of the software.
    """

    operator: Operator
    base: Path | None
    members: tuple[Member, ...]
    look: bool = False

    @property
    def paths(self) -> list[Path]:
        """The paths of the members."""
        return [member.path for member in self.members]

    @property
    def sources(self) -> list[Path]:
        """Every input, the base first; without a base, the members from the one whose layout the result has."""
        return [*([] if self.base is None else [self.base]), *self.paths]

    @property
    def ids(self) -> list[str | None]:
        """The members' ids."""
        return [member.id for member in self.members]

    @property
    def is_named(self) -> bool:
        """Whether the output records ids and hashes as the members give them."""
        return not self.look and None not in self.ids


@dataclass(frozen=True)
class Lineage:
    """How the output names its inputs: an entry per input ("id", and if known "file" and "sha256"), and `about`, the base and the
    versions of the software. `notes` say what is unusual about the inputs.
    """

    inputs: Inputs
    about: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def sha256(self) -> dict[str, str]:
        """The known sha256 of inputs, by id."""
        return {entry["id"]: entry["sha256"] for entry in self.inputs if "sha256" in entry}

    @classmethod
    def given(cls, members: Sequence[Member]) -> "Lineage":
        """The lineage by the ids and hashes of the members."""
        return cls(Inputs.of(_entry(member) for member in members))


def _entry(member: Member) -> dict[str, str]:
    assert member.id is not None
    return {"id": member.id} if member.sha256 is None else {"id": member.id, "sha256": member.sha256}


@dataclass(frozen=True)
class Rules:
    """Which inputs are accepted: `any_base` accepts experts that are not related to the base; `strip_prefix` is removed from all
    tensor names.
    """

    any_base: bool = False
    strip_prefix: str | None = None


@dataclass(frozen=True)
class Way:
    """Execution options of a merge; they never change a tensor of the result.

    `keep_thresholds` as of `thresholds_cache`; `split` divides the work over processes. Files that are not `durable` are not synced:
    they are caches, or the caller syncs them. `reserve`: bytes that a streaming state must leave free on its disk; None writes a state
    whatever is free.
    """

    execution: Execution = field(default_factory=Execution)
    rules: Rules = field(default_factory=Rules)
    keep_thresholds: Keep = False
    split: Split | None = None
    durable: bool = True
    reserve: int | None = None


@dataclass(frozen=True)
class Out:
    """Where the merged model is written: a file, an index or a directory, in shards of at most `shard_bytes` bytes if given. `hashed`:
    the report has the sha256 of the files, computed while they are written. `dtype` (as safetensors names it) is that of the floats
    that are written, by default the base's. A directory of a Hugging Face library also gets `texts`, files by name, and `changes`
    in its configuration, by key path; the files of its tokenizer are those of `tokenizer`, a model, if it has some."""

    path: Path
    shard_bytes: int | None = None
    hashed: bool = False
    dtype: str | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Path | None = None

    def target(self, sources: Sequence[Path], apart: tuple[str, str] | None = None) -> Target:
        """The files to write; a directory takes what goes with the weights from the first source that has it. `apart`: an output layer and
        an embedding that are no longer one tensor (`ties.apart`)."""
        found = Target.of(self.path, sources, self.shard_bytes, self.tokenizer)
        folder = found.folder
        if folder is not None and not folder.is_open_clip:
            folder = folder.written(texts=self.texts, changes=self.changes)
            if apart is not None:
                folder = folder.taken_apart(*apart)
        return replace(found, hashed=self.hashed, dtype=self.dtype, folder=folder)


def out_of(path: PathLike | None, shard_bytes: int | None = None) -> Out | None:
    """Where a merged model is written; None if it is not wanted."""
    return None if path is None else Out(Path(path), shard_bytes)
