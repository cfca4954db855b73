"""Whether a service in a directory is what its log says; and the same service made anew somewhere else.

Invariant: `verify` changes nothing and names everything that it finds. `replay` reads nothing but base, experts and log, and ends with the
versions that the log states, or with an error.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from merge_service.checkpoints import WEIGHTS_FILE
from merge_service.errors import UserError
from merge_service.files import Made
from merge_service.live import BrokenLog, State, Version
from pipeline.errors import CorruptArtifact, NondeterminismError, StoreError
from pipeline.kinds.specs import EvaluateSpec, SequenceSpec
from pipeline.plan.steps import Step
from pipeline.service.home import SERVICE, Home
from pipeline.service.log import LOG, SEALED
from pipeline.store.artifact import RECORD_FILE, Record
from pipeline.store.audit import lineage
from pipeline.store.local import Store
from pipeline.store.open import store_at


@dataclass(frozen=True)
class Replayed:
    """What a replay made: the versions of the accepted sequence, and the one that is served."""

    versions: tuple[Version, ...]
    served: Version


def verify(out: Path) -> list[str]:
    """What is wrong with the service in OUT: the chain of its log, digests of what is stored, and the lineage of what is accepted.

    Raises UserError if OUT holds no service.
    """
    try:
        home = Home.open(out)
    except (BrokenLog, CorruptArtifact) as error:
        return [str(error)]
    state, dropped = home.log.state, _of_dropped(home)
    return [
        *(text for text in home.store.verify() if text not in dropped),
        *_lost(home, state),
        *_wrong_versions(home, state),
        *(f"{text}; it is made again when it is needed" for text in home.models.folder.damaged()),
        *(
            []
            if home.log.is_snapshot_sound()
            else [f"{home.place}/log/snapshot.json is damaged; it is made again"]
        ),
    ]


def replay(out: Path, target: Path) -> Replayed:
    """Make the service in OUT anew in the directory `target`: its log copied entry by entry, base and experts by their digests, every
    version merged again. Raises UserError if something is at `target`, NondeterminismError if other bytes come out.
    """
    if target.exists() and any(target.iterdir()):
        raise UserError(f"--out {target} is there already; give another --out")
    source = Home.open(out)
    state = source.log.refresh()
    store = store_at(None, target)
    store.prepare()
    _bring(source.base, store)
    for one in state.arrivals.values():
        record = source.experts.record(one.sha256) if one.status != "purged" else None
        if record is not None:
            source.store.open_verified(record)
            _bring(record, store)
    for place in (LOG, SEALED):
        for key in source.log.shelf.keys(place):
            to = target / SERVICE / source.config.name / key
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(source.log.shelf.read(key) or b"")
    home = Home.open(target)
    if home.log.state.head != state.head:
        raise StoreError(
            f"{target}: the log ends at another entry than in {out}; a service works there: try again"
        )
    return _made_again(home, state)


def _made_again(home: Home, state: State) -> Replayed:
    """Every version of the accepted sequence, merged from nothing."""
    places, found = home.models.places(state), list[Version]()
    for t in range(1, state.t + 1):
        made, stated = home.models.version(places[:t], t), state.version(t)
        if stated.fingerprint and made != stated:
            raise NondeterminismError(
                f"t = {t} is {stated.sha256} in the log, and {made.sha256} when it is made again from its experts; likely causes: "
                "another library version, or changed experts"
            )
        found.append(made)
        home.models.tidy(state, home.config.serving.keep_warm, made)
    served = state.served
    version = Version(served.t, served.fingerprint, served.sha256)
    if state.removal is None:
        home.models.restore(state, version)
    return Replayed(tuple(found), version)


def _lost(home: Home, state: State) -> list[str]:
    """Accepted experts that are not in the store."""
    return [
        f"{one.arrival} (t = {t}) is accepted, and its expert {one.sha256} is not in {home.store.where}"
        for t, one in enumerate(state.sequence, 1)
        if home.experts.record(one.sha256) is None
    ]


def _of_dropped(home: Home) -> frozenset[str]:
    """What an audit says of answers whose model was dropped. They are kept: the model is made again, with the same bytes."""
    found = home.store.find
    lost = [
        one
        for one in home.store.records(EvaluateSpec.kind)
        if any(found(input) is None for input in one.inputs.values())
    ]
    return frozenset(text for one in lost for text in lineage(home.store, one))


def _wrong_versions(home: Home, state: State) -> list[str]:
    """Models in the store whose bytes are not those that the log states."""
    stated = {one.version.fingerprint: one.version for one in state.sequence}
    return [
        f"{record.path} has {record.sha256(WEIGHTS_FILE)}, and the log states {stated[record.fingerprint].sha256} for t = "
        f"{stated[record.fingerprint].t}"
        for record in home.store.records(SequenceSpec.kind)
        if record.fingerprint in stated and record.sha256(WEIGHTS_FILE) != stated[record.fingerprint].sha256
    ]


def _bring(record: Record, store: Store) -> None:
    """Copy an artifact into another store, under the same fingerprint."""
    if store.record(record.kind, record.fingerprint) is not None:
        return
    step = Step(
        record.kind,
        record.fingerprint,
        record.slug,
        record.slug,
        0,
        "",
        record.spec,
        record.inputs,
        disk_bytes=record.bytes,
    )
    with store.staged(step) as stage:
        for name in record.files:
            if name != RECORD_FILE:
                (stage / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(record.path / name, stage / name)
        made = store.commit(step, stage, Made(record.result), seconds=record.seconds)
    if made.files != record.files:
        raise CorruptArtifact(f"{record.path} changed while it was copied; run again")
