"""A service in a directory OUT: its store, its log, and what is opened to work on it.

Layout: `OUT/store` has base, experts, models and evaluations by fingerprint; `OUT/service/<name>/` has `log/`, `trials/` (what candidates did on real requests), `states/` (streaming states,
a cache), `incoming/` (bytes that are not judged yet), `worker.lock` and `serve.lock`, and `outbox.db` with what MLflow has not received.

Invariant: the log and the experts and base in the store are the truth; everything else in OUT is made again when it is missing.
"""

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from merge_service.checkpoints import WEIGHTS_FILE
from merge_service.errors import UserError
from merge_service.files import make_directory
from merge_service.live import ConfigSet, Draft, ServiceStarted, State, Task, Version, next_task, plain
from pipeline.errors import ConfigError, CorruptArtifact
from pipeline.files.disk import NO_LOCKS, written_below
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
WORKER_LOCK, SERVE_LOCK = "worker.lock", "serve.lock"


_URL = re.compile(r"[a-z][a-z0-9+]+:/")


class Busy(UserError):
    """Another process is the worker of this service, or serves it."""


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
        check_directory(out)
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
        """Be the only worker of this service on this file system. Raises Busy, StoreUnwritable."""
        name, out = self.config.name, self.out
        text = f"another process works for the service {name} in {out}; what was asked for is in its log"
        with _alone(self.place, WORKER_LOCK, text):
            self.store.sweep()
            self.log.tidy()
            yield


@contextlib.contextmanager
def serving(out: Path, config: ServiceConfig, patience: float) -> Iterator[None]:
    """Be the only process that serves this service on this file system; one that is ending may take `patience` seconds for that.

    Raises Busy, StoreUnwritable, StorageFull.
    """
    check_directory(out)
    text = f"another `serve` runs the service {config.name} in {out}; end that one first, or choose another --out"
    with _alone(out / SERVICE / config.name, SERVE_LOCK, text, patience):
        yield


def check_directory(out: Path) -> None:
    """Raise UserError for a URL, which a path has made of an address such as s3://bucket/zoo."""
    if _URL.match(str(out)):
        raise UserError(
            f"{out} is no directory: a service is in one, since its lock, uploads, streaming states and what is served are files. On a "
            "cluster it is on storage that all nodes share; `service replay` makes a copy elsewhere"
        )


def check_unserved(out: Path, config: ServiceConfig) -> None:
    """Refuse a configuration that differs from that of the processes which serve OUT now, since they read theirs when they start.
    Raises Busy.
    """
    place = out / SERVICE / config.name
    if not (place / SERVE_LOCK).exists() or plain(Log.open(Directory(place)).state.config) == _body(config):
        return
    text = f"the service {config.name} in {out} runs with another configuration; leave --config out, or end the service first"
    with _alone(place, SERVE_LOCK, text):
        return


@contextlib.contextmanager
def _alone(place: Path, name: str, busy: str, patience: float = 0.0) -> Iterator[None]:
    """Hold a lock file of a service. Raises Busy with the text `busy` if another process still holds it after `patience` seconds."""
    until = time.monotonic() + patience
    with written_below(place, name):
        make_directory(place)
        handle = os.open(place / name, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
    try:
        while not _locked(handle, place):
            if time.monotonic() >= until:
                raise Busy(busy)
            time.sleep(0.1)
        yield
    finally:
        os.close(handle)


def _locked(handle: int, place: Path) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise Busy(f"{place} is on a file system without file locks; choose another --out") from error
    return True


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
    body = _body(config)
    return None if body == plain(state.config) else Draft(ConfigSet(body))


def _body(config: ServiceConfig) -> dict[str, Any]:
    """A configuration as the log has it."""
    return config.model_dump(mode="json")


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
