"""One merge, worked out before any block is touched: what happens to each tensor, with which numbers.

A `Blend` knows which tensors are merged, copied or tied, the factor, group and clamp of each, and per expert the place
of every tensor (share, thresholds, mask key). It then gives the two functions the rest is made of: `fill` builds a
block's state, `finish` turns it into the block that is stored.

Invariant: everything here is a function of the checkpoints' contents, the ids and the parameters; never of paths, order
of dictionaries, blocks or threads.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from merge_service.admission import check_finite
from merge_service.checkpoint import Checkpoint
from merge_service.dtypes import all_finite
from merge_service.engine import BLOCK, Scratch, Span, dots, run, spans
from merge_service.errors import IncompatibleCheckpoint
from merge_service.masks import tensor_key
from merge_service.rules import Combine, Election, Place, State, arc, combination, share, sparsify
from merge_service.techniques import Technique
from merge_service.thresholds import EVERYTHING, Limits, band_ranks, limits, trim_ranks
from merge_service.towers import LN_100, depth_factors, group, is_logit_scale


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
    ) -> None:
        self.technique, self.params, self.base, self.inputs, self.threads = (
            technique,
            params,
            base,
            inputs,
            threads,
        )
        self.reference = base or inputs[0].weights
        self.scratch = Scratch()
        self.combine: Combine = combination(technique, params)
        self.tied = tied(self.reference)
        self.source = base or inputs[-1].weights
        self._limits: dict[tuple[str, int], Limits] = {}
        self._arcs: dict[str, tuple[float, float] | None] = {}
        self._shares: dict[int, float] = {}
        self._scanned: set[Checkpoint | None] = set()

    @cached_property
    def merged(self) -> list[tuple[str, int]]:
        """Tensors that arithmetic is done on, with their sizes: floats, once per tie; none without inputs."""
        keep_scale = self.params.get("logit_scale") == "base"
        return [
            (name, info.numel)
            for name, info in self.reference.tensors.items()
            if self.inputs
            and info.kind.is_float
            and name not in self.tied
            and not (keep_scale and is_logit_scale(name))
        ]

    @cached_property
    def copied(self) -> list[tuple[str, int]]:
        """Tensors taken over as they are: integers, and logit_scale when it stays the base's."""
        merged = {name for name, _ in self.merged}
        tensors = self.reference.tensors.items()
        return [(name, info.numel) for name, info in tensors if name not in merged and name not in self.tied]

    @cached_property
    def factors(self) -> dict[str, float]:
        """What the combined task vector of each tensor is multiplied by."""
        names = [name for name, _ in self.merged]
        if self.technique.depth:
            return depth_factors(names, self.params)
        return dict.fromkeys(names, self.params.get("scale", 1.0))

    def group(self, name: str) -> str:
        """The tensors that share thresholds and a majority sign with this one."""
        return group(name, self.params.get("granularity", "model"))

    def prepare(self) -> None:
        """Find the numbers that need a look at whole tensors first: thresholds, or the angles of a slerp."""
        if self.technique.sparsify in ("magnitude", "band"):
            for expert in self.inputs:
                self._find_limits(expert)
        if (
            self.technique.combine == "slerp"
            and len(self.inputs) == 2
            and self.params["weight"] not in (0, 1)
        ):
            self._find_arcs()
        if self.technique.space == "weights":
            self._shares = {expert.order: share(self.params, expert.order) for expert in self.inputs}

    def fill(self, span: Span, held: State | None = None) -> State:
        """The state of a block: `held` (or an empty one) with every input added in order."""
        state = self._empty(span) if held is None else held
        base = self.base_block(span, check=True) if self.technique.space == "task_vectors" else None
        for expert in self.inputs:
            x = self._block(expert.weights, span, expert.id)
            place = self._place(expert, span)
            if base is not None:
                x = np.subtract(x, base, out=self.scratch.take("delta", span.size, base.dtype))
                sparsify(self.technique, x, place, self.scratch)
            self.combine.add(state, x, place, self.scratch)
        return state

    def finish(self, span: Span, state: State, majority: int) -> tuple[np.ndarray, Election]:
        """The merged block, before it is rounded to the stored type."""
        out, election = self.combine.result(state, majority, self.scratch)
        if self.technique.space == "task_vectors":
            base = self.base_block(span)
            if self.factors[span.name] != 1:
                np.multiply(out, self.factors[span.name], out=out)
            np.subtract(0, out, out=out)  # see rules: keeps the sign of an untouched zero
            np.subtract(base, out, out=out)
        if is_logit_scale(span.name):
            np.minimum(out, self._ceiling(span), out=out)
        return out, election

    def base_block(self, span: Span, *, check: bool = False) -> np.ndarray:
        """The base's numbers, in the type sums are kept in."""
        assert self.base is not None
        return self._block(self.base, span, "the base" if check else None)

    def compute(self, name: str) -> np.dtype:
        """The type sums are kept in: float64 where the reference is float64, else float32."""
        compute = self.reference.tensors[name].kind.compute
        assert compute is not None, name
        return compute

    def arrays(self, name: str) -> dict[str, np.dtype]:
        """The arrays of a tensor's state and their types."""
        return {
            **dict.fromkeys(self.combine.floats, self.compute(name)),
            **dict.fromkeys(self.combine.counts, np.dtype(np.uint16)),
        }

    def _empty(self, span: Span) -> State:
        state = {}
        for role, dtype in self.arrays(span.name).items():
            state[role] = self.scratch.take(f"state {role}", span.size, dtype)
            state[role].fill(0)
        return state

    def _block(self, weights: Checkpoint, span: Span, who: str | None) -> np.ndarray:
        """A block as numbers; with `who`, after a look for NaN and infinity unless all of it was looked at before."""
        block = weights.read(span.name, span.start, span.stop)
        if who is not None and weights not in self._scanned and not all_finite(block):
            check_finite(weights, who)
        return block.astype(self.compute(span.name), copy=False)

    def _place(self, expert: Input, span: Span) -> Place:
        if self.technique.space == "weights":
            return Place(expert.order, self._shares[expert.order], self._arcs.get(span.name))
        if self.technique.sparsify == "random":
            scalar = self.reference.tensors[span.name].shape == ()
            key = None if scalar else tensor_key(self.params["seed"], expert.id, span.name)
            return Place(expert.order, key=key, density=self.params["density"], start=span.start)
        return Place(expert.order, limits=self._limits.get((self.group(span.name), expert.order), EVERYTHING))

    def _ceiling(self, span: Span) -> np.floating[Any]:
        """ln(100), or the reference's own value where that is higher: a model that was never clamped stays what it is."""
        own = float(self.reference.read(span.name, span.start, span.stop).max())
        return self.compute(span.name).type(max(LN_100, own))

    def _find_limits(self, expert: Input) -> None:
        groups: dict[str, list[tuple[str, int]]] = {}
        for name, numel in self.merged:
            groups.setdefault(self.group(name), []).append((name, numel))
        if self.technique.sparsify == "band":
            ranks = band_ranks(self.params["density"], self.params["outliers"])
        else:
            ranks = trim_ranks(self.params["density"])

        seen: set[Span] = set()

        def magnitudes(span: Span) -> np.ndarray:
            base = self.base_block(span, check=span not in seen)
            x = self._block(expert.weights, span, None if span in seen else expert.id)
            seen.add(span)
            delta = np.subtract(x, base, out=self.scratch.take("delta", span.size, base.dtype))
            return np.abs(delta, out=delta)

        for key, sizes in groups.items():
            self._limits[key, expert.order] = limits(
                sizes,
                magnitudes,
                ranks,
                count_frozen=self.params["count_frozen"],
                threads=self.threads,
                wide=any(self.compute(name).itemsize == 8 for name, _ in sizes),
            )
        if sum(span.size for span in seen) == sum(numel for _, numel in self.merged):
            self._scanned |= {expert.weights, self.base}

    def _find_arcs(self) -> None:
        first, second = self.inputs
        sums: dict[str, tuple[list[float], list[float], list[float]]] = {
            name: ([], [], []) for name, _ in self.merged
        }

        def work(span: Span) -> tuple[list[float], list[float], list[float]]:
            a, b = self._block(first.weights, span, first.id), self._block(second.weights, span, second.id)
            return dots(a, b, self.scratch), dots(a, a, self.scratch), dots(b, b, self.scratch)

        over = list(spans(self.merged, BLOCK))
        for span, parts in zip(over, run(work, over, self.threads)):
            for total, part in zip(sums[span.name], parts):
                total += part
        for name, numel in self.merged:
            if numel > 1:
                self._arcs[name] = arc(self.params["weight"], *(math.fsum(part) for part in sums[name]))


def tied(checkpoint: Checkpoint) -> dict[str, str]:
    """Names that are the same tensor as another one, from the metadata entry `tied` ({"alias": "name"} as JSON).

    Names that the file does not hold are nothing to merge and are left out. Raises `IncompatibleCheckpoint` when the
    entry makes no sense.
    """
    try:
        ties = json.loads(checkpoint.metadata.get("tied", "{}"))
        found = {str(alias): str(name) for alias, name in ties.items() if alias in checkpoint.tensors}
    except (ValueError, AttributeError):
        raise IncompatibleCheckpoint(
            f"{checkpoint.path}: its metadata entry 'tied' is not a JSON map of names"
        ) from None
    for alias, name in found.items():
        if name not in checkpoint.tensors or name in found:
            raise IncompatibleCheckpoint(
                f"{checkpoint.path}: {alias} is tied to {name}, which is not a tensor of its own"
            )
        if checkpoint.tensors[alias].shape != checkpoint.tensors[name].shape:
            raise IncompatibleCheckpoint(
                f"{checkpoint.path}: {alias} is tied to {name} but has another shape"
            )
    return found


def check_tied(checkpoint: Checkpoint, ties: Mapping[str, str], who: str) -> None:
    """Raise `IncompatibleCheckpoint` when tensors that must be one differ in this checkpoint."""
    for alias, name in ties.items():
        for span in spans([(alias, checkpoint.tensors[alias].numel)], 1 << 20):
            alike = checkpoint.tensors[alias].dtype == checkpoint.tensors[name].dtype and np.array_equal(
                checkpoint.raw(alias, span.start, span.stop), checkpoint.raw(name, span.start, span.stop)
            )
            if not alike:
                raise IncompatibleCheckpoint(
                    f"{who}: {alias} and {name} are tied in the base but differ here"
                )
