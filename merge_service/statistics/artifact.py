"""The file of a statistic: means over rows of data, one tensor per parameter name.

A safetensors file. Its metadata has `statistics` (the kind), `version`, `examples`, `rows` (JSON: rows by name, or one number for
all), `parameters` (JSON) and `expert_sha256`, the sha256 of the weights that were measured (and `expert_content`, of their tensors). K-FAC has a second tensor per
parameter, `NAME:out`. Files of parts of the data are combined by means weighted with rows.

A tensor with several names has one statistic: what the file holds under any of these names. Two that differ are refused, because
nothing says which of them is the tensor's.

Learned coefficients are such a file too: one for all experts of a merge, whose metadata names the technique and the sha256 of every
expert. Tensors are [N], [N, columns] or as large as the parameter; `*` stands for parameters without one of their own.

Invariant: a statistic is used with the weights that it was measured on and with no others, as far as the file names them.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from merge_service.checkpoints.checkpoint import Checkpoint
from merge_service.checkpoints.ties import Ties
from merge_service.checkpoints.writer import CheckpointWriter
from merge_service.errors import CorruptCheckpoint, NonFiniteCheckpoint, TechniqueError

COEFFICIENTS = "coefficients"
KINDS = ("gram", "fisher", "kfac", "gradient", "layer_gram", COEFFICIENTS)
MEASURED = KINDS[:4]
"""Those of one checkpoint; `layer_gram` and `coefficients` are of all experts of a merge together."""
VERSION = 1
OUT = ":out"
"""What K-FAC appends to a parameter's name for the factor of the output's gradients."""
_ASYMMETRY = 2.0**-6
"""Of the largest element: what rounding may do to the halves of a Gram matrix, and packing one half may not."""


@dataclass(frozen=True)
class About:
    """What a statistic is of: its kind, the rows behind every mean by name, the examples, and the sha256 of the weights.

    `expert_content` is the digest of the weights' tensors apart from names, order and file, so that weights that were stored again are
    recognised. `parameters` are those of the measurement. Of learned coefficients, `technique` is what merges with them, `experts` and
    `base_sha256` the sha256 of the weights that they were learned with, `losses` the loss before every step.
    """

    kind: str
    rows: Mapping[str, int]
    examples: int
    expert_sha256: str | None = None
    expert_content: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    technique: str | None = None
    experts: tuple[str, ...] = ()
    base_sha256: str | None = None
    losses: tuple[float, ...] = ()

    def metadata(self) -> dict[str, str]:
        """The metadata of the file."""
        said = {
            "statistics": self.kind,
            "version": str(VERSION),
            "examples": str(self.examples),
            "rows": json.dumps(dict(self.rows), sort_keys=True),
            "parameters": json.dumps(dict(self.parameters), sort_keys=True),
        }
        of = {
            "expert_sha256": self.expert_sha256,
            "expert_content": self.expert_content,
            "technique": self.technique,
            "base_sha256": self.base_sha256,
            "experts": json.dumps(self.experts) if self.experts else None,
            "losses": json.dumps(self.losses) if self.losses else None,
        }
        return {**said, **{key: value for key, value in of.items() if value is not None}}


@dataclass(frozen=True, eq=False)
class Numbers(Mapping[str, np.ndarray]):
    """What was measured or learned: its tensors by name (float64), what it is of, and the file it was written to."""

    tensors: Mapping[str, np.ndarray]
    about: About
    out: Path | None = None

    def __getitem__(self, name: str) -> np.ndarray:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


class Statistics:
    """An open file of statistics; a context manager. Raises `CorruptCheckpoint` for a file that is none of this version."""

    def __init__(self, path: Path | str) -> None:
        self.checkpoint = Checkpoint.open(path)
        said = self.checkpoint.metadata
        self.path = Path(path)
        self._ties: Ties = {}
        self._keys: dict[str, str | None] = {}
        self.kind = said.get("statistics", COEFFICIENTS if "technique" in said else "")
        try:
            rows = json.loads(said.get("rows", "{}"))
            every = rows if isinstance(rows, dict) else dict.fromkeys(self.checkpoint.tensors, rows)
            self.about = About(
                self.kind,
                {str(name): int(count) for name, count in every.items()},
                int(said.get("examples", 0)),
                said.get("expert_sha256"),
                said.get("expert_content"),
                dict(json.loads(said.get("parameters", "{}"))),
                said.get("technique"),
                tuple(map(str, json.loads(said.get("experts", "[]")))),
                said.get("base_sha256"),
                tuple(map(float, json.loads(said.get("losses", "[]")))),
            )
            known = self.kind in KINDS and int(said.get("version", VERSION)) == VERSION
        except (TypeError, ValueError):
            known = False
        if not known:
            raise CorruptCheckpoint(
                f"{path} holds no statistics of this version (its metadata must name one of {', '.join(KINDS)}); measure again: "
                "`temporal-merge measure KIND CHECKPOINT --out FILE`"
            )

    def tie(self, ties: Ties) -> None:
        """Take these names for one tensor each, as the merge does that uses the file."""
        self._ties, self._keys = dict(ties), {}

    def holds(self, name: str) -> bool:
        """Whether there is something for a name, under it or under another name of the same tensor."""
        return self._key(name) is not None

    def holds_all(self, name: str) -> bool:
        """Whether there is all that a rule reads of a name: with K-FAC both factors."""
        return self.holds(name) and (self.kind != "kfac" or self.holds(name + OUT))

    def get(self, name: str) -> np.ndarray | None:
        """The tensor of a name in float64, None where there is none.

        Raises `NonFiniteCheckpoint` naming the file and the key, and `TechniqueError` for a tied tensor with two statistics, and for
        numbers that no mean of squares can be.
        """
        key = self._key(name)
        if key is None:
            return None
        info = self.checkpoint.tensors[key]
        values = self.block(name, 0, info.numel).reshape(info.shape)
        if self.kind in ("gram", "kfac", "layer_gram"):
            self._check_products(key, values)
        return values

    def factors(self, name: str) -> np.ndarray | None:
        """Learned coefficients of a parameter, float64 [N] or [N, columns]: its own, else those of `*`; None where there are none."""
        return self.get(name if self.holds(name) else "*")

    def _key(self, name: str) -> str | None:
        """The name under which the file holds what there is for a name."""
        if name not in self._keys:
            stem, out = (name[: -len(OUT)], OUT) if name.endswith(OUT) else (name, "")
            leader = self._ties.get(stem, stem)
            alike = [leader, *(alias for alias, other in self._ties.items() if other == leader)]
            held = [one + out for one in alike if one + out in self.checkpoint.tensors]
            for other in held[1:]:
                if not self._same(held[0], other):
                    raise TechniqueError(
                        f"{self.path} holds two {self.kind} of one tensor, which the models have under the names {held[0]} and {other}; "
                        "leave one of them out, or measure again"
                    )
            self._keys[name] = held[0] if held else None
        return self._keys[name]

    def _same(self, one: str, other: str) -> bool:
        shapes = [self.checkpoint.tensors[name].shape for name in (one, other)]
        return shapes[0] == shapes[1] and np.array_equal(
            self.checkpoint.read(one), self.checkpoint.read(other)
        )

    def block(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements start..stop of a flattened tensor that there is. Raises as `get` does."""
        values = self.checkpoint.read(self._key(name) or name, start, stop).astype(np.float64)
        if not np.isfinite(values).all():
            raise NonFiniteCheckpoint(
                f"{self.path} (statistics of kind {self.kind}): {name} holds NaN or infinity; measure again"
            )
        if self.kind == "fisher" and (values < 0).any():
            raise TechniqueError(
                f"{self.path}: {name} holds numbers below zero, and means of squares have none; measure again"
            )
        return values

    def _check_products(self, key: str, values: np.ndarray) -> None:
        """Raise `TechniqueError` for a matrix that is no mean of x x^T, up to the rounding of half precision."""
        if values.ndim < 2:
            squares, other = values, values
        else:
            squares = np.diagonal(values, axis1=-2, axis2=-1)
            other = values.swapaxes(-1, -2)
        if values.ndim and values.shape != other.shape:
            raise TechniqueError(
                f"{self.path}: {key} has shape {list(values.shape)}, and a Gram matrix is square; measure again"
            )
        low, apart = squares.min(initial=0.0), np.abs(values - other).max(initial=0.0)
        if low < 0 or apart > _ASYMMETRY * np.abs(squares).max(initial=0.0):
            wrong = "numbers below zero on its diagonal" if low < 0 else "two different halves"
            raise TechniqueError(
                f"{self.path}: {key} has {wrong}, and a Gram matrix has not (halves are stored whole); measure again"
            )

    @cached_property
    def norm(self) -> float:
        """The L2 norm of all numbers of the file together, those of a tied tensor once."""
        tensors = (self.get(name) for name in dict.fromkeys(map(self._key, self.checkpoint.tensors)) if name)
        return math.sqrt(math.fsum(float((one * one).sum()) for one in tensors if one is not None))

    def check(self, kind: str, digests: tuple[str, str] | None, who: str) -> None:
        """Raise `TechniqueError` unless these are statistics of this kind, of the weights with these digests (`Weights.digests`)."""
        if self.kind != kind:
            raise TechniqueError(
                f"{self.path} holds statistics of kind {self.kind}, and {kind} is needed for {who}"
            )
        found, content = self.about.expert_sha256, self.about.expert_content
        if found is None or digests is None:
            return
        of_content, sha256 = digests
        if found != sha256 and content != of_content:
            raise TechniqueError(
                f"{self.path} was measured on other weights than {who}: on sha256 {found[:16]}..., which is not {sha256[:16]}...; give the "
                f"statistics in the order of the experts, or measure again: `temporal-merge measure {kind} CHECKPOINT --out FILE`"
            )

    def check_tensors(self, shapes: Mapping[str, int], who: str) -> None:
        """Raise `TechniqueError` if no tensor is of a name in `shapes` (elements by name), or one by element has another size."""
        held = {name: info.numel for name, info in self.checkpoint.tensors.items()}
        known = [name for name in held if name.removesuffix(OUT) in shapes]
        if held and not known:
            names = f"{next(iter(held))}, ...; {who} has {next(iter(shapes), 'nothing')}, ..."
            raise TechniqueError(f"{self.path} holds nothing of any tensor of {who}: its names are {names}")
        for name in known if self.kind in ("fisher", "gradient") else ():
            if held[name] != shapes[name]:
                raise TechniqueError(
                    f"{self.path}: {name} has shape {list(self.checkpoint.tensors[name].shape)}, and the tensor of {who} has "
                    f"{shapes[name]} elements; measure again"
                )

    def __enter__(self) -> "Statistics":
        return self

    def __exit__(self, *_: object) -> None:
        self.checkpoint.close()


def beside(weights: Path, kind: str) -> Path:
    """Where the statistics of a checkpoint are found without being named: EXPERT.KIND.safetensors."""
    name = weights.name.removesuffix(".index.json").removesuffix(".safetensors")
    return weights.with_name(f"{name}.{kind}.safetensors")


def write(path: Path, tensors: Mapping[str, np.ndarray], about: About) -> None:
    """Write a statistic in float32. Raises `NonFiniteCheckpoint` for NaN or infinity, naming the tensor."""
    for name, values in tensors.items():
        if not np.isfinite(values).all():
            raise NonFiniteCheckpoint(
                f"{about.kind} of {name} is NaN or infinite: the weights or the inputs are; check them"
            )
    layout = {name: ("F32", tuple(values.shape)) for name, values in tensors.items()}
    with CheckpointWriter(path, layout, about.metadata()) as writer:
        for name, values in tensors.items():
            writer.write(name, 0, np.ascontiguousarray(values).reshape(-1))


def pooled(paths: Sequence[Path | str], out: Path) -> About:
    """Write the statistics of all the data whose parts were measured in `paths`: means weighted with rows.

    Raises `TechniqueError` for files of different kinds, weights or tensors, or without rows.
    """
    with contextlib.ExitStack() as stack:
        parts = [stack.enter_context(Statistics(path)) for path in paths]
        first = parts[0]
        names = list(first.checkpoint.tensors)
        for part in parts:
            same = part.kind == first.kind and part.about.expert_sha256 == first.about.expert_sha256
            if not same or set(part.checkpoint.tensors) != set(names) or not part.about.rows:
                raise TechniqueError(
                    f"{part.path} and {first.path} are not parts of one measurement: kind, weights, tensors and rows must be there and agree"
                )
        rows = {name: sum(part.about.rows[name.removesuffix(OUT)] for part in parts) for name in names}
        tensors: dict[str, np.ndarray] = {}
        for name in names:
            shares = [part.about.rows[name.removesuffix(OUT)] / max(rows[name], 1) for part in parts]
            tensors[name] = sum(share * part.get(name) for share, part in zip(shares, parts))  # type: ignore[operator,misc,assignment]
        kept = {name: count for name, count in rows.items() if not name.endswith(OUT)}
        examples = sum(part.about.examples for part in parts)
        about = About(
            first.kind,
            kept,
            examples,
            first.about.expert_sha256,
            first.about.expert_content,
            first.about.parameters,
        )
        write(out, tensors, about)
    return about
