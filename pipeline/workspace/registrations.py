"""The studies that use a store, with the artifacts that each refers to, kept in the store itself.

Invariant: a study is registered, under the store's lock, before its first step. It stays registered until its next plan
replaces the registration or a user removes it by name. So a holder of the lock knows everything that must stay.
"""

import contextlib
import hashlib
import json
import socket
import time
from collections.abc import Collection
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
    """What the study at `out` on `host` refers to. `running` is what it last said of its driver.

    `recipes` are merges that the study does not keep as files once it has read them.
    """

    name: str
    study: str
    host: str
    out: str
    time_ms: int
    running: bool
    fingerprints: frozenset[str]
    recipes: frozenset[str] = frozenset()

    @property
    def wants(self) -> frozenset[str]:
        """What is to stay as files for it: all that it refers to while it may run, else what it keeps."""
        return self.fingerprints if self.may_run else self.fingerprints - self.recipes

    @property
    def is_gone(self) -> bool:
        """Whether OUT was on this host and no longer exists. For other hosts this cannot be known."""
        return self.host == socket.gethostname() and not (Path(self.out) / "plan.json").exists()

    @property
    def may_run(self) -> bool:
        """Whether its driver may be alive: checked on this host; for another host, its last report is trusted for a week."""
        if self.host == socket.gethostname():
            return is_held(Path(self.out))
        return self.running and time.time() * 1000 - self.time_ms < _FOREIGN_MS


def register(
    store: Store, plan: Plan, out: Path, running: bool = True, kept: Collection[str] | None = None
) -> None:
    """Say what the study in OUT refers to, in place of what it said before; of its merges it keeps those in `kept` (None: all).

    Raises StoreError.
    """
    recipes = (
        [fp for fp, step in plan.steps.items() if step.kind == "merge" and fp not in kept]
        if kept is not None
        else []
    )
    host, place = socket.gethostname(), str(out.absolute())
    body = {
        "study": plan.study,
        "host": host,
        "out": place,
        "time_ms": time.time_ns() // 1_000_000,
        "running": running,
        "fingerprints": sorted({*plan.bases, *plan.steps}),
        **({"recipes": sorted(recipes)} if recipes else {}),
    }
    keeper = upkeep(store)
    with keeper.exclusively():
        keeper.write_note(name_of(plan.study, host, place), json.dumps(body).encode())


def retire(store: Store, plan: Plan, out: Path, kept: Collection[str] | None = None) -> None:
    """Record that the driver has ended; the references stay. Best effort: otherwise the study counts as running for longer."""
    with contextlib.suppress(StoreError, OSError):
        register(store, plan, out, running=False, kept=kept)


def name_of_study(plan: Plan, out: Path) -> str:
    """The name under which the study in OUT is registered from this host."""
    return name_of(plan.study, socket.gethostname(), str(out.absolute()))


def name_of(study: str, host: str, out: str) -> str:
    """The name of a registration, as `gc --forget` takes it."""
    return f"{study}-{hashlib.sha256(f'{host} {out}'.encode()).hexdigest()[:8]}"


def registrations(keeper: Upkeep) -> list[Registration]:
    """All registrations of a store. Raises StoreError for one that cannot be read, since nothing may be removed then."""
    return [registration(name, text) for name, text in keeper.notes().items()]


def registration(name: str, text: bytes) -> Registration:
    """Parse a registration. Raises StoreError."""
    try:
        body = json.loads(text)
        return Registration(
            name=name,
            **{**body, **{key: frozenset(body.get(key, ())) for key in ("fingerprints", "recipes")}},
        )
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(
            f"the registration {name} cannot be read ({error}); run its study again, or drop it with --forget {name}"
        ) from None
