"""One merge as a value: which tensors are merged, copied or tied, with which factors, in which groups.

It holds everything the engine needs before it reads numbers. `Findings` hold what is measured, and `Places` combine both for each
block.

Invariant: everything here is a function of headers, ids and parameters; never of paths, order of dictionaries, blocks or threads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from merge_service.anatomy.packed import Packing
from merge_service.anatomy.protocol import Anatomy
from merge_service.anatomy.structure import anatomy_of
from merge_service.blocks.spans import Span
from merge_service.checkpoints.buffers import buffers
from merge_service.checkpoints.ties import Ties, tie
from merge_service.checkpoints.weights import Weights
from merge_service.errors import TechniqueError
from merge_service.statistics import Statistics
from merge_service.techniques.definition import Technique
from merge_service.techniques.families.averages import Mean
from merge_service.techniques.rule import Combining, Facts, Rule
from merge_service.techniques.shares import weights_in
from merge_service.techniques.thinning import KeepAll


@dataclass(frozen=True)
class Input:
    """One expert (or the running model of a fold): its id, its number from 1, its weights, and what was measured of them."""

    id: str
    order: int
    weights: Weights
    evidence: Statistics | None = None


@dataclass(frozen=True, eq=False)
class MergeTask:
    """A merge of `inputs`, in order, with the layout of `reference` (the base, or the first input without one).

    `rule` combines experts in a tensor, `mean` combines running statistics. `tied` must have been checked.
    """

    technique: Technique
    params: Mapping[str, Any]
    base: Weights | None
    inputs: tuple[Input, ...]
    tied: Ties
    rule: Combining
    mean: Rule

    @classmethod
    def of(
        cls,
        technique: Technique,
        params: Mapping[str, Any],
        base: Weights | None,
        inputs: Sequence[Input],
        tied: Ties | None = None,
    ) -> "MergeTask":
        """With the technique's own rule; ties are found in the checkpoints unless they are given."""
        reference = base or inputs[0].weights
        if tied is None:
            tied = tie(reference, [one.weights for one in inputs if one.weights is not reference])
        for one in inputs:
            if one.evidence is not None:
                one.evidence.tie(tied)
        rule, mean = technique.rule(params), Mean(params)
        made = cls(technique, params, base, tuple(inputs), tied, rule, mean)
        made._refuse_uncovered()
        return made

    def _refuse_uncovered(self) -> None:
        """Raise `TechniqueError` for a tensor of which the experts' coefficients say nothing. A temperature without any stays the base's
        where task vectors are summed."""
        if self.params.get("coefficients") is None:
            return
        lacking = [
            name
            for name, _ in self.merged
            if weights_in(self.params, name, 1) is None
            and (self.rule.weighs or not self.anatomy.is_scale(name))
        ]
        if lacking:
            more = f" and {len(lacking) - 1} more tensors" * (len(lacking) > 1)
            raise TechniqueError(
                f"coefficients has no pattern for {lacking[0]}{more}; add one, such as '*' for all others"
            )

    @property
    def reference(self) -> Weights:
        """The checkpoint whose layout the result has."""
        return self.base or self.inputs[0].weights

    @property
    def source(self) -> Weights:
        """The checkpoint that tensors are copied from."""
        return self.base or self.inputs[-1].weights

    @cached_property
    def thin(self) -> KeepAll:
        """How task vectors are thinned out."""
        return self.technique.thin(self.params)

    @cached_property
    def orders(self) -> list[int]:
        """The numbers of the experts."""
        return [expert.order for expert in self.inputs]

    @cached_property
    def wide(self) -> bool:
        """Whether some tensor is combined in float64."""
        return any(self.compute(name).itemsize == 8 for name, _ in self.combined)

    @property
    def moves(self) -> bool:
        """Whether task vectors are merged; else weights."""
        return self.technique.moves(self.params)

    @property
    def whole(self) -> bool:
        """Whether tensors are computed whole, not span by span."""
        return self.rule.whole

    @property
    def in_turn(self) -> bool:
        """Whether something must be known of whole tensors, and of each of them alone, so that one can be made before the next is
        looked at."""
        asks = [
            part
            for part, plain in ((self.rule, Combining), (self.thin, KeepAll))
            if type(part).prepare is not plain.prepare
        ]
        alone = self.params.get("granularity", "tensor") in ("tensor", "row")
        return not self.whole and alone and bool(asks) and all(part.local for part in asks)

    @cached_property
    def aliases(self) -> Mapping[str, Sequence[str]]:
        """The further names of tied tensors."""
        found: dict[str, list[str]] = {}
        for alias, name in self.tied.items():
            found.setdefault(name, []).append(alias)
        return found

    @cached_property
    def merged(self) -> list[tuple[str, int]]:
        """Tensors that are computed, with their sizes: floats that are not empty, once per tie; none without inputs."""
        keep_scale = self.params.get("logit_scale") == "base"
        computed = buffers(self.reference)
        return [
            (name, info.numel)
            for name, info in self.reference.tensors.items()
            if self.inputs
            and info.kind.is_float
            and info.numel
            and name not in self.tied
            and name not in computed
            and not (keep_scale and self.anatomy.is_scale(name))
        ]

    @cached_property
    def statistics(self) -> frozenset[str]:
        """Running statistics of BatchNorm. Every technique averages them, because they are not weights.

        A technique that is already a mean of weights, with or without the base, averages them by its own rule.
        """
        if self.rule.averages:
            return frozenset()
        return frozenset(name for name, _ in self.merged if self.anatomy.is_statistic(name))

    @cached_property
    def combined(self) -> list[tuple[str, int]]:
        """Tensors that the technique itself is applied to."""
        return [(name, numel) for name, numel in self.merged if name not in self.statistics]

    @cached_property
    def copied(self) -> list[tuple[str, int]]:
        """Tensors that are copied: integers, empty ones, buffers, and logit_scale if it stays the base's."""
        merged = {name for name, _ in self.merged}
        tensors = self.reference.tensors.items()
        return [(name, info.numel) for name, info in tensors if name not in merged and name not in self.tied]

    @cached_property
    def anatomy(self) -> Anatomy:
        """What the names of the reference's tensors mean."""
        return anatomy_of({name: info.shape for name, info in self.reference.tensors.items()})

    @cached_property
    def packing(self) -> Packing:
        """The matrices in the reference's tensors."""
        split = self.params.get("attention") == "split"
        return self.anatomy.packing(self.reference.path if self.reference.files else None, split=split)

    @cached_property
    def factors(self) -> Mapping[str, float]:
        """The factor of each tensor's combined task vector. Raises TechniqueError for names without a depth."""
        return self.technique.scale.factors(self)

    def group(self, name: str) -> str:
        """The group of tensors that share thresholds and a majority sign with this one."""
        return self.anatomy.group(name, self.params.get("granularity", "tensor"))

    @cached_property
    def group_sizes(self) -> Mapping[str, int]:
        """Number of elements of every group."""
        sizes: dict[str, int] = {}
        for name, numel in self.combined:
            sizes[self.group(name)] = sizes.get(self.group(name), 0) + numel
        return sizes

    def compute(self, name: str) -> np.dtype:
        """The type of sums: float64 if the reference is float64, else float32."""
        compute = self.reference.tensors[name].kind.compute
        assert compute is not None, name
        return compute

    def combine_of(self, name: str) -> Any:
        """The rule that combines experts in a tensor."""
        return self.mean if name in self.statistics else self.rule

    def arrays(self, name: str) -> dict[str, np.dtype]:
        """The arrays of a tensor's state and their types."""
        rule = self.combine_of(name)
        return {
            **dict.fromkeys(rule.floats, self.compute(name)),
            **dict.fromkeys(rule.doubles, np.dtype(np.float64)),
            **dict.fromkeys(rule.words, np.dtype(np.uint32)),
        }

    def facts(self, name: str) -> Facts:
        """What a tensor is, as rules of whole tensors use it."""
        info = self.reference.tensors[name]
        layer, linear = self.anatomy.layer(name), self.anatomy.linear(name)
        return Facts(name, info.numel, self.compute(name), layer, linear, tuple(self.packing.matrices(name)))

    def held(self, name: str) -> dict[str, tuple[int, np.dtype]]:
        """Size and type of every array of a tensor's state."""
        rule: Any = self.combine_of(name)
        if rule.whole:
            return {
                role: (size, np.dtype(dtype)) for role, (size, dtype) in rule.arrays(self.facts(name)).items()
            }
        numel = self.reference.tensors[name].numel
        return {role: (numel, dtype) for role, dtype in self.arrays(name).items()}

    def layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The tensors of a streaming state's file: dtype and shape by name."""
        stored = {np.dtype(np.float32): "F32", np.dtype(np.float64): "F64", np.dtype(np.uint32): "U32"}
        layout: dict[str, tuple[str, tuple[int, ...]]] = {
            f"{role}:{name}": (stored[dtype], (size,))
            for name, _ in self.merged
            for role, (size, dtype) in self.held(name).items()
        }
        return layout | dict.fromkeys(getattr(self.rule, "totals", ()), ("F64", (1,)))

    def cover(self, span: Span) -> Span:
        """The whole rows that a span lies in, if thinning works by rows; else the span."""
        columns = self.columns(span.name)
        if not columns:
            return span
        return Span(span.name, span.start // columns * columns, -(-span.stop // columns) * columns)

    def columns(self, name: str) -> int:
        """The length of a tensor's rows if thinning works by rows, else 0."""
        shape = self.reference.tensors[name].shape
        return shape[-1] if self.thin.rows and shape else 0
