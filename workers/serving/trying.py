"""A candidate that answers real requests beside what is served, in one process.

Both answer, and what they say is compared. Of a canary the candidate's answer is returned, of a shadow it is not.
Invariant: whatever the candidate does, a request has the answer of what is served if the candidate gives none, and its client waits for
a comparison in no case.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from merge_service.live import Observed
from workers.serving.batcher import Batcher, Batching, Busy, Closed
from workers.serving.served import Served, Trial
from workers.serving.snapshot import Answer, Snapshot, WeightsRefused, Work

Timed = tuple[Answer, float]
"""An answer, and the seconds until it was there."""
log = logging.getLogger("temporal_merge.serving")


class Trying:
    """The trial of one process. `load` gives the snapshot of weights. To be started in an event loop, and closed there."""

    def __init__(self, load: Callable[[Served], Awaitable[Snapshot]], batching: Batching) -> None:
        self._load = load
        self._trial: Trial | None = None
        self._snapshot: Snapshot | None = None
        self._batcher: Batcher[Work, Answer] = Batcher(self._answer, batching)
        self._comparing = set[asyncio.Task[None]]()
        self._told: tuple[str, Observed] | None = None
        self.observed = Observed()

    def start(self) -> None:
        """Answer from now on, in the running event loop."""
        self._batcher.start()

    async def follow(self, wanted: Trial | None, tell: Callable[[str, Observed], None]) -> None:
        """Try this candidate from now on, and tell what was observed where that has changed. One that cannot be loaded has failed."""
        if wanted != self._trial:
            self._trial, self._snapshot, self.observed = wanted, None, Observed()
            if wanted is not None:
                try:
                    self._snapshot = await self._load(wanted.served)
                except WeightsRefused as refused:
                    log.warning("the candidate %s is not tried: %s", wanted.served.sha256[:12], refused)
                    self.observed = Observed(requests=1, failed=1)
        if self._trial is not None and (known := (self._trial.key, self.observed)) != self._told:
            await asyncio.to_thread(tell, *known)
            self._told = known

    def takes(self, session: str) -> bool:
        """Whether a request of this session is answered by the candidate too."""
        return self._trial is not None and self._snapshot is not None and self._trial.takes(session)

    async def answer(self, work: Work, usual: Callable[[Work], Awaitable[Answer]]) -> Answer:
        """The answer to a work that the candidate takes; `usual` asks what is served. Raises what that raises."""
        trial = self._trial
        served = asyncio.ensure_future(_timed(usual(work)))
        tried = asyncio.ensure_future(_timed(self._submit(work)))
        try:
            first, second = (served, tried) if trial is None or trial.shadow else (tried, served)
            await asyncio.wait({first})
            found = first if first is served or first.exception() is None else second
            answer, _ = await found
        except asyncio.CancelledError:  # its client has gone away
            served.cancel()
            tried.cancel()
            raise
        finally:
            comparing = asyncio.ensure_future(self._compare(trial, work, served, tried))
            self._comparing.add(comparing)
            comparing.add_done_callback(self._comparing.discard)
        return answer

    async def close(self) -> None:
        """Answer what waits, and end."""
        await self._batcher.close()
        for one in self._comparing:
            one.cancel()

    async def _submit(self, work: Work) -> Answer:
        snapshot = self._snapshot
        if snapshot is None:
            raise Closed
        if work.labels is not None and not snapshot.knows(work.labels):
            await asyncio.to_thread(snapshot.classifier, work.labels)
        return await self._batcher.submit(work)

    async def _compare(
        self, trial: Trial | None, work: Work, served: "asyncio.Future[Timed]", tried: "asyncio.Future[Timed]"
    ) -> None:
        await asyncio.wait({served, tried})
        if served.cancelled() or tried.cancelled():
            return
        wrong, usual = tried.exception(), served.exception()
        if usual is not None or isinstance(wrong, Busy | Closed) or trial != self._trial:
            return  # nothing to compare with, or the candidate was not asked
        if wrong is not None:
            self.observed += Observed(requests=1, failed=1)
            return
        (new, seconds), (old, before) = tried.result(), served.result()
        pictures = agreed = 0
        if work.labels is not None:
            pictures = len(new.values)
            agreed = int(np.sum(new.values.argmax(axis=1) == old.values.argmax(axis=1)))
        self.observed += Observed(1, 0, pictures, agreed, seconds, before)

    def _answer(self, works: Sequence[Work]) -> Sequence[Answer | Exception]:
        snapshot = self._snapshot
        return [Closed()] * len(works) if snapshot is None else snapshot.answer(works)


async def _timed(asked: Awaitable[Answer]) -> Timed:
    began = time.monotonic()
    return await asked, time.monotonic() - began
