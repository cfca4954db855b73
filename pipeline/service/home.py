"""A service in a directory OUT: its store, its log, and what is opened to work on it.

Layout: `OUT/store` has base, experts, models and evaluations by fingerprint; `OUT/service/<name>/` has `log/`, `trials/` (what candidates did on real requests), `states/` (streaming states,
a cache), `incoming/` (bytes that are not judged yet), `worker.lock`, and `outbox.db` with what MLflow has not received.

Invariant: the log and the experts and base in the store are the truth; everything else in OUT is made again when it is missing.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from merge_service.checkpoints import WEIGHTS_FILE
from merge_service.errors import UserError
from merge_service.live import ConfigSet, Draft, ServiceStarted, State, Task, Version, next_task, plain
from pipeline.errors import ConfigError, CorruptArtifact
from pipeline.files.disk import NO_LOCKS
from pipeline.kinds.specs import BASE
from pipeline.plan.facts import base_identity, base_of, local_base, stated
from pipeline.plan.planner import base_step
from pipeline.plan.steps import RECORD_BYTES
from pipeline.service.config import ServiceConfig, config_from
from pipeline.service.experts import Experts
from pipeline.service.log import Log
from pipeline.service.models import Models
from pipeline.service.scoring import NoScorer, Scorer, StoreScorer
from pipeline.service.shelf import Directory
from pipeline.service.worker import Worker
from pipeline.store.artifact import Record
from pipeline.store.local import Store
from pipeline.store.open import store_at
from workers.serving.trials import FOLDER as TRIALS
from workers.serving.trials import Trials

FORMAT = 1
SERVICE = "service"


class Busy(UserError):
    """Another process is the worker of this service."""


@dataclass(frozen=True)
class Home:
    """A service that is open. `log` was checked from its first entry on when it was opened."""

    out: Path
    config: ServiceConfig
    store: Store
    log: Log
    base: Record

    @classmethod
    def open(
        cls,
        out: Path,
        config: ServiceConfig | None = None,
        base: Callable[[Store], Record] | None = None,
        now: Callable[[], float] = time.time,
    ) -> "Home":
        """Open the service in OUT; with a configuration, begin it if there is none yet, and set the configuration if it differs.

        `base` gives the base's artifact, by default from `config.model`. Raises UserError if OUT holds none and no configuration is
        given, or another one; BrokenLog for a log that was changed.
        """
        place = out / SERVICE / (config.name if config else _only(out))
        store, log = store_at(None, out), Log.open(Directory(place), now)
        if not log.state.seq:
            if config is None:
                raise UserError(f"{place} holds no service; give its configuration")
            store.prepare()
            record = (base or (lambda store: _export(store, config)))(store)
            log.append(lambda state: _started(state, config, record))
        state = log.state
        settled = config or config_from(dict(state.config), f"{place}: the configuration in the log")
        _check_same(state, settled, place)
        log.append(lambda state: _configured(state, settled))
        return cls(out, settled, store, log, _base_of(store, state))

    @property
    def place(self) -> Path:
        """The directory of the service itself."""
        return self.out / SERVICE / self.config.name

    @cached_property
    def experts(self) -> Experts:
        """Its experts."""
        return Experts(self.store, self.base, self.place / "incoming")

    @cached_property
    def models(self) -> Models:
        """Its models."""
        states = self.place / "states"
        return Models(self.store, self.base, self.config.timeline, self.experts, states)

    def worker(self, scorer: Scorer | None = None) -> Worker:
        """What does the work; hold `working` meanwhile. Reads the data, unless a scorer is given."""
        if scorer is None:
            scorer = StoreScorer(self.config, self.store, self.base) if self.config.data else NoScorer()
        return Worker(self.config, self.log, self.experts, self.models, scorer, Trials(self.place / TRIALS))

    def next_task(self, state: State) -> Task | None:
        """What there is to do now."""
        return next_task(state, self.config.lane, self.log.now_ms())

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Be the only worker of this service on this file system. Raises Busy."""
        handle = os.open(self.place / "worker.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        try:
            self._lock(handle)
            self.store.sweep()
            self.log.tidy()
            yield
        finally:
            os.close(handle)

    def _lock(self, handle: int) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(
                f"another process works for the service {self.config.name} in {self.out}; what was asked for is in its log"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            raise Busy(f"{self.out} is on a file system without file locks; choose another --out") from error


def _only(out: Path) -> str:
    """The name of the service in OUT. Raises UserError unless there is exactly one."""
    names = sorted(path.name for path in (out / SERVICE).glob("*") if path.is_dir())
    if len(names) != 1:
        found = f"holds {', '.join(names)}; name one with its configuration" if names else "holds no service"
        raise UserError(f"{out} {found}")
    return names[0]


def _started(state: State, config: ServiceConfig, base: Record) -> Draft | None:
    if state.seq:
        return None
    version = Version(0, base.fingerprint, base.sha256(WEIGHTS_FILE) or "")
    return Draft(ServiceStarted(config.name, version, plain(config.timeline), FORMAT))


def _configured(state: State, config: ServiceConfig) -> Draft | None:
    body = config.model_dump(mode="json")
    return None if body == plain(state.config) else Draft(ConfigSet(body))


def _check_same(state: State, config: ServiceConfig, place: Path) -> None:
    """Refuse what can never change."""
    if plain(config.timeline) != plain(state.strategy):
        raise ConfigError(
            f"{place}: strategy: this service has another one, and its versions were made by it; begin a new service with "
            "another --out and bring the experts there"
        )
    known = state.config.get("model")
    if known is not None and config.model.model_dump(mode="json") != known:
        raise ConfigError(
            f"{place}: model: this service has another base; begin a new one with another --out"
        )


def _base_of(store: Store, state: State) -> Record:
    record = store.record(BASE, state.base.fingerprint)
    if record is None or record.sha256(WEIGHTS_FILE) != state.base.sha256:
        raise CorruptArtifact(
            f"the base {state.base.fingerprint[:16]} of this service is not in {store.where}, or damaged"
        )
    return record


def _export(store: Store, config: ServiceConfig) -> Record:
    """The base of a configuration as an artifact."""
    from workers.models.export import export_base

    model = config.model
    weights, described, size = base_identity(model, base_of(model))
    step = base_step(weights, described, model.config, size + RECORD_BYTES)
    known = store.record(step.kind, step.fingerprint)
    if known is not None:
        return known
    source = local_base(model)
    pretrained = str(source) if source else model.pretrained
    return store.make(
        step,
        lambda stage: {"origin": export_base(model.config, pretrained, stage, model.seed, stated(model))},
    )
