"""Spans: how models are cut, and the order of results."""

import threading

import pytest

from merge_service.blocks.spans import GRAIN, Span, run, spans


@pytest.mark.parametrize("block", [1, GRAIN - 1, GRAIN, GRAIN + 1, 3 * GRAIN])
def test_spans_are_whole_grains_so_that_partial_sums_are_the_same_for_every_block(block: int) -> None:
    size = 7 * GRAIN + 5
    cut = list(spans([("a", size), ("b", 3)], block))
    assert [
        span for span in cut if span.start % GRAIN or (span.stop % GRAIN and span.stop not in (size, 3))
    ] == []
    assert sum(span.size for span in cut if span.name == "a") == size and cut[-1] == Span("b", 0, 3)


def test_results_are_in_the_order_of_the_spans_whichever_ends_first() -> None:
    """Sums over the results are therefore added in that order."""
    second = threading.Event()

    def work(number: int) -> int:
        if number == 0:
            assert second.wait(30)
        if number == 1:
            second.set()
        return number

    assert run(work, range(5), threads=2) == [0, 1, 2, 3, 4]
