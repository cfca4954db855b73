"""One merge as a value: which tensors are merged, copied or tied, with which factors, in which groups.

Everything the engine asks about a merge before it looks at numbers. What is found by looking is in `Findings`, and each block's place
in both is made by `Places`.

Invariant: everything here is a function of headers, ids and parameters; never of paths, order of dictionaries, blocks or threads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from merge_service.anatomy.packed import Packing
from merge_service.anatomy.structure import Anatomy, anatomy_of, is_logit_scale, is_statistic
from merge_service.blocks.spans import Span
from merge_service.checkpoints.buffers import buffers
from merge_service.checkpoints.checkpoint import Checkpoint
from merge_service.checkpoints.ties import Ties, tie
from merge_service.techniques.definition import Technique
from merge_service.techniques.rule import Combining, Rule
from merge_service.techniques.rules import Mean
from merge_service.techniques.thinning import KeepAll


@dataclass(frozen=True)
class Input:
    """One expert (or the running model of a fold): its id, its number from 1, its weights."""

    id: str
    order: int
    weights: Checkpoint


@dataclass(frozen=True, eq=False)
class MergeTask:
    """A merge of `inputs`, in their order, into the form of `reference` (the base, or the first input without one).

    `rule` says how experts come together in a tensor, `mean` how they do in running statistics. `tied` must have been checked.
    """

    technique: Technique
    params: Mapping[str, Any]
    base: Checkpoint | None
    inputs: tuple[Input, ...]
    tied: Ties
    rule: Combining
    mean: Rule

    @classmethod
    def of(
        cls,
        technique: Technique,
        params: Mapping[str, Any],
        base: Checkpoint | None,
        inputs: Sequence[Input],
        tied: Ties | None = None,
    ) -> "MergeTask":
        """By the technique's own rule; ties are found in the checkpoints unless they are given."""
        reference = base or inputs[0].weights
        if tied is None:
            tied = tie(reference, [one.weights for one in inputs if one.weights is not reference])
        rule, mean = technique.combine(params), Mean(params)
        return cls(technique, params, base, tuple(inputs), tied, rule, mean)

    @property
    def reference(self) -> Checkpoint:
        """The checkpoint whose form the result has."""
        return self.base or self.inputs[0].weights

    @property
    def source(self) -> Checkpoint:
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
        """Whether task vectors are merged, else weights."""
        return self.technique.moves(self.params)

    @property
    def whole(self) -> bool:
        """Whether tensors are made whole, not span by span."""
        return self.rule.whole

    @cached_property
    def aliases(self) -> Mapping[str, Sequence[str]]:
        """The further names of tensors that have some."""
        found: dict[str, list[str]] = {}
        for alias, name in self.tied.items():
            found.setdefault(name, []).append(alias)
        return found

    @cached_property
    def merged(self) -> list[tuple[str, int]]:
        """Tensors that arithmetic is done on, with their sizes: floats that hold numbers, once per tie; none without inputs."""
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
            and not (keep_scale and is_logit_scale(name))
        ]

    @cached_property
    def statistics(self) -> frozenset[str]:
        """Running statistics of BatchNorm, which are averaged whatever the technique: they are no weights.

        A technique that is a mean of weights already, with the base or without, does that by itself.
        """
        if self.rule.averages:
            return frozenset()
        return frozenset(name for name, _ in self.merged if is_statistic(name))

    @cached_property
    def combined(self) -> list[tuple[str, int]]:
        """Tensors that the technique itself is applied to."""
        return [(name, numel) for name, numel in self.merged if name not in self.statistics]

    @cached_property
    def copied(self) -> list[tuple[str, int]]:
        """Tensors taken over as they are: integers, empty ones, buffers, and logit_scale when it stays the base's."""
        merged = {name for name, _ in self.merged}
        tensors = self.reference.tensors.items()
        return [(name, info.numel) for name, info in tensors if name not in merged and name not in self.tied]

    @cached_property
    def anatomy(self) -> Anatomy:
        """The towers and stacks of the reference."""
        return anatomy_of(self._shapes)

    @cached_property
    def packing(self) -> Packing:
        """Where matrices lie in the reference's tensors."""
        split = self.params.get("attention") == "split"
        return Packing.of(self._shapes, self.reference.path, split=split)

    @cached_property
    def factors(self) -> Mapping[str, float]:
        """What the combined task vector of each tensor is multiplied by. Raises TechniqueError for names that say no depth."""
        names = [name for name, _ in self.merged]
        if self.technique.depth:
            return self.anatomy.factors(names, self.params)
        return dict.fromkeys(names, self.params.get(self.technique.factor, 1.0))

    def group(self, name: str) -> str:
        """The tensors that share thresholds and a majority sign with this one."""
        return self.anatomy.group(name, self.params.get("granularity", "tensor"))

    @cached_property
    def group_sizes(self) -> Mapping[str, int]:
        """Number of elements of every group."""
        sizes: dict[str, int] = {}
        for name, numel in self.combined:
            sizes[self.group(name)] = sizes.get(self.group(name), 0) + numel
        return sizes

    def compute(self, name: str) -> np.dtype:
        """The type sums are kept in: float64 where the reference is float64, else float32."""
        compute = self.reference.tensors[name].kind.compute
        assert compute is not None, name
        return compute

    def combine_of(self, name: str) -> Any:
        """How experts come together in a tensor."""
        return self.mean if name in self.statistics else self.rule

    def arrays(self, name: str) -> dict[str, np.dtype]:
        """The arrays of a tensor's state and their types."""
        rule = self.combine_of(name)
        return {
            **dict.fromkeys(rule.floats, self.compute(name)),
            **dict.fromkeys(rule.words, np.dtype(np.uint32)),
        }

    def layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The tensors of a streaming state's file: dtype and shape by name."""
        stored = {np.dtype(np.float32): "F32", np.dtype(np.float64): "F64", np.dtype(np.uint32): "U32"}
        layout: dict[str, tuple[str, tuple[int, ...]]] = {
            f"{role}:{name}": (stored[dtype], (numel,))
            for name, numel in self.merged
            for role, dtype in self.arrays(name).items()
        }
        for role in getattr(self.rule, "tallies", ()):
            layout |= {f"{role}:{name}": ("U32", (1,)) for name, _ in self.combined}
        return layout | dict.fromkeys(getattr(self.rule, "totals", ()), ("F64", (1,)))

    def cover(self, span: Span) -> Span:
        """The whole rows that a span lies in, where task vectors are thinned out as rows; else the span."""
        columns = self.columns(span.name)
        if not columns:
            return span
        return Span(span.name, span.start // columns * columns, -(-span.stop // columns) * columns)

    def columns(self, name: str) -> int:
        """The length of a tensor's rows where task vectors are thinned out as rows, else 0."""
        shape = self.reference.tensors[name].shape
        return shape[-1] if self.thin.rows and shape else 0

    @cached_property
    def _shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.reference.tensors.items()}
