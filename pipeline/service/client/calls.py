"""What a live service does, as calls without their waiting: `Service` and `AsyncService` carry them out.

Invariant: every call is one that the documentation of the routes describes; a refusal is a `ServiceError` with its code. A call sleeps
and sends by what it yields alone.
"""

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_service.live import Entry, canonical, chained, parse
from pipeline.service.client.connection import Exchange, Pause, Peer, Sent
from pipeline.service.client.sending import Progress, download, sources, upload
from pipeline.service.http.live.schemas import (
    ArrivalPage,
    ArrivalShown,
    Came,
    Lineage,
    LogPage,
    Start,
    TokenIssuedShown,
    TokenList,
)
from pipeline.service.http.schemas import Classified, Standing, Status

FINAL = frozenset(
    {
        "promoted",
        "superseded",
        "rolled_back",
        "held",
        "quarantined",
        "rejected",
        "withdrawn",
        "removed",
        "purged",
    }
)
"""Statuses after which the service does nothing more with an arrival by itself."""
STOPPED = frozenset({"quarantined", "rejected"})
_WAIT = 30
_PAGE = 200


@dataclass(frozen=True)
class Calls:
    """The calls of a client of the service `to`, without their waiting (`Exchange`). Every call raises ServiceError for what is refused."""

    to: Peer

    def arrive(
        self,
        checkpoint: Path | str,
        task: str,
        ticket: str | None = None,
        progress: Progress = lambda *_: None,
        **said: str,
    ) -> Exchange[Came]:
        """Send an expert; what of it came before is not sent again. `said`: owner, license, note, init (base or foreign), replaces.

        Raises UserError for what is no checkpoint.
        """
        number = yield from upload(self.to, task, sources(Path(checkpoint)), progress)
        replaces = said.pop("replaces", None)
        body = {"task": task, "upload": number, **said, **({"init_ticket": ticket} if ticket else {})}
        method, path = (
            ("PUT", f"/v1/arrivals/{replaces}/replacement") if replaces else ("POST", "/v1/arrivals")
        )
        sent = Sent(json=body, headers={"idempotency-key": secrets.token_hex(16)})
        return (yield from self.to.read(Came, method, path, sent))

    def show(self, arrival: str, wait: int = 0) -> Exchange[ArrivalShown]:
        """One arrival; after `wait` seconds at most once it is decided."""
        return self.to.read(ArrivalShown, "GET", f"/v1/arrivals/{arrival}", Sent(params={"wait": wait}))

    def wait(self, arrival: str, seconds: float | None = None) -> Exchange[ArrivalShown]:
        """One arrival, once the service has decided about it. Raises TimeoutError after `seconds`."""
        until = None if seconds is None else time.monotonic() + seconds
        while True:
            left = _WAIT if until is None else max(0, min(_WAIT, int(until - time.monotonic()) + 1))
            found = yield from self.show(arrival, left)
            if found.status in FINAL:
                return found
            if until is not None and time.monotonic() >= until:
                raise TimeoutError(f"{arrival} is still {found.status}")

    def arrivals(
        self, status: str | None = None, task: str | None = None, after: str | None = None
    ) -> Exchange[ArrivalPage]:
        """A page of the arrivals in the order they came, as far as they are of this status and task, from behind `after` on."""
        asked: dict[str, Any] = {"limit": _PAGE, "status": status, "task": task, "after": after}
        params = {key: value for key, value in asked.items() if value is not None}
        return self.to.read(ArrivalPage, "GET", "/v1/arrivals", Sent(params=params))

    def lineage(self, arrival: str) -> Exchange[Lineage]:
        """What an arrival was trained from, and what was trained from it."""
        return self.to.read(Lineage, "GET", f"/v1/arrivals/{arrival}/lineage")

    def release(self, arrival: str, reason: str) -> Exchange[ArrivalShown]:
        """Let an arrival go on in spite of why it was stopped."""
        return self._act(f"/v1/arrivals/{arrival}/release", {"reason": reason})

    def promote(self, arrival: str, reason: str) -> Exchange[ArrivalShown]:
        """Serve what an accepted arrival brought, which undoes a rollback; or let a held one go on."""
        return self._act(f"/v1/arrivals/{arrival}/promote", {"reason": reason})

    def reject(self, arrival: str, reason: str) -> Exchange[ArrivalShown]:
        """Refuse a held candidate."""
        return self._act(f"/v1/arrivals/{arrival}/reject", {"reason": reason})

    def rollback(
        self, t: int, reason: str, hold: bool = False, if_head: str | None = None
    ) -> Exchange[Standing]:
        """Serve time step `t`. With `if_head` only if the log still ends with it."""
        body = {"t": t, "reason": reason, "hold": hold, **({"if_head": if_head} if if_head else {})}
        return self.to.read(Standing, "POST", "/v1/rollback", Sent(json=body), again=False)

    def remove(
        self, arrival: str, reason: str, descendants: str = "none", force: bool = False, purge: bool = False
    ) -> Exchange[ArrivalShown]:
        """Take an expert out of all merges, and wait until that is done. It is still accepted then if a gate has kept it."""
        asked = {"reason": reason, "descendants": descendants, "force": force}
        path = f"/v1/arrivals/{arrival}"
        yield from self.to.ask("DELETE", path, Sent(params=asked))
        while (live := (yield from self.status()).live) is not None and live.removal is not None:
            yield Pause(0.2)
        shown = yield from self.show(arrival)
        if purge and shown.status not in ("promoted", "superseded", "rolled_back"):
            yield from self.to.ask("DELETE", path, Sent(params={**asked, "purge": True}))
            shown = yield from self.show(arrival)
        return shown

    def next(self, task: str, out: Path | str | None = None) -> Exchange[Start]:
        """What the next expert of a task starts from, with its ticket. With `out` its files come there, and the ticket as `ticket`; a
        download that was broken off goes on. Raises ServiceError `answer.unknown` for a file with another sha256.
        """
        start = yield from self.to.read(Start, "GET", "/v1/next", Sent(params={"task": task}))
        if out is not None:
            place = Path(out)
            place.mkdir(parents=True, exist_ok=True)
            for file in start.files:
                yield from download(self.to, start.place + file.name, place / Path(file.name).name, file)
            (place / "ticket").write_text(start.ticket + "\n", encoding="utf-8")
        return start

    def status(self) -> Exchange[Status]:
        """What runs, and how the service stands."""
        return self.to.read(Status, "GET", "/v1/status")

    def log(self, after: int = 0, head: str | None = None) -> Exchange[list[Entry]]:
        """The next entries of the log after entry `after`, whose sha256 is `head`; none at its end. Raises BrokenLog where one does not
        follow the one before."""
        page = yield from self.to.read(LogPage, "GET", "/v1/log", Sent(params={"after": after, "limit": 500}))
        entries = [
            parse(canonical(one.model_dump()), f"{self.to.url}, entry {one.seq}") for one in page.entries
        ]
        if entries and after:
            return [*chained(entries, after, head or entries[0].prev)]
        return [*chained(entries)]

    def classify(
        self, images: Sequence[Path | bytes], labels: Sequence[str] = (), **asked: Any
    ) -> Exchange[Classified]:
        """What pictures show of `labels`, or of `label_set`; also `templates`, `top`."""
        read = [one if isinstance(one, bytes) else Path(one).read_bytes() for one in images]
        files = [("image", (f"{at}", data, _media(data))) for at, data in enumerate(read)]
        fields: Mapping[str, Any] = {"labels": [*labels], **asked}
        sent = Sent(files=files, data=fields)
        return (yield from self.to.read(Classified, "POST", "/v1/classify", sent))

    def tokens(self) -> Exchange[TokenList]:
        """All tokens, without their secrets."""
        return self.to.read(TokenList, "GET", "/v1/tokens")

    def issue(self, role: str, days: float = 90, **bounds: Any) -> Exchange[TokenIssuedShown]:
        """A new token, whose text is in this answer only; `bounds`: tasks, owners, per_day, note."""
        body = {"role": role, "days": days, **bounds}
        return self.to.read(TokenIssuedShown, "POST", "/v1/tokens", Sent(json=body), again=False)

    def revoke(self, token: str) -> Exchange[None]:
        """End a token by its id."""
        yield from self.to.ask("DELETE", f"/v1/tokens/{token}")

    def _act(self, path: str, body: Mapping[str, Any]) -> Exchange[ArrivalShown]:
        return self.to.read(ArrivalShown, "POST", path, Sent(json=body), again=False)


def _media(data: bytes) -> str:
    if data.startswith(b"\x89PNG"):
        return "image/png"
    return "image/webp" if data[8:12] == b"WEBP" else "image/jpeg"
