"""Batches hold whole works, nothing is answered twice, and no failure or cancellation stops the queue."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import pytest

from workers.serving.batcher import Batcher, Batching, Busy, Closed


@dataclass(frozen=True)
class Some:
    name: str
    size: int = 1


class Model:
    """Answers in capitals; holds every batch until it is let go, and keeps what the batches were."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.go = threading.Event()

    def __call__(self, works: Sequence[Some]) -> Sequence[str | Exception]:
        self.batches.append([work.name for work in works])
        assert self.go.wait(30)
        if any(work.name == "explode" for work in works):
            raise MemoryError("no room")
        return [ValueError(work.name) if work.name == "bad" else work.name.upper() for work in works]


def run(test: Callable[[Batcher[Some, str], Model], Awaitable[None]], **settings: float) -> Model:
    model = Model()

    async def main() -> None:
        batcher: Batcher[Some, str] = Batcher(
            model, Batching(**{"max_batch": 4, "max_wait_ms": 0, **settings})
        )  # type: ignore[arg-type]
        batcher.start()
        try:
            await test(batcher, model)
        finally:
            model.go.set()
            await batcher.close()

    asyncio.run(main())
    return model


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def in_flight(batcher: Batcher[Some, str], model: Model, *works: Some) -> list[asyncio.Task[str]]:
    """Submit a work that occupies the model, then these."""
    first = asyncio.create_task(batcher.submit(Some("first")))
    while not model.batches:
        await asyncio.sleep(0.001)
    found = [first, *(asyncio.create_task(batcher.submit(work)) for work in works)]
    await turns()
    return found


def test_works_that_wait_form_the_next_batch_in_their_order_and_whole() -> None:
    async def test(batcher: Batcher[Some, str], model: Model) -> None:
        tasks = await in_flight(batcher, model, Some("a", 2), Some("b", 1), Some("c", 2), Some("d", 9))
        model.go.set()
        assert await asyncio.gather(*tasks) == ["FIRST", "A", "B", "C", "D"]

    assert run(test).batches == [["first"], ["a", "b"], ["c"], ["d"]]


def test_cancelled_work_is_taken_out_before_the_batch_forms() -> None:
    async def test(batcher: Batcher[Some, str], model: Model) -> None:
        first, gone, stays = await in_flight(batcher, model, Some("gone", 3), Some("stays", 3))
        gone.cancel()
        await turns()
        assert batcher.waiting == 3
        model.go.set()
        assert await asyncio.gather(first, stays) == ["FIRST", "STAYS"]
        assert gone.cancelled()

    assert run(test).batches == [["first"], ["stays"]]


def test_work_cancelled_while_its_batch_runs_leaves_the_others_their_answers() -> None:
    async def test(batcher: Batcher[Some, str], model: Model) -> None:
        first, other = await in_flight(batcher, model, Some("other"))
        first.cancel()
        await turns()
        model.go.set()
        assert await other == "OTHER"

    run(test)


def test_full_queue_refuses_with_the_seconds_after_which_to_come_again() -> None:
    async def test(batcher: Batcher[Some, str], model: Model) -> None:
        tasks = await in_flight(batcher, model, Some("a", 3))
        with pytest.raises(Busy) as refused:
            await batcher.submit(Some("b", 2))
        assert refused.value.retry_after >= 1
        model.go.set()
        await asyncio.gather(*tasks)
        assert await batcher.submit(Some("b", 2)) == "B"

    run(test, queue=4)


def test_failing_work_and_failing_batch_end_alone() -> None:
    async def test(batcher: Batcher[Some, str], model: Model) -> None:
        model.go.set()
        bad, good = await asyncio.gather(
            batcher.submit(Some("bad")), batcher.submit(Some("good")), return_exceptions=True
        )
        assert isinstance(bad, ValueError) and good == "GOOD"
        with pytest.raises(MemoryError):
            await batcher.submit(Some("explode"))
        assert await batcher.submit(Some("after")) == "AFTER"

    run(test)


def test_closing_answers_what_waits_and_takes_no_more() -> None:
    async def test(batcher: Batcher[Some, str], model: Model) -> None:
        tasks = await in_flight(batcher, model, Some("a"), Some("b"))
        closing = asyncio.create_task(batcher.close())
        await turns()
        with pytest.raises(Closed):
            await batcher.submit(Some("late"))
        model.go.set()
        await closing
        assert await asyncio.gather(*tasks) == ["FIRST", "A", "B"]

    run(test)


def test_first_work_waits_for_others_no_longer_than_it_should() -> None:
    async def test(batcher: Batcher[Some, str], model: Model) -> None:
        model.go.set()
        one = asyncio.create_task(batcher.submit(Some("a")))
        await turns(20)
        assert model.batches == []  # a minute is not over
        assert await asyncio.gather(one, *(batcher.submit(Some(name)) for name in "bcd")) == [*"ABCD"]

    assert run(test, max_wait_ms=60_000).batches == [[*"abcd"]]
