"""The worker of a service: looks at the state, does the next thing, and appends what became of it.

Invariant: work may be done twice and has one effect, which is its entry. A step finds in the store what a worker before it made, and in
the log what was decided. Killed anywhere, the next worker ends in the same state with the same bytes. Weights are made and scored before
they are accepted, never in place.
"""

from collections.abc import Callable

from merge_service.errors import CheckpointError
from merge_service.faults import point
from merge_service.live import (
    LATE,
    Accepted,
    Arrival,
    Batched,
    CanaryEnded,
    Draft,
    Evaluated,
    Following,
    Halved,
    Held,
    Judged,
    Merged,
    Promoted,
    Quarantined,
    Rejected,
    Replaced,
    RolledBack,
    State,
    Verdict,
    Version,
    Waiting,
    awaited,
    canary_gates,
    in_turn,
    merge_gates,
    next_task,
    outcome,
    served_after,
)
from merge_service.live import Data as EntryData
from merge_service.service import Place
from pipeline.errors import CorruptArtifact
from pipeline.service.config import ServiceConfig
from pipeline.service.experts import Experts
from pipeline.service.log import Log
from pipeline.service.models import Models, placed
from pipeline.service.scoring import Scorer, scored
from pipeline.service.screening import Screening
from workers.serving.trials import Trials


class Worker:
    """Does the work of a service, one step at a time. One process at a time may run one (`Home.working`)."""

    def __init__(
        self,
        config: ServiceConfig,
        log: Log,
        experts: Experts,
        models: Models,
        scorer: Scorer,
        trials: Trials,
    ) -> None:
        self.config, self.log, self.experts, self.models, self.scorer = config, log, experts, models, scorer
        self._trials = trials
        self._screening = Screening(config, experts, scorer)
        self._purged: set[str] = set()
        self._best = Following(list[tuple[float, int]], _better)

    def step(self) -> bool:
        """Do the next thing and append its entry; False if there is nothing to do. Raises what the work raises."""
        state = self.log.refresh()
        self._purge(state)
        self.models.restore(state, state.served.version)
        task = next_task(state, self.config.lane, self.log.now_ms())
        if task is None:
            return False
        if task.what == "refold":
            self._refold(state)
        elif task.what == "make":
            self._make(state)
        elif task.what == "watch":
            return self._watch(state, state.arrivals[task.arrival])
        else:
            self._do(task.what, state, state.arrivals[task.arrival])
        return True

    def run(self, until: Callable[[State], bool] = lambda _: False) -> State:
        """Steps until there is nothing to do, or `until` says so of the state."""
        while not until(self.log.refresh()) and self.step():
            pass
        return self.log.state

    def _do(self, what: str, state: State, arrival: Arrival) -> None:
        """One task about an arrival. What cannot be scored or merged is stopped, so that the lane goes on without it."""
        try:
            _WORK[what](self, state, arrival)
        except CheckpointError as error:
            reasons, text = (f"{what}.failed",), self.experts.public(error)
            self._append(Quarantined(reasons, text) if what == "check" else Rejected(reasons, text), arrival)

    def _check(self, state: State, arrival: Arrival) -> None:
        found = self._screening.screen(state, arrival)
        point("check.end")
        self._append(found, arrival)
        self._sweep()

    def _wait(self, state: State, arrival: Arrival) -> None:
        missing = awaited(state, self.config.lane, arrival)
        self._append(Waiting(f"order.waits_for.{missing[0]}"), arrival)

    def _late(self, state: State, arrival: Arrival) -> None:
        text = "a later task of the declared order is accepted already; released, it comes after all others"
        self._append(Held((LATE,), text), arrival)

    def _merge(self, state: State, arrival: Arrival) -> None:
        place = self._place(state, arrival)
        also = () if place else self._batch(state, arrival)
        if also != arrival.batch:
            self._append(Batched(also), arrival)
            return
        places = self._with(state, arrival, place)
        version = self.models.version(places, len(places))
        self.models.prepare_start(places)
        self._append(Merged(version, state.chain, place), arrival)

    def _place(self, state: State, arrival: Arrival) -> str | None:
        """The accepted arrival whose place this one would take."""
        if arrival.replaces is not None and state.arrivals[arrival.replaces].status == "accepted":
            return arrival.replaces
        if self.config.same_task == "add":
            return None
        return state.index.tasks.get(arrival.task)

    def _batch(self, state: State, first: Arrival) -> tuple[str, ...]:
        """The arrivals that are merged and judged with this one as one candidate."""
        line = in_turn(state, self.config.lane, self.log.now_ms())
        if first.waived or state.on_hold or not line or line[0].id != first.id:
            return ()
        most, tasks, found = self.config.batch, {first.task}, [first]
        for one in line[1:]:
            again = self.config.same_task != "add" and one.task in tasks
            if again or one.waived or self._place(state, one) is not None:
                break
            most = min(most, *(each.most or most for each in (*found, one)))
            if len(found) == most:
                break
            found.append(one)
            tasks.add(one.task)
        return tuple(one.id for one in found[1:])

    def _evaluate(self, state: State, arrival: Arrival) -> None:
        sets = self.scorer.sets
        if not sets.every:
            self._append(Evaluated(None, ()), arrival)
            return
        places = self._with(state, arrival, arrival.place)
        candidate = self.models.version(places, len(places))
        judged = self.scorer.judged(candidate.fingerprint, sets.every)
        verdicts = self._gates(state, judged)
        self._append(Evaluated(scored(judged, sets), verdicts), arrival)

    def _gates(self, state: State, judged: Judged) -> tuple[Verdict, ...]:
        """The candidate against the champion, and against the best accepted time step."""
        sets = self.scorer.sets
        before = state.sequence if state.removal is None else state.removal.before
        places = self.models.places(state, before)
        known, champion = self._best.of(state, before), len(before)
        best = known[0][1] if known else champion
        versions = {t: before[t - 1].version if t else state.base for t in (best, champion)}
        answers = {t: self._judged(version, places) for t, version in versions.items()}
        return merge_gates(
            judged, answers[champion], answers[best], sets.of([*state.index.tasks]), sets.held_out,
            self.config.margins,
        )  # fmt: skip

    def _judged(self, version: Version, places: list[Place]) -> Judged:
        """The answers of a version, which is made again if it was dropped and these were never asked for."""
        try:
            return self.scorer.judged(version.fingerprint, self.scorer.sets.every)
        except CorruptArtifact:
            made = self.models.version(places, version.t)
            return self.scorer.judged(made.fingerprint, self.scorer.sets.every)

    def _decide(self, state: State, arrival: Arrival) -> None:
        found: EntryData = self._decision(state, arrival)
        if arrival.batch and isinstance(found, Held | Rejected):
            found = Halved((len(arrival.batch) + 2) // 2, found.detail)
        trial = self.config.promotion.trial(self.log.now_ms())
        if trial and isinstance(found, Promoted | Replaced) and not _was_tried(arrival):
            self._trials.clear()
            found = trial
        if isinstance(found, Promoted | Replaced):
            point("promote.before_append")
        self._append(found, arrival)
        if isinstance(found, Promoted | Replaced):
            point("promote.after_append")
        self._tidy()

    def _watch(self, state: State, arrival: Arrival) -> bool:
        """End a trial on real requests that has seen enough, or whose time is over; False while it goes on."""
        assert arrival.trial is not None
        observed = self._trials.read(trial_key(arrival))
        verdicts = canary_gates(observed, self.config.tolerances)
        fails = any(one.gate == "canary.failed" and one.verdict == "fail" for one in verdicts)
        enough = observed.requests >= arrival.trial.requests or self.log.now_ms() >= arrival.trial.deadline_ms
        if not (fails or enough):  # clients must not wait for a candidate that gives no answers
            return False
        self._append(CanaryEnded(observed.requests, verdicts), arrival)
        return True

    def _tidy(self) -> None:
        state = self.log.state
        tried = state.challenger.candidate if state.challenger else None
        self.models.tidy(state, self.config.serving.keep_warm, tried)

    def _decision(self, state: State, arrival: Arrival) -> Promoted | Replaced | Held | Rejected:
        left = [
            one
            for one in arrival.verdicts
            if not one.gate.startswith("solo")
            and not {_failed(one), f"undecided.{one.gate}"} & set(arrival.waived)
        ]
        verdict = outcome(left)
        failed = [one for one in left if one.verdict == "fail"]
        if verdict == "fail":
            return Rejected(tuple(map(_failed, failed)), _said(failed))
        if arrival.place and not arrival.replaces and (worse := self._not_better(state, arrival)):
            return worse
        open_ = [one for one in left if one.verdict == "undecided"]
        if open_ and self.config.gates.undecided != "pass":
            kind = Held if self.config.gates.undecided == "hold" else Rejected
            return kind(tuple(f"undecided.{one.gate}" for one in open_), _said(open_))
        if state.on_hold:
            return Held(("promotion.on_hold",), "nothing is promoted until the rollback is undone")
        if self.config.promotion.mode == "manual" and "promotion.manual" not in arrival.waived:
            return Held(("promotion.manual",), "a person promotes here")
        assert arrival.candidate is not None
        if arrival.place is not None:
            return Replaced(arrival.place, arrival.candidate, arrival.scored)
        return Promoted(arrival.candidate, arrival.scored)

    def _not_better(self, state: State, arrival: Arrival) -> Rejected | None:
        """With same_task best the newer expert must be better alone than the one whose place it would take."""
        old = state.arrivals[arrival.place or ""]
        reason = "regression.not_better"
        if self.config.same_task != "best" or reason in arrival.waived or not arrival.own or not old.own:
            return None
        new, mine = (sum(one.own.values()) / len(one.own) for one in (arrival, old))
        if new > mine:
            return None
        return Rejected(
            (reason,), f"alone on {arrival.task} it scores {new:.3f}, and {old.id} scores {mine:.3f}"
        )

    def _refold(self, state: State) -> None:
        """Make the accepted state again without what was removed, and serve it."""
        removal, places, sets = state.removal, self.models.places(state), self.scorer.sets
        assert removal is not None
        newest = self.models.version(places, len(places))
        point("remove.mid")
        served = self.models.version(places, served_after(state))
        if places:
            self.models.prepare_start(places)
        judged = self.scorer.judged(newest.fingerprint, sets.every) if sets.every else None
        found: Promoted | Rejected = Promoted(
            newest, scored(judged, sets) if judged else None, True, None if served == newest else served
        )
        if judged and not removal.force:
            verdicts = self._gates(state, judged)
            failed = [one for one in verdicts if one.verdict == "fail"]
            if failed:
                reasons = tuple(f"regression.{one.gate}" for one in failed)
                found = Rejected(reasons, f"{_said(failed)}; remove it all the same with --force")
        self._append(found, state.arrivals[removal.arrival])
        self._tidy()

    def _make(self, state: State) -> None:
        """Make the weights of a time step that a removal changed, and serve them."""
        asked = state.asked
        assert asked is not None
        version = self.models.version(self.models.places(state), asked.t)

        def decide(now: State) -> Draft | None:
            same = now.asked == asked and now.chain == state.chain
            return Draft(RolledBack(version, asked.hold, asked.reason)) if same else None

        self.log.append(decide)

    def _append(self, data: EntryData, arrival: Arrival) -> None:
        """Append what became of an arrival and its batch, unless something else became of them in the meantime."""
        before = self.log.state
        others = data.also if isinstance(data, Batched) else arrival.batch

        def decide(now: State) -> Draft | None:
            same = now.arrivals[arrival.id] == arrival and (now.chain, now.removal, now.on_hold) == (
                before.chain, before.removal, before.on_hold,
            )  # fmt: skip
            same = same and all(now.arrivals[name] == before.arrivals[name] for name in others)
            return Draft(data, arrival.id) if same else None

        self.log.append(decide)

    def _purge(self, state: State) -> None:
        """Delete the bytes of purged experts: the entry has decided, and this is done until they are gone."""
        for sha256 in state.denied.keys() - self._purged:
            self.models.drop("expert", self.experts.step(sha256).fingerprint[:16])
            self.experts.forget(sha256)
            self._purged.add(sha256)
            self._sweep()

    def _sweep(self) -> None:
        index = self.log.state.index
        self.experts.sweep(frozenset(index.incoming.values()), index.by_digest.keys())

    def _with(self, state: State, arrival: Arrival, place: str | None) -> list[Place]:
        """The accepted sequence with an arrival and its batch at its end, or in the place of another."""
        if place is None:
            batch = (state.arrivals[name].sha256 for name in arrival.batch)
            return [*self.models.places(state), *placed(state.chain, [arrival.sha256, *batch])]
        digests = [arrival.sha256 if one.arrival == place else one.sha256 for one in state.sequence]
        return placed(state.root, digests)


def _failed(one: Verdict) -> str:
    """The reason of an arrival that a gate has stopped."""
    return one.gate if one.gate.startswith("canary.") else f"regression.{one.gate}"


def _was_tried(arrival: Arrival) -> bool:
    """Whether a candidate was on trial, or was released from where its trial had led."""
    return arrival.tried is not None or any("canary." in one or "promotion." in one for one in arrival.waived)


def trial_key(arrival: Arrival) -> str:
    """The name of the trial of an arrival's candidate."""
    return f"{arrival.id}-{arrival.tried}"


def _better(kept: list[tuple[float, int]], state: State, one: Accepted) -> None:
    """Keep the best mean of scores, and of equal ones the newest, with its time step."""
    if one.scored is not None:
        kept[:] = [max([*kept, (one.scored.mean or 0.0, one.version.t)])]


def _said(verdicts: list[Verdict]) -> str:
    return "; ".join(
        f"{one.gate}: {one.difference:+.3f} ({one.low:+.3f} to {one.high:+.3f}), margin {one.margin:g}"
        for one in verdicts
    )


_WORK: dict[str, Callable[[Worker, State, Arrival], None]] = {
    "check": Worker._check, "wait": Worker._wait, "late": Worker._late, "merge": Worker._merge, "evaluate": Worker._evaluate, "decide": Worker._decide,
}  # fmt: skip
