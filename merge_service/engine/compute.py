"""One span of a merge, from the inputs' blocks to the stored block.

The fused loops process a span if they can read all inputs. Otherwise the array definitions of the rules do, on the host or on a
device.

Invariant: both give the same bits.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from merge_service.anatomy.structure import LN_100
from merge_service.blocks.device import Device, Host
from merge_service.blocks.questions import Findings
from merge_service.blocks.spans import GRAIN, Scratch, Span, spans
from merge_service.engine.fused import Fused, Outcome
from merge_service.engine.places import Places
from merge_service.engine.reader import Reader
from merge_service.engine.task import MergeTask
from merge_service.errors import TechniqueError
from merge_service.techniques.place import Election, State

_FULL = "the device has no room for {} elements of {} of {} experts; end what else uses it, or leave the device out"


def site_of(device: str | None) -> Host:
    """The block storage of a device; the host without one. Raises TechniqueError for a device that this machine does not have."""
    return Device(device) if device else Host()


class Compute:
    """Computes spans of a task from its complete findings."""

    def __init__(self, task: MergeTask, found: Findings, site: Host) -> None:
        self.task, self.found, self.site = task, found, site
        self.reader, self.places, self.scratch = Reader(task), Places(task, found), Scratch()
        self._fused = None if isinstance(site, Device) else Fused.of(task)
        self._fits = site.block

    def span(self, span: Span, held: State | None, *, majority: int, finish: bool, sums: int) -> Outcome:
        """One span of the result; `held`, a state to continue, is changed in place. `sums` as in `Fused.run`. Raises
        NonFiniteCheckpoint."""
        if span.name in self.task.statistics:
            outcome = self._averaged(span, held, finish)
        elif self._fused is not None and self._fused.fits(span.name):
            outcome = self._fused.run(
                span, self.places.all(span), majority=majority, held=held, finish=finish,
                sums=0 if self.task.anatomy.is_scale(span.name) else sums,
            )  # fmt: skip
            self.reader.refuse(outcome.bad)
        else:
            outcome = self._in_parts(span, held, majority, finish)
        return dataclasses.replace(outcome, block=self.clamped(span, outcome.block)) if finish else outcome

    def clamped(self, span: Span, block: np.ndarray) -> np.ndarray:
        """The block with logit_scale at most ln(100), as in CLIP, unless it is unclamped; `block` itself is not changed.

        A variance below zero is rounding (after an expert was taken out of a mean) and becomes zero.
        """
        if span.name.endswith("running_var"):
            return np.maximum(block, 0)
        if self.task.anatomy.is_scale(span.name) and self.task.params.get("logit_scale") != "unclamped":
            return np.minimum(block, self._ceiling(span))
        return block

    def empty(self, span: Span) -> State:
        """The state of a span before the first expert."""
        return {role: np.zeros(span.size, dtype) for role, dtype in self.task.arrays(span.name).items()}

    def _averaged(self, span: Span, held: State | None, finish: bool) -> Outcome:
        state, rule, places = (
            self.empty(span) if held is None else held,
            self.task.mean,
            self.places.all(span),
        )
        for expert in self.task.inputs:
            rule.add(np, state, self.reader.numbers(expert, span), places[expert.order])
        block, election = rule.result(np, state, 1)
        return Outcome(np.array(block) if finish else np.empty(0), election, [], ())

    def _in_parts(self, span: Span, held: State | None, majority: int, finish: bool) -> Outcome:
        """The span in parts that fit the site: a part that does not fit is halved, and so are all later ones of its size."""
        if not self.site.full:
            return self._by_definition(span, held, majority, finish)
        parts = []
        for part in spans([(span.name, span.stop)], self._fits, span.start):
            own = _cut(held, span, part)
            try:
                parts.append(self._by_definition(part, own, majority, finish))
            except self.site.full as error:
                if part.size <= GRAIN:
                    raise TechniqueError(_FULL.format(part.size, part.name, len(self.task.inputs))) from error
                self.site.clear()
                self._fits = part.size // 2
                own = _cut(held, span, part)
                parts.append(self._in_parts(part, own, majority, finish))
            for role, array in (own or {}).items():
                held[role][part.start - span.start : part.stop - span.start] = array  # type: ignore[index]
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _by_definition(self, span: Span, held: State | None, majority: int, finish: bool) -> Outcome:
        """The span by the array definitions of the rules, on the host or a device."""
        task, site, xp, places = self.task, self.site, self.site.xp, self.places.all(span)
        rule: Any = task.rule
        compute, rows, finite = task.compute(span.name), task.cover(span), dict[int, Any]()
        cut = slice(span.start - rows.start, span.stop - rows.start)
        with site.turn():
            state = {role: site.put(array) for role, array in (held or self.empty(span)).items()}
            base = None
            if task.moves:
                assert task.base is not None
                base = site.read(task.base, rows, compute)
                finite[0] = site.finite(base)
            for expert in task.inputs:
                x = site.read(expert.weights, rows, compute)
                finite[expert.order] = site.finite(x)
                if base is not None:
                    x = task.thin.apply(xp, x - base, self.places.of(expert, rows))
                rule.add(xp, state, x[cut], places[expert.order])
            fine = site.settled([*finite.values()])
            self.reader.refuse([order for order, one in zip(finite, fine, strict=True) if not one])
            if held is not None:
                held.update((role, site.fetch(array)) for role, array in state.items())
            if not finish:
                return Outcome(np.empty(0), Election(), [], ())
            out, election = rule.result_at(xp, state, majority, places[task.orders[-1]])
            if base is not None:
                factor = task.factors[span.name]
                moved = out * factor if factor != 1 else out
                out = base[cut] - (0 - moved)  # see rules: keeps the sign of an untouched zero
            return Outcome(site.fetch(out), election, [], ())

    def _ceiling(self, span: Span) -> np.floating[Any]:
        """ln(100), or the reference's own value if that is higher: a model that was never clamped stays as it is."""
        own = float(self.task.reference.read(span.name, span.start, span.stop).max())
        return self.task.compute(span.name).type(max(LN_100, own))


def _cut(held: State | None, span: Span, part: Span) -> State | None:
    """A copy of a part of a span's state."""
    where = slice(part.start - span.start, part.stop - span.start)
    return None if held is None else {role: array[where].copy() for role, array in held.items()}


def _joined(parts: Sequence[Outcome]) -> Outcome:
    """One outcome of the parts of a span, in order."""
    votes = [part.election for part in parts]
    election = Election(sum(vote.balance for vote in votes), any(vote.contested for vote in votes))
    return Outcome(np.concatenate([part.block for part in parts]), election, [], ())
