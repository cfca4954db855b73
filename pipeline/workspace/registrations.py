"""Which studies use a store, and what each refers to; kept in the store itself.

Invariant: a study is registered, under the store's lock, before its first step and stays so until its next plan replaces the
registration or a person drops it by name. So whoever holds the lock knows all that must stay.
"""

import contextlib
import hashlib
import json
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import StoreError
from pipeline.plan.steps import Plan
from pipeline.store.local import Store
from pipeline.store.upkeep import Upkeep, upkeep
from pipeline.workspace.lock import is_held

_FOREIGN_MS = 7 * 24 * 3600 * 1000


@dataclass(frozen=True)
class Registration:
    """What the study at `out` on `host` refers to. `running` is what it last said of its driver."""

    name: str
    study: str
    host: str
    out: str
    time_ms: int
    running: bool
    fingerprints: frozenset[str]

    @property
    def is_gone(self) -> bool:
        """Whether OUT was on this host and is no more; of other hosts nothing can be said."""
        return self.host == socket.gethostname() and not (Path(self.out) / "plan.json").exists()

    @property
    def may_run(self) -> bool:
        """Whether its driver may be alive: asked on this host, believed for a week of others."""
        if self.host == socket.gethostname():
            return is_held(Path(self.out))
        return self.running and time.time() * 1000 - self.time_ms < _FOREIGN_MS


def register(store: Store, plan: Plan, out: Path, running: bool = True) -> None:
    """Say what the study in OUT refers to, in place of what it said before. Raises StoreError."""
    host, place = socket.gethostname(), str(out.absolute())
    body = {
        "study": plan.study,
        "host": host,
        "out": place,
        "time_ms": time.time_ns() // 1_000_000,
        "running": running,
        "fingerprints": sorted({*plan.bases, *plan.steps}),
    }
    keeper = upkeep(store)
    with keeper.exclusively():
        keeper.write_note(name_of(plan.study, host, place), json.dumps(body).encode())


def retire(store: Store, plan: Plan, out: Path) -> None:
    """Say that the driver has ended; the references stay. Best effort: an old registration counts as running for longer."""
    with contextlib.suppress(StoreError, OSError):
        register(store, plan, out, running=False)


def name_of(study: str, host: str, out: str) -> str:
    """The name of a registration, as `gc --forget` takes it."""
    return f"{study}-{hashlib.sha256(f'{host} {out}'.encode()).hexdigest()[:8]}"


def registrations(keeper: Upkeep) -> list[Registration]:
    """All registrations of a store. Raises StoreError for one that cannot be read: nothing may be removed then."""
    return [registration(name, text) for name, text in keeper.notes().items()]


def registration(name: str, text: bytes) -> Registration:
    """A registration as it was written. Raises StoreError."""
    try:
        body = json.loads(text)
        return Registration(name=name, **{**body, "fingerprints": frozenset(body["fingerprints"])})
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(
            f"the registration {name} cannot be read ({error}); run its study again, or drop it with --forget {name}"
        ) from None
