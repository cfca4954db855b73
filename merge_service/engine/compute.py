"""One span of a merge, from the inputs' blocks to the block that is stored.

Spans are worked through by the fused loops where these can read all inputs, else by the array definitions of the rules, on the host or
on a device.

Invariant: both ways give the same bits.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from merge_service.anatomy.structure import LN_100, is_logit_scale
from merge_service.blocks.device import Device, Host
from merge_service.blocks.questions import Findings
from merge_service.blocks.spans import Scratch, Span
from merge_service.engine.fused import Fused, Outcome
from merge_service.engine.places import Places
from merge_service.engine.reader import Reader
from merge_service.engine.task import MergeTask
from merge_service.techniques.place import Election, Place, State


def site_of(device: str | None) -> Host:
    """Where blocks are worked on. Raises TechniqueError for a device that this machine does not have."""
    return Device(device) if device else Host()


class Compute:
    """Makes spans of a task whose `found` numbers are complete."""

    def __init__(self, task: MergeTask, found: Findings, site: Host) -> None:
        self.task, self.found, self.site = task, found, site
        self.reader, self.places, self.scratch = Reader(task), Places(task, found), Scratch()
        self._fused = None if isinstance(site, Device) else Fused.of(task)

    def span(self, span: Span, held: State | None, *, majority: int, finish: bool, squares: bool) -> Outcome:
        """One span of the result; `held`, a state to be continued, is changed in place. Raises for numbers that are not finite."""
        places = self.places.all(span)
        if span.name in self.task.statistics:
            outcome = self._averaged(span, places, held, finish)
        elif self._fused is not None and self._fused.fits(span.name):
            outcome = self._fused.run(
                span, places, majority=majority, held=held, finish=finish,
                squares=squares and not is_logit_scale(span.name),
            )  # fmt: skip
            self.reader.refuse(outcome.bad)
        else:
            outcome = self._by_definition(span, places, held, majority, finish)
        return dataclasses.replace(outcome, block=self.clamped(span, outcome.block)) if finish else outcome

    def clamped(self, span: Span, block: np.ndarray) -> np.ndarray:
        """The block with logit_scale at ln(100) at most as CLIP has it, unless that is not wanted; `block` stays as it is.

        A variance below zero is rounding (where an expert was taken out of a mean) and becomes zero.
        """
        if span.name.endswith("running_var"):
            return np.maximum(block, 0)
        if is_logit_scale(span.name) and self.task.params.get("logit_scale") != "unclamped":
            return np.minimum(block, self._ceiling(span))
        return block

    def empty(self, span: Span) -> State:
        """The state of a span that has seen no expert."""
        return {role: np.zeros(span.size, dtype) for role, dtype in self.task.arrays(span.name).items()}

    def _averaged(self, span: Span, places: Mapping[int, Place], held: State | None, finish: bool) -> Outcome:
        state, rule = self.empty(span) if held is None else held, self.task.mean
        for expert in self.task.inputs:
            rule.add(np, state, self.reader.numbers(expert, span), places[expert.order])
        block, election = rule.result(np, state, 1)
        return Outcome(np.array(block) if finish else np.empty(0), election, [], ())

    def _by_definition(
        self, span: Span, places: Mapping[int, Place], held: State | None, majority: int, finish: bool
    ) -> Outcome:
        """The span by the array definitions of the rules, wherever blocks are worked on."""
        task, site, xp = self.task, self.site, self.site.xp
        rule: Any = task.rule
        compute, rows, finite = task.compute(span.name), task.cover(span), []
        cut = slice(span.start - rows.start, span.stop - rows.start)
        with site.turn():
            state = {role: site.put(array) for role, array in (held or self.empty(span)).items()}
            base = None
            if task.moves:
                assert task.base is not None
                base = site.read(task.base, rows, compute, "base")
                finite.append((0, site.finite(base)))
            for expert in task.inputs:
                x = site.read(expert.weights, rows, compute, f"expert {expert.order}")
                finite.append((expert.order, site.finite(x)))
                if base is not None:
                    x = task.thin.apply(xp, x - base, self.places.of(expert, rows))
                rule.add(xp, state, x[cut], places[expert.order])
            self.reader.refuse([order for order, fine in finite if not bool(fine)])
            if held is not None:
                held.update((role, site.fetch(array)) for role, array in state.items())
            if not finish:
                return Outcome(np.empty(0), Election(), [], ())
            out, election = rule.result(xp, state, majority)
            if base is not None:
                factor = task.factors[span.name]
                moved = out * factor if factor != 1 else out
                out = base[cut] - (0 - moved)  # see rules: keeps the sign of an untouched zero
            return Outcome(site.fetch(out), election, [], ())

    def _ceiling(self, span: Span) -> np.floating[Any]:
        """ln(100), or the reference's own value where that is higher: a model that was never clamped stays what it is."""
        own = float(self.task.reference.read(span.name, span.start, span.stop).max())
        return self.task.compute(span.name).type(max(LN_100, own))
