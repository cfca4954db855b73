"""What every technique rests on, at the edge: votes that cancel, limits that no float32 equals, blocks of any size."""

import threading

import numpy as np
import pytest

from merge_service.blocks.masks import hashes
from merge_service.blocks.questions import Limits
from merge_service.blocks.spans import GRAIN, Span, run, spans
from merge_service.techniques.place import Place
from merge_service.techniques.rules import Disjoint
from merge_service.techniques.thinning import bounds


@pytest.mark.parametrize("consensus", ["mean", "sum", "max"])
@pytest.mark.parametrize("majority", [-1, 0, 1])
def test_votes_that_cancel_go_to_the_majority_and_stay_at_the_base_without_one(
    consensus: str, majority: int
) -> None:
    rule, zeros = Disjoint({"consensus": consensus}), np.zeros(4, np.float32)
    state = {name: zeros.copy() for name in rule.floats} | {
        name: zeros.astype(np.uint32) for name in rule.words
    }
    for order, x in enumerate(([1, 2, -3, 0], [-1, 2, -3, 0]), 1):
        rule.add(np, state, np.array(x, np.float32), Place(order, 1 / order))
    out, election = rule.result(np, state, majority)
    agreed = 2 if consensus == "sum" else 1
    assert out.tolist() == [majority, 2 * agreed, -3 * agreed, 0]
    assert election.contested and election.balance == 0


@pytest.mark.parametrize("block", [1, GRAIN - 1, GRAIN, GRAIN + 1, 3 * GRAIN])
def test_spans_are_whole_grains_so_that_partial_sums_are_the_same_for_every_block(block: int) -> None:
    size = 7 * GRAIN + 5
    cut = list(spans([("a", size), ("b", 3)], block))
    assert [
        span for span in cut if span.start % GRAIN or (span.stop % GRAIN and span.stop not in (size, 3))
    ] == []
    assert sum(span.size for span in cut if span.name == "a") == size and cut[-1] == Span("b", 0, 3)


def test_results_are_in_the_order_of_the_spans_whichever_ends_first() -> None:
    """So that what is added up is added up in that order."""
    second = threading.Event()

    def work(number: int) -> int:
        if number == 0:
            assert second.wait(30)
        if number == 1:
            second.set()
        return number

    assert run(work, range(5), threads=2) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("start", range(6))
def test_mask_of_an_element_is_the_same_wherever_its_block_begins(start: int) -> None:
    whole = hashes(np, 7, 0, np.zeros(40))
    assert len(set(whole.tolist())) == 40
    assert hashes(np, 7, start, np.zeros(9)).tolist() == whole[start : start + 9].tolist()


@pytest.mark.parametrize("limit", [0.1, 1 / 3, 0.7, 1e-5, 1e-30, 0.5, np.pi])
def test_limit_that_no_float32_equals_is_the_float32_nearest_to_it_and_float64_takes_it_as_it_is(
    limit: float,
) -> None:
    near = np.float32(limit)
    for limits in (Limits(low=limit), Limits(high=limit)):
        low, high = bounds(limits, np.dtype(np.float32))
        assert low <= near <= high, "a number is within the limit that is written like it"
        less, more = np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(np.inf))
        assert (low <= less) == (limits.low == 0) and (more <= high) == (limits.high == np.inf)
        assert bounds(limits, np.dtype(np.float64)) == (limits.low, limits.high)
