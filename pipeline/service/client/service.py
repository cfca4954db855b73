"""`Service`: what a live service does, as Python calls over HTTP.

    service = Service("http://127.0.0.1:8420", token)
    came = service.arrive("runs/expert", task="letters", owner="ann", license="MIT")
    print(service.wait(came.id).status)

Invariant: every call is one that the documentation of the routes describes; a refusal is a `ServiceError` with its code.
"""

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from merge_service.live import Entry, canonical, chained, parse
from pipeline.service.client.connection import Connection, Sent
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


class Service:
    """A live service at `url`; `token` says who asks. Every call raises ServiceError for what is refused."""

    def __init__(self, url: str, token: str, patience: float = 60.0) -> None:
        self._to = Connection(url, token, patience)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._to.close()

    def arrive(
        self,
        checkpoint: Path | str,
        task: str,
        ticket: str | None = None,
        progress: Progress = lambda *_: None,
        **said: str,
    ) -> Came:
        """Send an expert; what of it came before is not sent again. `said`: owner, license, note, init (base or foreign), replaces.

        Raises UserError for what is no checkpoint.
        """
        number = upload(self._to, task, sources(Path(checkpoint)), progress)
        replaces = said.pop("replaces", None)
        body = {"task": task, "upload": number, **said, **({"init_ticket": ticket} if ticket else {})}
        method, path = (
            ("PUT", f"/v1/arrivals/{replaces}/replacement") if replaces else ("POST", "/v1/arrivals")
        )
        sent = Sent(json=body, headers={"idempotency-key": secrets.token_hex(16)})
        return self._to.read(Came, method, path, sent)

    def show(self, arrival: str, wait: int = 0) -> ArrivalShown:
        """One arrival; after `wait` seconds at most once it is decided."""
        return self._to.read(ArrivalShown, "GET", f"/v1/arrivals/{arrival}", Sent(params={"wait": wait}))

    def wait(self, arrival: str, seconds: float | None = None) -> ArrivalShown:
        """One arrival, once the service has decided about it. Raises TimeoutError after `seconds`."""
        until = None if seconds is None else time.monotonic() + seconds
        while True:
            left = _WAIT if until is None else max(0, min(_WAIT, int(until - time.monotonic()) + 1))
            found = self.show(arrival, left)
            if found.status in FINAL:
                return found
            if until is not None and time.monotonic() >= until:
                raise TimeoutError(f"{arrival} is still {found.status}")

    def arrivals(self, status: str | None = None, task: str | None = None) -> Iterator[ArrivalShown]:
        """All arrivals in the order they came, as far as they are of this status and task."""
        asked: dict[str, Any] = {"limit": _PAGE, "status": status, "task": task}
        after: str | None = None
        while True:
            params = {key: value for key, value in {**asked, "after": after}.items() if value is not None}
            page = self._to.read(ArrivalPage, "GET", "/v1/arrivals", Sent(params=params))
            yield from page.arrivals
            if (after := page.next) is None:
                return

    def lineage(self, arrival: str) -> Lineage:
        """What an arrival was trained from, and what was trained from it."""
        return self._to.read(Lineage, "GET", f"/v1/arrivals/{arrival}/lineage")

    def release(self, arrival: str, reason: str) -> ArrivalShown:
        """Let an arrival go on in spite of why it was stopped."""
        return self._act(f"/v1/arrivals/{arrival}/release", {"reason": reason})

    def promote(self, arrival: str, reason: str) -> ArrivalShown:
        """Serve what an accepted arrival brought, which undoes a rollback; or let a held one go on."""
        return self._act(f"/v1/arrivals/{arrival}/promote", {"reason": reason})

    def reject(self, arrival: str, reason: str) -> ArrivalShown:
        """Refuse a held candidate."""
        return self._act(f"/v1/arrivals/{arrival}/reject", {"reason": reason})

    def rollback(self, t: int, reason: str, hold: bool = False, if_head: str | None = None) -> Standing:
        """Serve time step `t`. With `if_head` only if the log still ends with it."""
        body = {"t": t, "reason": reason, "hold": hold, **({"if_head": if_head} if if_head else {})}
        return self._to.read(Standing, "POST", "/v1/rollback", Sent(json=body), again=False)

    def remove(
        self, arrival: str, reason: str, descendants: str = "none", force: bool = False, purge: bool = False
    ) -> ArrivalShown:
        """Take an expert out of all merges, and wait until that is done. It is still accepted then if a gate has kept it."""
        asked = {"reason": reason, "descendants": descendants, "force": force}
        path = f"/v1/arrivals/{arrival}"
        self._to.ask("DELETE", path, Sent(params=asked))
        while (live := self.status().live) is not None and live.removal is not None:
            time.sleep(0.2)
        if purge and self.show(arrival).status not in ("promoted", "superseded", "rolled_back"):
            self._to.ask("DELETE", path, Sent(params={**asked, "purge": True}))
        return self.show(arrival)

    def next(self, task: str, out: Path | str | None = None) -> Start:
        """What the next expert of a task starts from, with its ticket. With `out` its files come there, and the ticket as `ticket`; a
        download that was broken off goes on. Raises ServiceError `answer.unknown` for a file with another sha256.
        """
        start = self._to.read(Start, "GET", "/v1/next", Sent(params={"task": task}))
        if out is not None:
            place = Path(out)
            place.mkdir(parents=True, exist_ok=True)
            for file in start.files:
                download(self._to, start.place + file.name, place / Path(file.name).name, file)
            (place / "ticket").write_text(start.ticket + "\n", encoding="utf-8")
        return start

    def status(self) -> Status:
        """What runs, and how the service stands."""
        return self._to.read(Status, "GET", "/v1/status")

    def log(self, after: int = 0) -> Iterator[Entry]:
        """The entries of the log from `after` on. Raises BrokenLog where one does not follow the one before."""
        entries = self._entries(after)
        if not after:
            return chained(entries)
        first = next(entries, None)
        return iter(()) if first is None else chained(_again(first, entries), after, first.prev)

    def classify(
        self, images: Sequence[Path | bytes], labels: Sequence[str] = (), **asked: Any
    ) -> Classified:
        """What pictures show of `labels`, or of `label_set`; also `templates`, `top`."""
        read = [one if isinstance(one, bytes) else Path(one).read_bytes() for one in images]
        files = [("image", (f"{at}", data, _media(data))) for at, data in enumerate(read)]
        fields: Mapping[str, Any] = {"labels": [*labels], **asked}
        return self._to.read(Classified, "POST", "/v1/classify", Sent(files=files, data=fields))

    def tokens(self) -> TokenList:
        """All tokens, without their secrets."""
        return self._to.read(TokenList, "GET", "/v1/tokens")

    def issue(self, role: str, days: float = 90, **bounds: Any) -> TokenIssuedShown:
        """A new token, whose text is in this answer only; `bounds`: tasks, owners, per_day, note."""
        body = {"role": role, "days": days, **bounds}
        return self._to.read(TokenIssuedShown, "POST", "/v1/tokens", Sent(json=body), again=False)

    def revoke(self, token: str) -> None:
        """End a token by its id."""
        self._to.ask("DELETE", f"/v1/tokens/{token}")

    def _act(self, path: str, body: Mapping[str, Any]) -> ArrivalShown:
        return self._to.read(ArrivalShown, "POST", path, Sent(json=body), again=False)

    def _entries(self, after: int) -> Iterator[Entry]:
        while True:
            page = self._to.read(LogPage, "GET", "/v1/log", Sent(params={"after": after, "limit": 500}))
            for one in page.entries:
                entry = parse(canonical(one.model_dump()), f"{self._to.url}, entry {one.seq}")
                after = entry.seq
                yield entry
            if not page.entries:
                return


def _again(first: Entry, rest: Iterator[Entry]) -> Iterator[Entry]:
    yield first
    yield from rest


def _media(data: bytes) -> str:
    if data.startswith(b"\x89PNG"):
        return "image/png"
    return "image/webp" if data[8:12] == b"WEBP" else "image/jpeg"
