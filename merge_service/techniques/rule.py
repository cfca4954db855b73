"""What a rule is: how experts come together, in a span or in a whole tensor, and what must be found first.

A rule is made of a technique's parameters. It keeps a state of a few arrays, takes one expert at a time in canonical order, and turns
the state into weights or a task vector. A merge of N experts IS `add` N times and then `result`, so streaming equals batch bit for bit.
"""

from collections.abc import Mapping
from typing import Any

from merge_service.blocks.questions import Ask, Findings
from merge_service.techniques.place import Array, Election, Place, State, View

Params = Mapping[str, Any]


class Combining:
    """What rules of both kinds say of themselves.

    `floats` and `words` (uint32) name the state's arrays, which start at zero. `kernel` is the fused loop that does the same, None if
    there is none. `whole`: tensors are made whole, not span by span. `averages`: it is a mean of weights already, so that running
    statistics need no other rule. `masks_scalars`: its draws also concern tensors of one number without a shape.
    """

    floats: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    kernel: str | None = None
    whole = False
    averages = False
    masks_scalars = False

    def __init__(self, params: Params) -> None:
        self.params = params

    def prepare(self, ask: Ask, view: View, found: Findings) -> Findings:
        """What is found already, and the numbers of whole tensors that this rule needs."""
        return found


class Rule(Combining):
    """How experts come together in a span.

    A rule from whose state an expert can be taken out again has a method `remove` like `add`; there `share` is its weight over that of
    those who stay.
    """

    def add(self, xp: Any, state: State, x: Array, place: Place) -> None:
        """Take one expert's block (weights, or a thinned-out task vector) into the state; `x` stays as it is."""
        raise NotImplementedError

    def result(self, xp: Any, state: State, majority: int) -> tuple[Array, Election]:
        """The combined block. `majority` is the sign for elements whose vote is a tie."""
        raise NotImplementedError
