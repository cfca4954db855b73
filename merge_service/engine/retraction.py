"""Taking one expert out of a streaming state: the same walk over the blocks, with `remove` in the place of `add`.

Exact in real arithmetic, for rules whose state is a sum or a mean. In floating point the last digits keep a trace of the
expert (of the order of its magnitude times the rounding of a float), and an election that is all but tied may fall the
other way; merging those that stay anew has neither.

Invariant: a state is only ever reduced by the bytes that went into it, as far as it records their sha256.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge_service.blocks.spans import Span
from merge_service.checkpoints.checkpoint import Checkpoint, sha256_of
from merge_service.checkpoints.ties import Ties
from merge_service.engine.blend import Blend, Input
from merge_service.engine.stream_state import StreamState
from merge_service.errors import TechniqueError
from merge_service.techniques.definition import Technique
from merge_service.techniques.place import Place
from merge_service.techniques.rules import leaving_share


class Retraction(Blend):
    """A blend that takes its one input out of a held state of `count` experts; its `params` are those of who stays."""

    def __init__(
        self,
        technique: Technique,
        params: Mapping[str, Any],
        base: Checkpoint,
        leaving: Input,
        count: int,
        threads: int,
        ties: Ties,
    ) -> None:
        super().__init__(technique, without(params, leaving.order), base, [leaving], threads, ties=ties)
        if not hasattr(self.combine, "remove"):
            raise TechniqueError(
                f"{technique.name}{_consensus(params)}: an expert cannot be taken out of its state, because what others would "
                "have come to without it is not kept. Merge the experts that stay anew"
            )
        if count == 1:
            raise TechniqueError(
                f"{leaving.id!r} is the only expert of the state; without it there is only the base: start again without a state"
            )
        weighted = technique.space == "weights"
        self._share = leaving_share(params, leaving.order, count) if weighted else 1 / (count - 1)
        self.combine = _Removing(self.combine)
        self._mean = _Removing(self._mean)
        self._fused = None
        self._uniform = 1 / (count - 1)

    def place(self, expert: Input, span: Span) -> Place:
        """As of a `Blend`, with the expert's weight over that of those who stay."""
        if span.name in self.statistics:
            return Place(expert.order, self._uniform)
        if self.technique.space == "weights":
            return Place(expert.order, self._share)
        return dataclasses.replace(super().place(expert, span), share=self._share)


class _Removing:
    """A rule whose `add` is another's `remove`."""

    kernel: int | None = None

    def __init__(self, rule: Any) -> None:
        self.floats: tuple[str, ...] = rule.floats
        self.words: tuple[str, ...] = rule.words
        self.add, self.result = rule.remove, rule.result


def without(params: Mapping[str, Any], order: int) -> dict[str, Any]:
    """The parameters of those who stay: explicit weights lose the entry of number `order`."""
    weights = params.get("weights")
    return dict(params) if weights is None else {**params, "weights": weights[: order - 1] + weights[order:]}


def check_bytes(held: StreamState, order: int, expert: Path | str, sha256: str | None) -> tuple[str, ...]:
    """Raise `TechniqueError` unless `expert` is what went into the state; a note if the state does not say what did."""
    entry = held.inputs[order - 1]
    if "sha256" not in entry:
        return (
            f"{entry['id']}: the state does not record its sha256, so it was not checked that these are its bytes",
        )
    found = sha256 or sha256_of(expert)
    if found != entry["sha256"]:
        raise TechniqueError(
            f"{expert} is not the expert {entry['id']!r} that is in {held.checkpoint.path}: its sha256 is {found}, "
            f"{entry['sha256']} went in; give the same file, or merge the experts that stay anew"
        )
    return ()


def _consensus(params: Mapping[str, Any]) -> str:
    return f" with consensus {params['consensus']}" if "consensus" in params else ""
