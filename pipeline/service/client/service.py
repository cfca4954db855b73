"""`Service` and `AsyncService`: what a live service does, as Python calls over HTTP.

    service = Service("http://127.0.0.1:8420", token)
    came = service.arrive("runs/expert", task="letters", owner="ann", license="MIT")
    print(service.wait(came.id).status)

`AsyncService` has the same calls for an event loop: `await service.wait(...)`, `async for entry in service.log()`.
Invariant: both carry out the same `Calls`, so they differ in how they wait and in nothing else.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import wraps
from types import TracebackType
from typing import Concatenate, ParamSpec, Self, TypeVar

from merge_service.live import Entry
from pipeline.service.client.calls import Calls
from pipeline.service.client.connection import AsyncConnection, Connection, Exchange
from pipeline.service.http.live.schemas import ArrivalShown

P = ParamSpec("P")
T = TypeVar("T")


def _blocking(
    call: Callable[Concatenate[Calls, P], Exchange[T]],
) -> Callable[Concatenate["Service", P], T]:
    @wraps(call)
    def method(self: "Service", *given: P.args, **named: P.kwargs) -> T:
        return self._to.carry_out(call(self._calls, *given, **named))

    return method


def _awaited(
    call: Callable[Concatenate[Calls, P], Exchange[T]],
) -> Callable[Concatenate["AsyncService", P], Awaitable[T]]:
    @wraps(call)
    async def method(self: "AsyncService", *given: P.args, **named: P.kwargs) -> T:
        return await self._to.carry_out(call(self._calls, *given, **named))

    return method


class Service:
    """A live service at `url`; `token` says who asks. Every call raises ServiceError for what is refused."""

    def __init__(self, url: str, token: str, patience: float = 60.0) -> None:
        self._to = Connection(url, token, patience)
        self._calls = Calls(self._to.peer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._to.close()

    arrive = _blocking(Calls.arrive)
    show = _blocking(Calls.show)
    wait = _blocking(Calls.wait)
    lineage = _blocking(Calls.lineage)
    release = _blocking(Calls.release)
    promote = _blocking(Calls.promote)
    reject = _blocking(Calls.reject)
    rollback = _blocking(Calls.rollback)
    remove = _blocking(Calls.remove)
    next = _blocking(Calls.next)
    status = _blocking(Calls.status)
    classify = _blocking(Calls.classify)
    tokens = _blocking(Calls.tokens)
    issue = _blocking(Calls.issue)
    revoke = _blocking(Calls.revoke)

    def arrivals(self, status: str | None = None, task: str | None = None) -> Iterator[ArrivalShown]:
        """All arrivals in the order they came, as far as they are of this status and task."""
        page = self._to.carry_out(self._calls.arrivals(status, task))
        yield from page.arrivals
        while page.next is not None:
            page = self._to.carry_out(self._calls.arrivals(status, task, page.next))
            yield from page.arrivals

    def log(self, after: int = 0) -> Iterator[Entry]:
        """The entries of the log from `after` on. Raises BrokenLog where one does not follow the one before."""
        head = None
        while entries := self._to.carry_out(self._calls.log(after, head)):
            yield from entries
            after, head = entries[-1].seq, entries[-1].sha256


class AsyncService:
    """As `Service`, in an event loop."""

    def __init__(self, url: str, token: str, patience: float = 60.0) -> None:
        self._to = AsyncConnection(url, token, patience)
        self._calls = Calls(self._to.peer)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._to.close()

    arrive = _awaited(Calls.arrive)
    show = _awaited(Calls.show)
    wait = _awaited(Calls.wait)
    lineage = _awaited(Calls.lineage)
    release = _awaited(Calls.release)
    promote = _awaited(Calls.promote)
    reject = _awaited(Calls.reject)
    rollback = _awaited(Calls.rollback)
    remove = _awaited(Calls.remove)
    next = _awaited(Calls.next)
    status = _awaited(Calls.status)
    classify = _awaited(Calls.classify)
    tokens = _awaited(Calls.tokens)
    issue = _awaited(Calls.issue)
    revoke = _awaited(Calls.revoke)

    async def arrivals(
        self, status: str | None = None, task: str | None = None
    ) -> AsyncIterator[ArrivalShown]:
        """All arrivals in the order they came, as far as they are of this status and task."""
        page = await self._to.carry_out(self._calls.arrivals(status, task))
        while True:
            for one in page.arrivals:
                yield one
            if page.next is None:
                return
            page = await self._to.carry_out(self._calls.arrivals(status, task, page.next))

    async def log(self, after: int = 0) -> AsyncIterator[Entry]:
        """The entries of the log from `after` on. Raises BrokenLog where one does not follow the one before."""
        head = None
        while entries := await self._to.carry_out(self._calls.log(after, head)):
            for one in entries:
                yield one
            after, head = entries[-1].seq, entries[-1].sha256
