"""How a merged model is made, as values: operator, base and members; and what bears on no byte of it.

The public functions of `merge_service.merge`, the streams of a study and the service all build these, so that what is one merge is
spelled once.

Invariant: two derivations with equal operators, bytes and ids give equal bytes, whatever the `Way`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_service.checkpoints.target import Target
from merge_service.engine.assembly import Execution
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
        """Raises `TechniqueError` for an unknown technique or parameter, a value out of range, or a form that it lacks."""
        found = get(technique)
        return cls(found, found.resolve(params, form, strict=True), form)


@dataclass(frozen=True)
class Member:
    """One input of a merge: its id, where it lies, and the sha256 of its weights file. An id that is None comes from content."""

    id: str | None
    path: Path
    sha256: str | None = None


def members_of(
    paths: Sequence[PathLike], ids: Sequence[str | None] | None, sha256: Mapping[str, str] | None
) -> tuple[Member, ...]:
    """Members in this order, with the hashes that are known by id. Raises `TechniqueError` where ids are not one for each."""
    names = [None] * len(paths) if ids is None else list(ids)
    if len(names) != len(paths):
        raise TechniqueError(f"{len(names)} ids for {len(paths)} experts")
    known = sha256 or {}
    return tuple(
        Member(name, Path(path), None if name is None else known.get(name))
        for name, path in zip(names, paths)
    )


@dataclass(frozen=True)
class Derivation:
    """An operator, the base, and the members in the operator's order: oldest first, a running model before the new one.

    With `look`, or where an id is None, the output names file and sha256 of every input, and what computed.
    """

    operator: Operator
    base: Path | None
    members: tuple[Member, ...]
    look: bool = False

    @property
    def paths(self) -> list[Path]:
        """Where the members lie."""
        return [member.path for member in self.members]

    @property
    def sources(self) -> list[Path]:
        """Every input, the base first and then the newest member."""
        return [*([] if self.base is None else [self.base]), *reversed(self.paths)]

    @property
    def ids(self) -> list[str | None]:
        """The members' ids."""
        return [member.id for member in self.members]

    @property
    def is_named(self) -> bool:
        """Whether the output says of its inputs what the members say."""
        return not self.look and None not in self.ids


@dataclass(frozen=True)
class Lineage:
    """How the output names what it was made of: an entry per input ("id", and if known "file" and "sha256"), and `about`,
    which is the base and the versions of what computed. `notes` say what is unusual about the inputs."""

    inputs: list[dict[str, str]]
    about: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def sha256(self) -> dict[str, str]:
        """The sha256 of inputs by id, as far as they are known."""
        return {entry["id"]: entry["sha256"] for entry in self.inputs if "sha256" in entry}

    @classmethod
    def given(cls, members: Sequence[Member]) -> "Lineage":
        """By the names and hashes that the members have."""
        return cls([_entry(member) for member in members])


def _entry(member: Member) -> dict[str, str]:
    assert member.id is not None
    return {"id": member.id} if member.sha256 is None else {"id": member.id, "sha256": member.sha256}


@dataclass(frozen=True)
class Rules:
    """What is taken: `any_base` experts that are not related to the base; `strip_prefix` is taken off all tensor names."""

    any_base: bool = False
    strip_prefix: str | None = None


@dataclass(frozen=True)
class Way:
    """How a merge is carried out, which never changes a tensor of what comes out.

    `keep_limits` as of `thresholds_cache`; with `split` the work is done in parts, elsewhere.
    """

    execution: Execution = field(default_factory=Execution)
    rules: Rules = field(default_factory=Rules)
    keep_limits: Keep = False
    split: Split | None = None


@dataclass(frozen=True)
class Out:
    """Where the merged model goes: a file, an index or a directory, in shards of at most so many bytes if that is given."""

    path: Path
    shard_bytes: int | None = None

    def target(self, sources: Sequence[Path]) -> Target:
        """The same as files; a directory takes its configuration from the first source that has one."""
        return Target.of(self.path, sources, self.shard_bytes)


def out_of(path: PathLike | None, shard_bytes: int | None = None) -> Out | None:
    """Where a merged model goes that may not be wanted."""
    return None if path is None else Out(Path(path), shard_bytes)
