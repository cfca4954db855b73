"""Random masks at any position."""

import numpy as np
import pytest

from merge_service.blocks.masks import hashes


@pytest.mark.parametrize("start", range(6))
def test_mask_of_an_element_is_the_same_wherever_its_block_begins(start: int) -> None:
    whole = hashes(np, 7, 0, np.zeros(40))
    assert len(set(whole.tolist())) == 40
    assert hashes(np, 7, start, np.zeros(9)).tolist() == whole[start : start + 9].tolist()
