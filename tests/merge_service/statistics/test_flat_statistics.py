"""The two hundredth arrival of a technique that sees data costs what the second does: instructions of Python and bytes are counted."""

from pathlib import Path

import pytest

from merge_service.merge import advance
from merge_service.merging import Rules
from tests.merge_service.statistics import golden
from tests.pipeline.service.test_flat import Instructions

ARRIVALS, TEN = 200, 10
NAME = 60
"""Bytes of one more name in the list of experts."""


@pytest.mark.parametrize(("technique", "kind"), [("regmean", "gram"), ("fisher", "fisher")])
def test_last_ten_of_two_hundred_cost_what_the_second_to_eleventh_do(
    technique: str, kind: str, tmp_path: Path
) -> None:
    counted, sizes, state = list[int](), list[int](), None
    out = tmp_path / "merged.safetensors"
    for number in range(1, ARRIVALS + 1):
        which, after = number % 3 + 1, tmp_path / f"state{number % 2}.safetensors"
        given = {"expert_id": f"t{number}", "state_in": state, "state_out": after, "threads": 1}
        files = [
            golden.FOLDER / f"toy.{name}.safetensors" for name in ("base", f"expert{which}", f"{kind}{which}")
        ]
        with (
            Instructions()
            if 2 <= number <= TEN + 1 or number > ARRIVALS - TEN
            else _uncounted() as instructions
        ):
            advance(
                technique,
                {},
                files[0],
                files[1],
                out,
                statistics=files[2],
                rules=Rules(any_base=True),
                **given,
            )
        counted.append(instructions.count)
        sizes.append(after.stat().st_size)
        state = after
    early, late = sum(counted[1 : TEN + 1]), sum(counted[-TEN:])
    assert early > 100_000 and late <= 1.2 * early, late / early
    assert sizes[-1] - sizes[0] < NAME * ARRIVALS


class _uncounted:
    """Nothing is counted, because counting takes long."""

    count = 0

    def __enter__(self) -> "_uncounted":
        return self

    def __exit__(self, *_: object) -> None: ...
