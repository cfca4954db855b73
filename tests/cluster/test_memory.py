"""Peak memory of a step: it rises with what is held, and falls again for the next."""

import numpy as np

from cluster.memory import peak_on_gpu, peak_resident, reset_peaks

SIZE = 200 * 2**20


def test_peak_is_that_of_the_step_and_not_of_the_one_before() -> None:
    reset_peaks()
    before = peak_resident()
    held = np.ones(SIZE // 8)
    during = peak_resident()
    assert during - before > 0.9 * SIZE
    del held
    reset_peaks()
    assert peak_resident() < during - 0.9 * SIZE


def test_without_a_gpu_there_is_no_memory_on_it() -> None:
    assert peak_on_gpu() == 0
