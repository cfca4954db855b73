"""What is asked of an expert before it may be merged: format, provenance, geometry, and its score alone, in this order.

Invariant: the first stage that fails decides, its reason begins with the stage's name, and an operator's release sets aside only the
reasons that it names.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from merge_service.errors import CheckpointError
from merge_service.live import (
    Accepted,
    Admitted,
    Arrival,
    Following,
    Held,
    Medians,
    Quarantined,
    State,
    Verdict,
    norms_out_of_bounds,
    score,
    solo,
)
from pipeline.service.config import ServiceConfig
from pipeline.service.experts import Experts, reason_of
from pipeline.service.scoring import Scorer
from pipeline.store.artifact import Record

MOST_STALE = 20
"""Where experts start from merges and `admission.max_staleness` says nothing else."""
BASE, FOREIGN = "base", "foreign"
Found = Admitted | Quarantined | Held


@dataclass(frozen=True)
class Screening:
    """What screens experts."""

    config: ServiceConfig
    experts: Experts
    scorer: Scorer
    usual: Following[dict[str, Medians]] = field(default_factory=lambda: Following(_no_medians, _accepted))

    def screen(self, state: State, arrival: Arrival) -> Found:
        """What becomes of an arrival. Raises what an evaluation raises."""
        try:
            record = self.experts.admit(arrival.sha256)
        except CheckpointError as error:
            return Quarantined((reason_of(error),), self.experts.public(error))
        return (
            self._provenance(state, arrival)
            or self._geometry(state, arrival, record)
            or self._solo(state, arrival, record)
        )

    def _provenance(self, state: State, arrival: Arrival) -> Found | None:
        rules, wrong = self.config.admission, list[tuple[str, str]]()
        if rules.licenses and arrival.license not in rules.licenses:
            wrong.append(
                (
                    "provenance.license",
                    f"the licence is {arrival.license or 'not given'}; accepted are {', '.join(rules.licenses)}",
                )
            )
        if not arrival.owner:
            wrong.append(("provenance.owner", "the owner is not given"))
        kind = start_of(state, arrival)
        if kind == FOREIGN and rules.foreign_init == "quarantine":
            wrong.append(
                ("provenance.foreign_init", f"the start {arrival.init[:16]} is not one of this service")
            )
        most, start = self._most_stale(), arrival.init_seq
        if most is not None and start is not None:
            since = sum((state.arrivals[one.arrival].accepted_seq or 0) > start for one in state.sequence)
            if since > most:
                wrong.append(
                    (
                        "provenance.stale",
                        f"{since} experts were accepted since its start; at most {most} may be",
                    )
                )
        left = [one for one in wrong if one[0] not in arrival.waived]
        return (
            Quarantined(tuple(name for name, _ in left), "; ".join(text for _, text in left))
            if left
            else None
        )

    def _most_stale(self) -> int | None:
        """How many experts may be accepted between the start of one and its arrival; None for any number."""
        stated = self.config.admission.max_staleness
        return MOST_STALE if stated is None and self.config.timeline.init != "base" else stated

    def _geometry(self, state: State, arrival: Arrival, record: Record) -> Found | None:
        figures, bounds = figures_of(record), self.config.bounds
        if record.result["unchanged"] == 1.0:
            return self._unless_waived(arrival, "geometry.unmoved", "it is the base itself", figures)
        twin = self._copy_of(state, arrival)
        if twin is not None:
            return self._unless_waived(arrival, "geometry.copy", f"it is a copy of {twin}", figures)
        kind = start_of(state, arrival)
        usual = self.usual.of(state)[kind]
        reference = usual.found() if usual.count >= bounds.fewest else self.config.gates.geometry.reference
        if not reference and "geometry.no_reference" not in arrival.waived:
            return Held(
                ("geometry.no_reference",),
                f"only {usual.count} experts of this kind of start are accepted and {bounds.fewest} are needed to say what is usual; "
                "state gates.geometry.reference, or release it",
                figures,
            )
        wrong = norms_out_of_bounds(figures, reference, bounds)
        left = tuple(one for one in wrong if one not in arrival.waived)
        if not left:
            return None
        name = left[0].removeprefix("geometry.")
        return Quarantined(
            left,
            f"{name} is {figures[name]:.4g}, and {reference[name]:.4g} is usual: it must be within {bounds.low:g} and "
            f"{bounds.high:g} times that",
            figures,
        )

    def _solo(self, state: State, arrival: Arrival, record: Record) -> Found:
        figures, names = figures_of(record), self.scorer.sets.of([arrival.task])
        if not names:
            if self.config.gates.solo.required and "solo.no_data" not in arrival.waived:
                return Held(("solo.no_data",), f"no data of the task {arrival.task} is registered", figures)
            return Admitted(record.fingerprint, figures)
        expert = self.scorer.judged(record.fingerprint, names)
        start = self.scorer.judged(*self._start(state, arrival, names))
        verdicts: list[Verdict] = [
            solo(name, expert.answers[name], start.answers[name], self.config.margins.solo) for name in names
        ]
        own = {name: score(expert.answers[name]) for name in names}
        failed = [one for one in verdicts if one.verdict == "fail"]
        if failed and "solo.no_gain" not in arrival.waived:
            one = failed[0]
            return Quarantined(
                ("solo.no_gain",),
                f"alone on {one.gate.removeprefix('solo.')} it gains {one.difference:+.3f} ({one.low:+.3f} to {one.high:+.3f}) over "
                f"its start; it must gain {one.margin:g}, and surely something",
                figures,
            )
        return Admitted(record.fingerprint, figures, tuple(verdicts), own)

    def _start(self, state: State, arrival: Arrival, names: Sequence[str]) -> tuple[str, Sequence[str]]:
        """The fingerprint of the weights that training started from, and the datasets to score them on; the base if unknown."""
        every = self.scorer.sets.every
        t = state.index.starts.get(arrival.init)
        if t is not None:
            return state.version(t).fingerprint, every
        same = map(state.arrivals.__getitem__, state.index.by_digest.get(arrival.init, ()))
        newest = next((one for one in same if one.status == "accepted"), None)  # itself, with init latest
        return newest.expert if newest else state.base.fingerprint, every

    def _copy_of(self, state: State, arrival: Arrival) -> str | None:
        """An accepted arrival, or one in the lane, whose task vector this one has."""
        there, index = state.index.there, state.index
        alike = self.experts.alike(arrival.sha256, set(there.values()), self.config.bounds.copy)
        names = (name for sha256 in (arrival.sha256, *alike) for name in index.by_digest[sha256])
        own = (arrival.id, arrival.replaces)
        return next((name for name in names if name in there and name not in own), None)

    @staticmethod
    def _unless_waived(
        arrival: Arrival, reason: str, text: str, figures: dict[str, float]
    ) -> Quarantined | None:
        return None if reason in arrival.waived else Quarantined((reason,), text, figures)


def _no_medians() -> dict[str, Medians]:
    return {kind: Medians() for kind in ("base", "merged", FOREIGN)}


def _accepted(kept: dict[str, Medians], state: State, one: Accepted) -> None:
    """Count the norms of an accepted expert among those of its kind of start."""
    arrival = state.arrivals[one.arrival]
    kept[start_of(state, arrival)].add(arrival.figures)


def start_of(state: State, arrival: Arrival) -> Literal["base", "merged", "foreign"]:
    """Which kind of weights training started from: the base, a version of this service (by ticket), or others."""
    if arrival.init in (BASE, state.base.sha256):
        return "base"
    return "merged" if arrival.init_seq is not None else "foreign"


def figures_of(record: Record) -> dict[str, float]:
    """The figures of an expert that its arrival keeps."""
    return {**record.result["norms"], "unchanged": record.result["unchanged"]}
