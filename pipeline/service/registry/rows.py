"""What an entry of a service's log changes in MLflow's registry, as rows for the outbox.

A version is an arrival at a place of the accepted sequence with the bytes that are deployed there. Aliases: `t-3` is the version of time
step 3, `champion` what is served, `challenger` the newest accepted version while another one is served. Where a removal changed the
bytes of a time step, its alias goes until they are made again, which is then another version. Versions stay; the log says what became
of their arrivals.

Invariant: rows are a function of the entry and of the states before and after it, so they are the same however often they are made.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from merge_service.live import Accepted, Arrival, Entry, State, Verdict, held_by_start
from merge_service.timelines import Strategy
from pipeline.tracking.outbox import Row
from pipeline.tracking.rows.names import metric_name
from pipeline.tracking.rows.rows import Metrics, Rows, Run

SERVICE = "service"
"""The key of the one run of a service, which has KA, ZS and GM over t."""
CHAMPION, CHALLENGER = "champion", "challenger"
ABOUT = "The versions of a live merge service; see the tags of each. The service's log says what became of every arrival."
_LONGEST = 500
"""Characters of a tag that comes from a sender."""


@dataclass(frozen=True)
class Registered:
    """Makes the rows of one service. `model` is the registered model; `log` names the log, by the sha256 of its first entry."""

    model: str
    log: str
    strategy: Strategy

    def of(self, before: State, entry: Entry, after: State) -> list[Row]:
        """The rows of one entry, in the order in which they must arrive."""
        rows = Rows(self.log)
        found = []
        if entry.seq == 1:
            tags = {"kind": SERVICE, "service": after.name, "base_sha256": after.base.sha256}
            found.append(rows.run(Run(SERVICE, None, after.name, tags), entry.time_ms))
        if before.sequence is after.sequence and before.served == after.served:
            return found
        known = {key_of(one) for one in before.sequence}
        for t, one in enumerate(after.sequence, 1):
            if one.version.sha256 and key_of(one) not in known:
                found += self._version(rows, entry, after, t)
        were, are = aliases(before), aliases(after)
        for alias in [*are, *(one for one in were if one not in are)]:
            if were.get(alias) != are.get(alias):
                found.append(rows.alias(are.get(alias), entry.time_ms, self.model, alias))
        return found

    def _version(self, rows: Rows, entry: Entry, state: State, t: int) -> Iterator[Row]:
        """One version: its model, which names where the weights are, its registration, and its scores."""
        place = state.sequence[t - 1]
        arrival, key, name = state.arrivals[place.arrival], key_of(place), f"t{t}-{place.arrival}"
        tags = {one: value[:_LONGEST] for one, value in self._tags(entry, state, t, arrival).items() if value}
        manifest = {
            "service": state.name, "fingerprint": place.version.fingerprint, "t": t, "task": place.task, "files": {},
            "sha256": place.version.sha256,
            "weights": f"the service {state.name} keeps them; their sha256 is {place.version.sha256}",
        }  # fmt: skip
        body = {
            "name": name, "type": "merged", "step": t, "params": {}, "tags": tags, "store": ".", "files": [],
            "manifest": manifest,
        }  # fmt: skip
        yield rows.model(key, SERVICE, entry.time_ms, body)
        note = f"t = {t} of the service {state.name}: it came with {arrival.id} ({place.task})."
        version = {"name": self.model, "tags": tags, "note": note, "about": ABOUT}
        yield rows.register(key, SERVICE, entry.time_ms, version, each=True)
        metrics = Metrics(entry.time_ms)
        for metric in ("ka", "zs", "gm"):
            metrics.add(metric, getattr(place.scored, metric, None), t)
        if metrics.values:
            yield rows.log(SERVICE, key, metrics, key)

    def _tags(self, entry: Entry, state: State, t: int, arrival: Arrival) -> Mapping[str, str]:
        place = state.sequence[t - 1]
        held = held_by_start(state, self.strategy, arrival)
        return {
            "service": state.name, "t": str(t), "task": place.task, "arrival": arrival.id, "seq": str(entry.seq),
            "sha256": place.version.sha256, "expert_sha256": arrival.sha256, "log_head": entry.sha256,
            "owner": arrival.owner, "license": arrival.license,
            "lineage.init": arrival.init, "lineage.held_by_start": " ".join(held), "lineage.chain": place.chain,
            **{metric_name("gate", one.gate): _said(one) for one in arrival.verdicts},
        }  # fmt: skip


def key_of(place: Accepted) -> str:
    """The key of a version in the rows; that of a place whose bytes are not known ends with a slash."""
    return _key(place.arrival, place.version.sha256)


def aliases(state: State) -> dict[str, str]:
    """Which version each alias points to; the base has no version."""
    found = {f"t-{t}": key_of(one) for t, one in enumerate(state.sequence, 1) if one.version.sha256}
    served = state.served
    if served.arrival is not None:
        found[CHAMPION] = _key(served.arrival, served.sha256)
    newest: Any = found.get(f"t-{state.t}")
    if newest and newest != found.get(CHAMPION):
        found[CHALLENGER] = newest
    return found


def _key(arrival: str, sha256: str) -> str:
    return f"{arrival}/{sha256[:16]}"


def _said(one: Verdict) -> str:
    return f"{one.verdict} {one.difference:+.4f} ({one.low:+.4f} to {one.high:+.4f}), margin {one.margin:g}"
