"""Requests that wait for the model together: a bounded queue out of which batches are formed.

Invariant: a work is answered once, or its waiter is gone; a batch holds whole works, at most `max_batch` together unless one alone is
larger, and none whose waiter is gone; an exception in one batch ends that batch only.
"""

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """A work, which says for how many pictures or texts it counts."""

    @property
    def size(self) -> int: ...


W = TypeVar("W", bound=Sized)
A = TypeVar("A")


@dataclass(frozen=True)
class Batching:
    """At most `max_batch` pictures or texts in a batch; the first of them waits at most `max_wait_ms` for more; at most `queue` wait."""

    max_batch: int = 32
    max_wait_ms: float = 4.0
    queue: int = 256


class Busy(Exception):
    """No room to wait; `retry_after` is the seconds after which there should be some."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"busy, try again in {self.retry_after} s"


class Closed(Exception):
    """The process is ending and takes no more work."""


@dataclass(eq=False)
class _Waiting(Generic[W, A]):
    work: W
    future: "asyncio.Future[A]"
    since: float


class Batcher(Generic[W, A]):
    """Calls `run` with lists of works, in one thread of its own; it returns an answer or an exception for each.

    `formed` is called with the size of every batch, and what still waits.
    """

    def __init__(
        self,
        run: Callable[[Sequence[W]], Sequence[A | Exception]],
        settings: Batching,
        formed: Callable[[int, int], None] = lambda size, waiting: None,
    ) -> None:
        self._run, self._settings, self._formed = run, settings, formed
        self._queue: deque[_Waiting[W, A]] = deque()
        self._came, self._idle = asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._closed, self._seconds = False, 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._forming: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Form batches from now on, in the running event loop."""
        self._forming = asyncio.get_running_loop().create_task(self._forever())

    @property
    def waiting(self) -> int:
        """Pictures and texts in the queue."""
        return sum(one.work.size for one in self._queue)

    async def submit(self, work: W) -> A:
        """The answer to a work; cancelling this takes it out of the queue. Raises Busy, Closed, and what `run` gave in its place."""
        if self._closed:
            raise Closed
        if self._queue and self.waiting + work.size > self._settings.queue:
            raise Busy(self.retry_after())
        one = _Waiting[W, A](work, asyncio.get_running_loop().create_future(), time.monotonic())
        self._queue.append(one)
        self._idle.clear()
        self._came.set()
        try:
            return await one.future
        finally:
            with contextlib.suppress(ValueError):  # it is in a batch
                self._queue.remove(one)

    def retry_after(self) -> int:
        """Seconds, at least 1, until what waits now should be answered."""
        batches = self.waiting / self._settings.max_batch
        return max(1, math.ceil(batches * self._seconds))

    async def close(self) -> None:
        """Take no more work, answer what waits, end."""
        self._closed = True
        self._came.set()
        if self._forming is not None:
            await self._idle.wait()
            self._forming.cancel()
        self._thread.shutdown(wait=False)

    async def _forever(self) -> None:
        while True:
            await self._until_due()
            batch = self._taken()
            if batch:
                await self._answer(batch)
            if not self._queue:
                self._idle.set()

    async def _until_due(self) -> None:
        """Wait until the queue holds a whole batch, or its first work has waited long enough."""
        while not self._queue:
            self._idle.set()
            self._came.clear()
            await self._came.wait()
        due = self._queue[0].since + self._settings.max_wait_ms / 1000
        while self._queue and self.waiting < self._settings.max_batch and not self._closed:
            left = due - time.monotonic()
            if left <= 0:
                return
            self._came.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._came.wait(), left)

    def _taken(self) -> list[_Waiting[W, A]]:
        batch: list[_Waiting[W, A]] = []
        size = 0
        while self._queue:
            one = self._queue[0]
            if one.future.done():  # its waiter was cancelled in this very turn of the loop
                self._queue.popleft()
                continue
            if batch and size + one.work.size > self._settings.max_batch:
                break
            batch.append(self._queue.popleft())
            size += one.work.size
        if batch:
            self._formed(size, self.waiting)
        return batch

    async def _answer(self, batch: list[_Waiting[W, A]]) -> None:
        started = time.monotonic()
        works = [one.work for one in batch]
        answers: Sequence[A | Exception]
        try:
            answers = await asyncio.get_running_loop().run_in_executor(self._thread, self._run, works)
        except Exception as error:
            answers = [error] * len(batch)
        spent = time.monotonic() - started
        self._seconds = spent if not self._seconds else 0.9 * self._seconds + 0.1 * spent
        for one, answer in zip(batch, answers, strict=True):
            if one.future.done():
                continue
            if isinstance(answer, Exception):
                one.future.set_exception(answer)
            else:
                one.future.set_result(answer)
