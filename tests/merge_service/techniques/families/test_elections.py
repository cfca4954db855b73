"""Elected signs: votes that cancel, and a second trim."""

from pathlib import Path

import numpy as np
import pytest

from merge_service.merge import merge
from merge_service.techniques.families.elections import Disjoint
from merge_service.techniques.place import Place
from tests.merge_service import toys
from tests.merge_service.toys import Files


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


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


def test_dare_ties_with_a_second_trim_is_ties_of_what_was_dropped(files: Files) -> None:
    """FusionBench and MergeLM: DARE first, TIES with its own trim on the result."""
    params = {"density": 0.5, "seed": 3}
    dropped = []
    for number, path in enumerate(files.paths):
        dropped.append(files.room / f"dropped{number}.safetensors")
        merge("dare", params | {"scale": 1}, files.start, [path], dropped[-1], ids=[f"t{number}"])
    merge("ties", {"density": 0.3, "granularity": "tensor"}, files.start, dropped, files.out)
    expected = toys.load(files.out)
    params |= {"trim": 0.3, "granularity": "tensor"}
    result = files.merge("dare_ties", params, ids=["t0", "t1"])
    for name in set(expected) - {"logit_scale"}:
        np.testing.assert_array_equal(result[name], expected[name], err_msg=name)
