"""The merge service: takes experts in any order, and serves merged models in time-step order.

Plain Python over paths; an actor only wraps it. Experts may be trained anywhere: on arrival each is checked against the base and
for non-finite numbers, before any merge uses it.

Invariant: everything held is a cache. The same experts, in any order and any number of times, give a fresh service the same
bytes, which are those of a study. A call that fails leaves the service unchanged.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from merge_service.checkpoints.admission import check_finite
from merge_service.checkpoints.checkpoint import CONFIG_FILE, locate, sha256_of
from merge_service.engine.assembly import Execution
from merge_service.errors import ConflictingArrival
from merge_service.merging.combine import combine
from merge_service.merging.derivation import Derivation, Member, Operator, Out, PathLike, Rules, Way
from merge_service.merging.intake import check_inputs, open_all
from merge_service.merging.report import MergeReport
from merge_service.merging.stream import StreamCache
from merge_service.timelines import time as timeline
from merge_service.timelines.time import Base, Expert, Merged, Strategy, Weights


@dataclass(frozen=True)
class Arrival:
    """An admitted expert. `id` names it in messages and seeds its random masks."""

    t: int
    id: str
    path: Path
    sha256: str


@dataclass(frozen=True)
class Moment:
    """One complete time step: the expert, and the merges that it made possible."""

    t: int
    expert: Arrival
    merges: tuple[tuple[Merged, MergeReport], ...]


class MergeService:
    """One strategy over one stream. Use it as a context manager, or `close` it, to free its scratch space.

    `any_base` accepts experts that cannot have been trained from the base.
    """

    def __init__(
        self,
        strategy: Strategy,
        base: PathLike,
        scratch: PathLike,
        *,
        threads: int = 1,
        any_base: bool = False,
    ) -> None:
        timeline.check(strategy)
        timeline.check_served(strategy)
        self.strategy, self.base = strategy, Path(base)
        self._base_sha256 = sha256_of(self.base)
        Path(scratch).mkdir(parents=True, exist_ok=True)
        self._directory = Path(tempfile.mkdtemp(prefix="merged-", dir=scratch))
        self._rules = Rules(any_base)
        self._execution = Execution(threads)
        self._states = StreamCache(scratch, Way(self._execution))
        self._made = 0
        self._arrivals: dict[int, Arrival] = {}
        self._merged: dict[Merged, Member] = {}
        self._history: list[Moment] = []

    def arrive(
        self, t: int, expert: PathLike, *, expert_id: str | None = None, sha256: str | None = None
    ) -> list[Moment]:
        """Add the expert of task `t` (1-based) and complete the time steps that become possible; returns these.

        Time steps complete in order: an early expert waits for those before it. The same expert again does nothing. Raises
        `ConflictingArrival` for other bytes at the same `t` or under the same id, a `CheckpointError` for an expert that cannot
        be merged, and what writing a merge raises; the service is then unchanged.
        """
        if t < 1:
            raise ValueError(f"tasks are numbered from 1, not {t}")
        arrival = Arrival(t, expert_id or f"t{t}", Path(expert), sha256 or sha256_of(expert))
        if self._is_known(arrival):
            return []
        self._admit(arrival)
        with self._all_or_nothing():
            return self._take(arrival)

    def replace(
        self, t: int, expert: PathLike, *, expert_id: str | None = None, sha256: str | None = None
    ) -> list[Moment]:
        """Replace the expert of task `t`, by default under the same id. Every merge it is part of is made again, from the
        experts.

        Returns the time steps that completed again. Experts that were trained from a changed merge are not trained again; whether
        they should be is the caller's decision. Raises what `remove` and `arrive` raise; the service is then unchanged.
        """
        if t not in self._arrivals:
            raise LookupError(f"no expert of task {t} has arrived, so there is none to replace")
        arrival = Arrival(t, expert_id or self._arrivals[t].id, Path(expert), sha256 or sha256_of(expert))
        for other in self._arrivals.values():
            if other.t != t and other.id == arrival.id:
                raise ConflictingArrival(
                    f"{arrival.id} is already the expert of task {other.t}; give it its own id"
                )
        self._admit(arrival)
        with self._all_or_nothing():
            self._forget(t)
            return self._take(arrival)

    def remove(self, t: int) -> None:
        """Remove the expert of task `t`, as if it had never arrived: later experts wait for another in its place.

        Merged models from time step `t` on are deleted. Raises `LookupError` if there is no such expert.
        """
        if t not in self._arrivals:
            raise LookupError(f"no expert of task {t} has arrived, so there is none to remove")
        with self._all_or_nothing():
            self._forget(t)

    def initial(self, t: int) -> Path:
        """The weights that training on task `t` starts from. Raises `LookupError` until the experts before it have arrived."""
        return self._path(timeline.initial(self.strategy, t))

    def deployed(self, t: int | None = None) -> Path:
        """The weights served after task `t`, by default after the newest complete one. Raises `LookupError` as `initial` does."""
        return self._path(timeline.deployed(self.strategy, len(self._history) if t is None else t))

    def history(self) -> tuple[Moment, ...]:
        """The complete time steps, in order."""
        return tuple(self._history)

    def waiting(self) -> tuple[Arrival, ...]:
        """Experts that arrived before one they depend on."""
        return tuple(self._arrivals[t] for t in sorted(self._arrivals) if t > len(self._history))

    def close(self) -> None:
        """Delete the caches; the experts and the base belong to the caller and stay."""
        self._states.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> "MergeService":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Keep all changes made inside, or none if it fails; then delete files that are no longer in use."""
        before = (dict(self._arrivals), dict(self._merged), list(self._history))
        kept = before[1]
        try:
            yield
            kept = self._merged
        except BaseException:
            self._arrivals, self._merged, self._history = before
            raise
        finally:
            still = {member.path.name for member in kept.values()}
            for path in [path for path in self._directory.iterdir() if path.name not in still]:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def _take(self, arrival: Arrival) -> list[Moment]:
        """Record an admitted expert and complete the time steps that become possible."""
        self._arrivals[arrival.t] = arrival
        done = []
        while len(self._history) + 1 in self._arrivals:
            done.append(self._complete(self._arrivals[len(self._history) + 1]))
        return done

    def _forget(self, t: int) -> None:
        del self._arrivals[t], self._history[t - 1 :]
        self._merged = {merged: member for merged, member in self._merged.items() if merged.t < t}

    def _is_known(self, arrival: Arrival) -> bool:
        for known in self._arrivals.values():
            if known.t != arrival.t and known.id != arrival.id:
                continue
            if (known.t, known.id, known.sha256) == (arrival.t, arrival.id, arrival.sha256):
                return True
            raise ConflictingArrival(
                f"{arrival.id} (t={arrival.t}) arrived with sha256 {arrival.sha256}, but {known.id} (t={known.t}) is "
                f"already here with {known.sha256}. If both come from the same recipe and seed, training was not "
                "deterministic; otherwise give the expert its own id and time step"
            )
        return False

    def _admit(self, arrival: Arrival) -> None:
        who = arrival.id if arrival.id == f"t{arrival.t}" else f"{arrival.id} (t={arrival.t})"
        with contextlib.ExitStack() as stack:
            base, (expert,) = open_all(stack, self.base, [arrival.path], self._rules)
            check_inputs(base, [expert], [who], self._rules)
            check_finite(expert, who)

    def _complete(self, arrival: Arrival) -> Moment:
        made = [(merge.result, self._make(merge)) for merge in timeline.derivations(self.strategy, arrival.t)]
        moment = Moment(arrival.t, arrival, tuple(made))
        self._history.append(moment)
        return moment

    def _make(self, merge: timeline.Merge) -> MergeReport:
        merged = merge.result
        operator = Operator.of(merge.technique, merge.params, merged.form)
        self._made += 1  # a new name: earlier files stay until the call has succeeded
        name = f"{merged.policy}-{merged.t}-{self._made}{'' if self._as_directory() else '.safetensors'}"
        out = self._directory / name
        ids = merge.ids({t: arrival.id for t, arrival in self._arrivals.items()})
        members = tuple(replace(self._member(one), id=name) for one, name in zip(merge.members, ids))
        derivation = Derivation(operator, self.base, members)
        if merged.form == "merge":
            report = self._states.merge(derivation, self._base_sha256, out, self._rules)
        else:
            report = combine(derivation, Out(out, hashed=True), Way(self._execution, self._rules))
        self._merged[merged] = Member(out.name, out, report.sha256[locate(out).name])
        return report

    def _as_directory(self) -> bool:
        return (self.base / CONFIG_FILE).is_file()

    def _path(self, weights: Weights) -> Path:
        return self._member(weights).path

    def _member(self, weights: Weights) -> Member:
        if isinstance(weights, Base):
            return Member("base", self.base, self._base_sha256)
        if isinstance(weights, Expert) and weights.t in self._arrivals:
            arrival = self._arrivals[weights.t]
            return Member(arrival.id, arrival.path, arrival.sha256)
        if isinstance(weights, Merged) and weights in self._merged:
            return self._merged[weights]
        missing = [t for t in range(1, weights.t + 1) if t not in self._arrivals]
        raise LookupError(f"the expert of task {missing[0] if missing else weights.t} has not arrived yet")
