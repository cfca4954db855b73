"""One HTTP connection, with bounds that uvicorn's own protocol lacks: on connections, and on the time until a request's headers are there.

uvicorn waits for headers without end, and discards what follows an early answer for as long as it comes.
Invariant: a connection that is given no whole request within `header_s` is closed, so slow clients hold no more than `connections`.
"""

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from pipeline.service.http.problems import CODES, MEDIA_TYPE, PLACE


class BoundedProtocol(H11Protocol):
    """As uvicorn's. Subclasses state the bounds (`bounded`)."""

    connections_at_most = 512
    header_seconds = 10.0
    idle_seconds = 30.0
    _due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """As of asyncio."""
        super().connection_made(transport)
        if len(self.connections) > self.connections_at_most:
            transport.write(_full())
            transport.close()
        else:
            self._expect(self.header_seconds)

    def data_received(self, data: bytes) -> None:
        """As of asyncio."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget()

    def on_response_complete(self) -> None:
        """As of uvicorn."""
        super().on_response_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            self._expect(self.idle_seconds + self.header_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        """As of asyncio."""
        self._forget()
        super().connection_lost(exc)

    def _expect(self, seconds: float) -> None:
        self._forget()
        self._due = self.loop.call_later(seconds, self.transport.abort)

    def _forget(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None


def bounded(connections: int, header_seconds: float, idle_seconds: float) -> type[BoundedProtocol]:
    """The protocol with these bounds, as uvicorn takes it. A connection between requests may be idle for `idle_seconds`."""
    bounds: dict[str, Any] = {
        "connections_at_most": connections,
        "header_seconds": header_seconds,
        "idle_seconds": idle_seconds,
    }
    return type("Bounded", (BoundedProtocol,), bounds)


def _full() -> bytes:
    status, title, _ = CODES["service.busy"]
    body = {
        "type": PLACE + "service.busy",
        "title": title,
        "status": status,
        "detail": "too many connections",
    }
    data = json.dumps(
        {**body, "instance": "urn:uuid:00000000-0000-0000-0000-000000000000", "code": "service.busy"}
    )
    head = (
        f"HTTP/1.1 {status} Service Unavailable\r\nContent-Type: {MEDIA_TYPE}\r\nContent-Length: {len(data)}\r\n"
        "Retry-After: 1\r\nConnection: close\r\n\r\n"
    )
    return (head + data).encode("ascii")
