"""One merge, worked out before any block is touched: what happens to each tensor, with which numbers.

A `Blend` knows which tensors are merged, copied or tied, the factor, group and clamp of each, and per expert the place
of every tensor (share, thresholds, mask key). It then gives the two functions the rest is made of: `fill` builds a
block's state, `finish` turns it into the block that is stored.

Invariant: everything here is a function of the checkpoints' contents, the ids and the parameters; never of paths, order
of dictionaries, blocks or threads.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from merge_service.anatomy.packed import Packing
from merge_service.anatomy.structure import LN_100, Anatomy, anatomy_of, is_logit_scale, is_statistic
from merge_service.blocks.device import Device, Host
from merge_service.blocks.masks import tensor_key
from merge_service.blocks.spans import BLOCK, Scratch, Span, dots, run, spans
from merge_service.blocks.thresholds import (
    EVERYTHING,
    Ask,
    Grams,
    Key,
    Limits,
    Products,
    Ranks,
)
from merge_service.checkpoints.admission import check_finite
from merge_service.checkpoints.buffers import buffers
from merge_service.checkpoints.checkpoint import Checkpoint
from merge_service.checkpoints.dtypes import all_finite
from merge_service.checkpoints.ties import Ties, tie
from merge_service.engine.fused import Fused, Outcome, fits
from merge_service.engine.lookahead import look_ahead, magnitude_ranks
from merge_service.engine.survey import Surveyor
from merge_service.engine.whole import RULES, coefficients
from merge_service.techniques.definition import Technique
from merge_service.techniques.place import Election, Place, State
from merge_service.techniques.rules import (
    Combine,
    Mean,
    arc,
    by_rows,
    combination,
    is_trimmed,
    share,
    sparsify,
)


@dataclass(frozen=True)
class Input:
    """One expert (or the running model of a fold): its id, its number from 1, its weights."""

    id: str
    order: int
    weights: Checkpoint


class Blend:
    """A merge of `inputs`, in their order, into the form of `reference` (the base, or the first input without one)."""

    def __init__(
        self,
        technique: Technique,
        params: Mapping[str, Any],
        base: Checkpoint | None,
        inputs: Sequence[Input],
        threads: int = 1,
        device: str | None = None,
        ties: Ties | None = None,
    ) -> None:
        """`ties` are found in the checkpoints unless they are given; given ones must have been checked."""
        self.site = Device(device) if device else Host()
        self.technique, self.params, self.base, self.inputs, self.threads = (
            technique,
            params,
            base,
            inputs,
            threads,
        )
        self.reference = base or inputs[0].weights
        self.scratch = Scratch()
        self.moves = technique.moves(params)
        """Whether task vectors are merged, else weights."""
        self.whole = technique.combine in RULES
        """Whether tensors are made whole, not span by span."""
        self.combine: Combine = RULES[technique.combine]() if self.whole else combination(technique, params)  # type: ignore[assignment]
        others = [expert.weights for expert in inputs if expert.weights is not self.reference]
        self.tied = tie(self.reference, others) if ties is None else ties
        self.aliases: dict[str, list[str]] = {}
        for alias, name in self.tied.items():
            self.aliases.setdefault(name, []).append(alias)
        self.source = base or inputs[-1].weights
        self.limits: dict[Key, Limits] = {}
        self.scores: dict[Key, Limits] = {}
        self.gains: dict[tuple[str, int], float] = {}
        self.turns: dict[tuple[str, int], tuple[float, float]] = {}
        self._fit: dict[str, bool] = {}
        self._read = [*([base] if base else []), *(expert.weights for expert in inputs)]
        self._rows = by_rows(technique, params)
        self._mean: Combine = Mean()
        loops = self.combine.kernel is not None and device is None
        fusible = loops and not self._rows and not is_trimmed(params)
        self._fused = Fused(self.combine, base, inputs, delta=self.moves) if fusible else None

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
        if self.technique.combine == "mean":
            return frozenset()
        return frozenset(name for name, _ in self.merged if is_statistic(name))

    @cached_property
    def combined(self) -> list[tuple[str, int]]:
        """Tensors that the technique itself is applied to."""
        return [(name, numel) for name, numel in self.merged if name not in self.statistics]

    @cached_property
    def anatomy(self) -> Anatomy:
        """The towers and stacks of the reference."""
        return anatomy_of({name: info.shape for name, info in self.reference.tensors.items()})

    @cached_property
    def packing(self) -> Packing:
        """Where matrices lie in the reference's tensors."""
        shapes = {name: info.shape for name, info in self.reference.tensors.items()}
        return Packing.of(shapes, self.reference.path, split=self.params.get("attention") == "split")

    @cached_property
    def copied(self) -> list[tuple[str, int]]:
        """Tensors taken over as they are: integers, empty ones, buffers, and logit_scale when it stays the base's."""
        merged = {name for name, _ in self.merged}
        tensors = self.reference.tensors.items()
        return [(name, info.numel) for name, info in tensors if name not in merged and name not in self.tied]

    @cached_property
    def factors(self) -> dict[str, float]:
        """What the combined task vector of each tensor is multiplied by."""
        names = [name for name, _ in self.merged]
        if self.technique.depth:
            return self.anatomy.factors(names, self.params)
        return dict.fromkeys(names, self.params.get(self.technique.factor, 1.0))

    def group(self, name: str) -> str:
        """The tensors that share thresholds and a majority sign with this one."""
        return self.anatomy.group(name, self.params.get("granularity", "tensor"))

    @cached_property
    def group_sizes(self) -> dict[str, int]:
        """Number of elements of every group."""
        sizes: dict[str, int] = {}
        for name, numel in self.combined:
            sizes[self.group(name)] = sizes.get(self.group(name), 0) + numel
        return sizes

    @property
    def ranks(self) -> Ranks | None:
        """Which ranks bound the magnitudes that are kept of an expert, whoever the others are; None where nothing is ranked."""
        return magnitude_ranks(self) if self.technique.sparsify in ("magnitude", "band", "crumbs") else None

    def prepare(self, ask: Ask | None = None) -> None:
        """Find the numbers that need a look at whole tensors first: thresholds, norms, or the angles of a slerp.

        Thresholds that are in `limits` already are not looked for.
        """
        if self.technique.depth and self.merged:
            _ = self.factors  # refuses names that say no depth, before anything is looked at
        ask = ask or Surveyor(self, self.combined).answer
        look_ahead(self, ask)
        if (
            self.technique.combine == "slerp"
            and len(self.inputs) == 2
            and self.params["weight"] not in (0, 1)
        ):
            self._find_arcs(self._products(ask))
        if self.technique.combine == "spherical" and len(self.inputs) > 1:
            self.turns |= coefficients(self, self._products(ask))

    @property
    def findings(self) -> dict[str, Any]:
        """What `prepare` found: all that blocks depend on besides the checkpoints, ids and parameters."""
        return {"limits": self.limits, "turns": self.turns, "scores": self.scores, "gains": self.gains}

    def adopt(self, findings: Mapping[str, Any]) -> None:
        """Take over what `prepare` of an equal blend found."""
        vars(self).update(findings)

    def compute_span(
        self, span: Span, held: State | None, *, majority: int, finish: bool, squares: bool
    ) -> Outcome:
        """One span of the result; `held`, a state to be continued, is changed in place. Raises for numbers that are not finite."""
        places = self._places(span)
        if span.name in self.statistics:
            outcome = self._averaged(span, places, held, finish)
        elif self._is_fused(span.name):
            assert self._fused
            outcome = self._fused.run(
                span, places, factor=self.factors[span.name], majority=majority, held=held, finish=finish,
                squares=squares and not is_logit_scale(span.name),
            )  # fmt: skip
            self.refuse(outcome.bad)
        else:
            outcome = self._by_definition(span, places, held, majority, finish)
        return replace(outcome, block=self.clamped(span, outcome.block)) if finish else outcome

    def _averaged(self, span: Span, places: Mapping[int, Place], held: State | None, finish: bool) -> Outcome:
        state = self._empty(span) if held is None else held
        for expert in self.inputs:
            self.rule(span.name).add(np, state, self.numbers(expert, span), places[expert.order])
        block, election = self.rule(span.name).result(np, state, 1)
        return Outcome(np.array(block) if finish else np.empty(0), election, [], ())

    def rule(self, name: str) -> Any:
        """How experts come together in a tensor."""
        return self._mean if name in self.statistics else self.combine

    def clamped(self, span: Span, block: np.ndarray) -> np.ndarray:
        """The block with logit_scale at ln(100) at most as CLIP has it, unless that is not wanted; `block` stays as it is.

        A variance below zero is rounding (where an expert was taken out of a mean) and becomes zero.
        """
        if span.name.endswith("running_var"):
            return np.maximum(block, 0)
        if is_logit_scale(span.name) and self.params.get("logit_scale") != "unclamped":
            return np.minimum(block, self._ceiling(span))
        return block

    def _is_fused(self, name: str) -> bool:
        if name not in self._fit:
            self._fit[name] = self.compute(name).itemsize == 4 and fits(self._read, name)
        return self._fused is not None and self._fit[name]

    def _by_definition(
        self, span: Span, places: Mapping[int, Place], held: State | None, majority: int, finish: bool
    ) -> Outcome:
        """The span by the array definitions of the rules, wherever blocks are worked on."""
        site, xp, compute = self.site, self.site.xp, self.compute(span.name)
        rows, finite = self.cover(span), []
        cut = slice(span.start - rows.start, span.stop - rows.start)
        with site.turn():
            state = {role: site.put(array) for role, array in (held or self._empty(span)).items()}
            base = None
            if self.moves:
                assert self.base is not None
                base = site.read(self.base, rows, compute, "base")
                finite.append((0, site.finite(base)))
            for expert in self.inputs:
                x = site.read(expert.weights, rows, compute, f"expert {expert.order}")
                finite.append((expert.order, site.finite(x)))
                if base is not None:
                    x = sparsify(xp, self.technique, self.params, x - base, self.place(expert, rows))
                self.combine.add(xp, state, x[cut], places[expert.order])
            self.refuse([order for order, fine in finite if not bool(fine)])
            if held is not None:
                held.update((role, site.fetch(array)) for role, array in state.items())
            if not finish:
                return Outcome(np.empty(0), Election(), [], ())
            out, election = self.combine.result(xp, state, majority)
            if base is not None:
                factor = self.factors[span.name]
                moved = out * factor if factor != 1 else out
                out = base[cut] - (0 - moved)  # see rules: keeps the sign of an untouched zero
            return Outcome(site.fetch(out), election, [], ())

    def cover(self, span: Span) -> Span:
        """The whole rows that a span lies in, where they are thinned out as rows; else the span."""
        columns = self._columns(span.name)
        if not columns:
            return span
        return Span(span.name, span.start // columns * columns, -(-span.stop // columns) * columns)

    def _columns(self, name: str) -> int:
        shape = self.reference.tensors[name].shape
        return shape[-1] if self._rows and shape else 0

    def refuse(self, orders: Sequence[int]) -> None:
        """Raise `NonFiniteCheckpoint` for the first of these inputs (0 is the base) that holds NaN or infinity."""
        for order in orders:
            if order == 0 and self.base is not None:
                check_finite(self.base, "the base")
            for expert in self.inputs:
                if expert.order == order:
                    check_finite(expert.weights, expert.id)

    def base_block(self, span: Span) -> np.ndarray:
        """The base's numbers, in the type sums are kept in; raises when they are not finite."""
        assert self.base is not None
        return self._block(self.base, span, 0)

    def numbers(self, expert: Input, span: Span) -> np.ndarray:
        """An expert's numbers, likewise."""
        return self._block(expert.weights, span, expert.order)

    def _block(self, weights: Checkpoint, span: Span, order: int) -> np.ndarray:
        block = weights.read(span.name, span.start, span.stop)
        if not all_finite(block):
            self.refuse((order,))
        return block.astype(self.compute(span.name), copy=False)

    def compute(self, name: str) -> np.dtype:
        """The type sums are kept in: float64 where the reference is float64, else float32."""
        compute = self.reference.tensors[name].kind.compute
        assert compute is not None, name
        return compute

    def arrays(self, name: str) -> dict[str, np.dtype]:
        """The arrays of a tensor's state and their types."""
        return {
            **dict.fromkeys(self.rule(name).floats, self.compute(name)),
            **dict.fromkeys(self.rule(name).words, np.dtype(np.uint32)),
        }

    def _empty(self, span: Span) -> State:
        return {role: np.zeros(span.size, dtype) for role, dtype in self.arrays(span.name).items()}

    def _places(self, span: Span) -> dict[int, Place]:
        return {expert.order: self.place(expert, span) for expert in self.inputs}

    def place(self, expert: Input, span: Span) -> Place:
        """What a rule may know of a span of an expert."""
        order, key = expert.order, (self.group(span.name), expert.order)
        if span.name in self.statistics:
            given = self.technique.space == "weights" and self.technique.rule is None
            return Place(order, share(self.params, order) if given else 1 / order)
        if self.technique.space == "weights":
            return Place(order, share(self.params, order), self.turns.get((span.name, order)))
        return Place(
            order,
            1 / order,
            limits=self.limits.get(key, EVERYTHING),
            scores=self.scores.get(key, EVERYTHING),
            key=self._mask_key(expert, span.name),
            density=self.params.get("density", 1.0),
            epsilon=self.params.get("epsilon", 0.0),
            gain=self._gain(span.name, order),
            start=span.start,
            columns=self._columns(span.name),
        )

    def _mask_key(self, expert: Input, name: str) -> int | None:
        """None where nothing is random: scalars are never dropped."""
        scalar = self.reference.tensors[name].shape == () and self.technique.combine != "draw"
        return (
            None if scalar or "seed" not in self.params else tensor_key(self.params["seed"], expert.id, name)
        )

    def _gain(self, name: str, order: int) -> float | None:
        return None if self.params.get("rescale") == "expectation" else self.gains.get((name, order), 1.0)

    def _ceiling(self, span: Span) -> np.floating[Any]:
        """ln(100), or the reference's own value where that is higher: a model that was never clamped stays what it is."""
        own = float(self.reference.read(span.name, span.start, span.stop).max())
        return self.compute(span.name).type(max(LN_100, own))

    def _find_arcs(self, grams: Mapping[str, np.ndarray]) -> None:
        for name, gram in grams.items():
            (first, dot), (_, second) = gram
            if self.reference.tensors[name].numel > 1:
                turn = arc(self.params["weight"], dot, first, second)
                if turn:
                    self.turns[name, self.inputs[1].order] = turn

    @staticmethod
    def _products(ask: Ask) -> Mapping[str, np.ndarray]:
        grams = ask(Products())
        assert isinstance(grams, Grams)
        return grams.by_tensor

    def grams(self, tensors: Sequence[tuple[str, int]]) -> dict[str, np.ndarray]:
        """Inner products of all pairs of inputs per tensor, float64 [inputs, inputs], of task vectors if those are merged."""

        def work(span: Span) -> np.ndarray:
            if self._is_fused(span.name):
                assert self._fused
                found, bad = self._fused.products(span)
                self.refuse(bad)
                return found
            base = self.base_block(span) if self.moves else None
            blocks = [self.numbers(expert, span) for expert in self.inputs]
            blocks = blocks if base is None else [block - base for block in blocks]
            pairs = [[dots(a, b, self.scratch) for b in blocks] for a in blocks]
            return np.array(pairs).transpose(2, 0, 1)

        parts: dict[str, list[np.ndarray]] = {name: [] for name, _ in tensors}
        over = list(spans(tensors, BLOCK))
        for span, found in zip(over, run(work, over, self.threads)):
            parts[span.name].extend(found)
        return {name: _exact_sum(found) for name, found in parts.items()}


def _exact_sum(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The symmetric matrix whose upper triangle is the sum of these, each entry rounded once."""
    size = len(parts[0])
    gram = np.empty((size, size))
    for i in range(size):
        for j in range(i, size):
            gram[i, j] = gram[j, i] = math.fsum(part[i, j] for part in parts)
    return gram
