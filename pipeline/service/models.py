"""The models that a service deploys, in the store by fingerprint: made when they are wanted, dropped when they are not.

A candidate is made beside the accepted ones. Its fingerprint follows from the chain of its experts, so what a worker made before it
ended is found by the next one, and a model that was dropped is made again with the same bytes.

Invariant: a version has the sha256 that the log says, or an error is raised; nothing here changes what is accepted or served.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from merge_service.checkpoints import WEIGHTS_FILE
from merge_service.faults import point
from merge_service.files import Made
from merge_service.live import Accepted, Following, Refused, State, Version, link, snapshots
from merge_service.service import Folder, Origin, Place
from merge_service.timelines import Base, Expert, Merged, Strategy, Weights, deployed, initial, results
from pipeline.errors import CorruptArtifact, NondeterminismError
from pipeline.kinds.specs import SequenceSpec
from pipeline.kinds.table import KINDS
from pipeline.plan.steps import RECORD_BYTES, Step
from pipeline.service.experts import Experts, step_of
from pipeline.store.artifact import Record
from pipeline.store.local import Store
from pipeline.store.names import DIGITS, Names
from pipeline.store.upkeep import Entry, upkeep


class Models:
    """The models of a service. `states` is where streaming states are kept between arrivals."""

    def __init__(
        self, store: Store, base: Record, strategy: Strategy, experts: Experts, states: Path
    ) -> None:
        self.store, self.base, self.strategy, self.experts = store, base, strategy, experts
        origin = Origin(
            strategy, store.open_verified(base), base.sha256(WEIGHTS_FILE) or "", self.experts.path
        )
        self.folder = Folder(origin, states)
        self._places = Following(list[Place], lambda kept, _, one: kept.append(Place(one.sha256, one.chain)))

    def places(self, state: State, sequence: tuple[Accepted, ...] | None = None) -> list[Place]:
        """A sequence, by default the accepted one, as places."""
        return [*self._places.of(state, sequence)]

    def version(self, places: Sequence[Place], t: int) -> Version:
        """What is deployed after the first `t` places; made if it is not in the store. Raises what a merge raises."""
        kind, fingerprint = self._named(deployed(self.strategy, t), places)
        if kind != SequenceSpec.kind:
            record = self.store.record(kind, fingerprint)
            if record is None:
                raise CorruptArtifact(f"{kind} {fingerprint[:16]} is not in {self.store.where}")
        else:
            merged = deployed(self.strategy, t)
            assert isinstance(merged, Merged)
            record = self._made(merged, places[:t])
        return Version(t, fingerprint, record.sha256(WEIGHTS_FILE) or "")

    def prepare_start(self, places: Sequence[Place]) -> None:
        """Make the weights that the next expert starts from, if they are merged: a study makes them with the arrival too."""
        for result in results(self.strategy, len(places)):
            self._made(result, places)

    def start(self, places: Sequence[Place]) -> Record | None:
        """What the next expert is trained from, after these; None if it is not in the store now."""
        return self.store.find(self._named(initial(self.strategy, len(places) + 1), places)[1])

    def known(self, state: State, sha256: str) -> Record | None:
        """The artifact of weights that training may have started from: base, a version, an accepted expert, or the start of the next."""
        if sha256 == state.base.sha256:
            return self.base
        for one in state.sequence:
            if sha256 == one.version.sha256:
                return self.store.find(one.version.fingerprint)
            if sha256 == one.sha256:
                return self.experts.record(sha256)
        start = self.start(places_of(state)) if state.removal is None else None
        return start if start is not None and start.sha256(WEIGHTS_FILE) == sha256 else None

    @contextmanager
    def under(self, state: State, init: str) -> Iterator[Path]:
        """The weights that an adapter trained from `init` (as of `Received`) stands on, verified, for the length of a `with` block.

        A version that was dropped is made again from the nearest streaming state, beside what the worker keeps. Raises Refused for
        weights that are none of the service's.
        """
        record = self.base if init == "base" else self.known(state, init)
        if record is not None:
            yield self.store.open_verified(record)
            return
        t = state.index.starts.get(init)
        if t is None:
            raise Refused(
                "upload.unfit",
                f"an adapter needs the weights that it was trained on: {init[:16]} are not here; train from the base or from a start "
                "ticket, or send whole weights",
            )
        with self.store.staged() as room:
            self._remade(state, state.version(t), room)
            yield room

    def _remade(self, state: State, version: Version, room: Path) -> None:
        """Write a version into a directory. What is kept between arrivals is read and not changed. Raises NondeterminismError."""
        merged, states = deployed(self.strategy, version.t), room / "states"
        assert isinstance(merged, Merged)  # an expert is never dropped
        states.mkdir()
        for kept in self.folder.states.glob("[!.]*"):
            with suppress(FileNotFoundError):  # the worker has dropped it meanwhile
                (shutil.copyfile if kept.suffix == ".sum" else os.link)(kept, states / kept.name)
        report = Folder(self.folder.origin, states).make(merged, places_of(state)[: version.t], room)
        if report.sha256[WEIGHTS_FILE] != version.sha256:
            raise _other(version, Version(version.t, version.fingerprint, report.sha256[WEIGHTS_FILE]))

    def is_there(self, fingerprint: str) -> bool:
        """Whether a version can be opened without being made."""
        return self.store.find(fingerprint) is not None

    def restore(self, state: State, version: Version) -> None:
        """Make a version of the accepted sequence again if it was dropped. Raises NondeterminismError if other bytes come out."""
        if not self.is_there(version.fingerprint):
            made = self.version(self.places(state), version.t)
            if made != version:
                raise _other(version, made)

    def tidy(self, state: State, keep_warm: int, candidate: Version | None = None) -> None:
        """Drop models and streaming states that neither what is accepted nor the candidate in the lane needs.

        The newest `keep_warm` versions and what is served stay; every other one can be made again.
        """
        newest = [one.version.fingerprint for one in state.sequence[-keep_warm:]]
        made = results(self.strategy, state.t) if state.t else ()
        starts = [self._named(one, self.places(state))[1] for one in made]
        wanted = {*newest, *starts, state.served.fingerprint, candidate.fingerprint if candidate else ""}
        if type(self.store) is Store:
            for digits in (
                path.name[-DIGITS:] for path in (self.store.root / SequenceSpec.kind).glob("[!.]*-*")
            ):
                if not any(name.startswith(digits) for name in wanted):
                    self.drop(SequenceSpec.kind, digits)
        chains = frozenset(state.sequence[t - 1].chain for t in (*snapshots(state.t), state.t) if t)
        self.folder.keep_only(chains)

    def drop(self, kind: str, digits: str) -> None:
        """Remove an artifact, by the first digits of its fingerprint, from a store in a directory."""
        keeper, place = upkeep(self.store), Names(self.store.root).find(digits)
        if place is not None:
            keeper.take_out(Entry(kind, digits, str(place), 0, None), files_too=True)
            keeper.clear()

    def _made(self, merged: Merged, places: Sequence[Place]) -> Record:
        step = self._step(merged, places)
        known = self.store.record(step.kind, step.fingerprint)
        if known is not None:
            try:
                self.store.open_verified(known)
                return known
            except CorruptArtifact:
                pass  # it was set aside, and is made again
        with self.store.staged(step) as stage:
            report = self.folder.make(merged, places, stage)
            assert report.geometry is not None
            result = {"merge_seconds": report.seconds, **asdict(report.geometry), "notes": [*report.notes]}
            point("merge.before_commit")
            record = self.store.commit(step, stage, Made(result, report.sha256), seconds=report.seconds)
        point("merge.after_commit")
        return record

    def _step(self, merged: Merged, places: Sequence[Place]) -> Step:
        last = places[merged.t - 1]
        spec = SequenceSpec(
            KINDS[SequenceSpec.kind].revision,
            self.base.fingerprint,
            last.chain,
            merged.policy,
            self.experts.step(last.sha256).fingerprint,
        )
        label = f"t = {merged.t} ({merged.policy})"
        return step_of(spec, f"t{merged.t}-{merged.policy}", label, merged.t, self.base.bytes + RECORD_BYTES)

    def _named(self, weights: Weights, places: Sequence[Place]) -> tuple[str, str]:
        """Kind and fingerprint of the artifact of weights."""
        if isinstance(weights, Base):
            return self.base.kind, self.base.fingerprint
        if isinstance(weights, Expert):
            return "expert", self.experts.step(places[weights.t - 1].sha256).fingerprint
        return SequenceSpec.kind, self._step(weights, places).fingerprint


def _other(version: Version, made: Version) -> NondeterminismError:
    return NondeterminismError(
        f"t = {version.t} was {version.sha256} ({version.fingerprint[:16]}) and is now {made.sha256} "
        f"({made.fingerprint[:16]}); likely causes: another library version, or changed experts"
    )


def places_of(state: State) -> list[Place]:
    """The accepted sequence as places, made anew: for threads, which share no `Models.places`."""
    return [Place(one.sha256, one.chain) for one in state.sequence]


def placed(root: str, digests: Iterable[str]) -> list[Place]:
    """Places of experts in this order."""
    found: list[Place] = []
    for sha256 in digests:
        found.append(Place(sha256, link(found[-1].chain if found else root, sha256)))
    return found
