"""Means of weights: identities between them."""

from pathlib import Path

import numpy as np
import pytest

from merge_service.errors import TechniqueError
from merge_service.merge import fold
from tests.merge_service.toys import Files


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_wise_ft_lies_between_the_base_and_the_average(files: Files) -> None:
    average, base = files.merge("average"), files.base
    for weight in (0.25, 1):
        result = files.merge("wise_ft", {"weight": weight})
        for name in result.keys() - {"position_ids", "visual.mask", "logit_scale"}:
            between = base[name] + weight * (average[name] - base[name])
            np.testing.assert_allclose(result[name], between, rtol=1e-6, atol=1e-6)
    with pytest.raises(TechniqueError, match="wise_ft has no fold form"):
        fold("wise_ft", {}, files.start, files.paths[0], files.paths[1], files.out)
