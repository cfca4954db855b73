"""A model that answers while it is exchanged: one reference to a snapshot, and a queue in front of it.

New weights are loaded and warmed in a thread beside, then the reference is replaced; no process restarts, and batches that run keep the
snapshot that they began with, which is freed with its last user.
Invariant: weights that cannot be served change nothing but `standing`; an answer comes whole from one snapshot.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from merge_service.live import Observed
from workers.serving.batcher import Batcher, Batching, Busy
from workers.serving.labels import LabelSet, LabelSets
from workers.serving.served import Head, Served, Trial
from workers.serving.snapshot import Answer, Snapshot, WeightsRefused, Work
from workers.serving.trying import Trying

POLL_SECONDS = 0.2
FIRST_RETRY, LAST_RETRY = 1.0, 60.0
"""Seconds until weights that could not be loaded are tried again: twice as long each time."""
CARRIED = 8
"""Label sets of requests, the last ones, that new weights embed before they are served; registered ones are all embedded."""
PREPARING = 8
"""Label sets of requests that may wait for their embeddings."""
T = TypeVar("T")
log = logging.getLogger("temporal_merge.serving")


class NothingServed(Exception):
    """No weights are loaded yet."""


@dataclass(frozen=True)
class Standing:
    """What is served, what should be (the two differ while weights are loaded), and the code of what is wrong with the latter."""

    served: Served | None = None
    wanted: Served | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Observers:
    """What is called with the seconds of a swap and whether it succeeded, with the size of a batch and what still waits, and with what
    is served."""

    swapped: Callable[[float, bool], None] = lambda seconds, success: None
    formed: Callable[[int, int], None] = lambda size, waiting: None
    serves: Callable[[Served], None] = lambda served: None


class Serving:
    """A model with the configuration of the directory `home`. To be started in an event loop, and closed there."""

    def __init__(
        self,
        home: Path,
        batching: Batching,
        label_sets: LabelSets,
        device: str = "cpu",
        observers: Observers = Observers(),
    ) -> None:
        self._home, self._device, self._batching = home, device, batching
        self._label_sets, self._observers = label_sets, observers
        self._snapshot: Snapshot | None = None
        self.standing = Standing()
        self._batcher: Batcher[Work, Answer] = Batcher(self._answer, batching, observers.formed)
        self._loading = ThreadPoolExecutor(1, thread_name_prefix="load")
        self._embedding = ThreadPoolExecutor(1, thread_name_prefix="labels")
        self._swapping = asyncio.Lock()
        self._trying = Trying(partial(self._run, self._loading, self._loaded), batching)
        self._preparing: dict[tuple[int, str], asyncio.Future[Any]] = {}

    @property
    def waiting(self) -> int:
        """Pictures and texts in the queue."""
        return self._batcher.waiting

    async def start(self, head: Head) -> None:
        """Load what the head says, and answer from now on, in the running event loop.

        Where that cannot be loaded, a process that was just started serves the newest of the kept weights that can.
        """
        self._batcher.start()
        self._trying.start()
        current = head.current()
        kept = sorted(head.kept(), key=lambda served: -served.seq)
        problem = None
        for served in [] if current is None else [current, *(one for one in kept if one != current)]:
            try:
                await self.swap(served)
            except WeightsRefused as refused:
                problem = problem or refused.code
            else:
                break
        self.standing = Standing(self.standing.served, current, problem)

    async def swap(self, served: Served) -> None:
        """Serve these weights from now on. Raises WeightsRefused, and then what was served goes on."""
        async with self._swapping:
            started = time.monotonic()
            self.standing = Standing(self.standing.served, served, self.standing.problem)
            try:
                made = await self._run(self._loading, self._loaded, served)
            except WeightsRefused as refused:
                self.standing = Standing(self.standing.served, served, refused.code)
                self._observers.swapped(time.monotonic() - started, False)
                log.warning("t=%d (%s) is not served: %s", served.t, served.sha256[:12], refused)
                raise
            self._snapshot = made
            self.standing = Standing(served, served)
            self._observers.swapped(time.monotonic() - started, True)
            self._observers.serves(served)
            log.info("t=%d (%s) is served", served.t, served.sha256[:12])

    async def follow(self, head: Head, every: float = POLL_SECONDS) -> None:
        """Serve what the head says, for ever. Weights that cannot be served are tried again, ever more seldom."""
        wait, again = FIRST_RETRY, 0.0
        refused: Served | None = None
        while True:
            wanted = head.current()
            if wanted is not None and wanted != self.standing.served:
                if wanted != refused:
                    wait, again = FIRST_RETRY, 0.0
                if time.monotonic() >= again:
                    try:
                        await self.swap(wanted)
                        refused = None
                    except WeightsRefused:
                        refused, again, wait = wanted, time.monotonic() + wait, min(2 * wait, LAST_RETRY)
            elif self.standing.problem is not None:  # the head went back to what is served
                self.standing, refused = Standing(self.standing.served, wanted), None
            await asyncio.sleep(every)

    async def follow_trials(
        self,
        wanted: Callable[[], Trial | None],
        tell: Callable[[str, Observed], None],
        every: float = POLL_SECONDS,
    ) -> None:
        """Try on real requests what is wanted, for ever, and tell by its key what was observed."""
        while True:
            with contextlib.suppress(OSError):  # it is told again
                await self._trying.follow(wanted(), tell)
            await asyncio.sleep(every)

    async def answer(self, work: Work, session: str = "") -> Answer:
        """The answer of what is served, or of a candidate that is tried on requests of this session (any text).

        Raises NothingServed, Busy, Closed, and FloatingPointError where the model's numbers are not finite.
        """
        if self._snapshot is None:
            raise NothingServed
        return await (
            self._trying.answer(work, self._usual) if self._trying.takes(session) else self._usual(work)
        )

    async def _usual(self, work: Work) -> Answer:
        if work.labels is not None:
            await self.prepare(work.labels)
        return await self._batcher.submit(work)

    async def prepare(self, labels: LabelSet) -> None:
        """Embed a label set in a thread of its own, so that batches do not wait for it. Requests that ask at once share the work."""
        snapshot = self._snapshot
        if snapshot is None or snapshot.knows(labels):
            return
        key = (id(snapshot), labels.digest)
        if key not in self._preparing:
            if len(self._preparing) >= PREPARING:
                raise Busy(self._batcher.retry_after())
            made: asyncio.Future[Any] = asyncio.ensure_future(
                self._run(self._embedding, snapshot.classifier, labels)
            )
            made.add_done_callback(lambda _: self._preparing.pop(key, None))
            made.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._preparing[key] = made
        await asyncio.shield(self._preparing[key])

    async def close(self) -> None:
        """Answer what waits, and end."""
        await self._batcher.close()
        await self._trying.close()
        for pool in (self._loading, self._embedding):
            pool.shutdown(wait=False, cancel_futures=True)

    def _loaded(self, served: Served) -> Snapshot:
        known = self._snapshot.known()[-CARRIED:] if self._snapshot else []
        wanted = {one.digest: one for one in (*known, *self._label_sets.every())}
        try:
            made = Snapshot(self._home, served, self._device)
            made.warm(list(wanted.values()), self._batching.max_batch)
        except WeightsRefused:
            raise
        except (
            Exception
        ) as error:  # of torch, open_clip or the file system: what is served goes on all the same
            raise WeightsRefused(
                "weights.failed", f"{served.path}: {type(error).__name__}: {error}"
            ) from error
        return made

    def _answer(self, works: Sequence[Work]) -> Sequence[Answer | Exception]:
        snapshot = self._snapshot
        assert snapshot is not None  # set before the first work
        return snapshot.answer(works)

    @staticmethod
    async def _run(pool: ThreadPoolExecutor, call: Callable[..., T], *given: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, partial(call, *given))


def use_threads(count: int) -> None:
    """Let this process's models compute with so many threads."""
    torch.set_num_threads(count)
