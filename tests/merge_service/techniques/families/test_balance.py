"""SCE and PCB: which elements and experts count, also where their references fail."""

from pathlib import Path

import numpy as np

from tests.merge_service.toys import way


def test_sce_is_the_expert_where_experts_agree_however_little_they_moved(tmp_path: Path) -> None:
    for size in (1, 1e-6):  # MergeKit weighs all alike below a mean square of 1e-6
        tau = np.float32(size) * np.float32([1, -2, 3, 0])
        np.testing.assert_array_equal(way(tmp_path, "sce", {}, tau), tau)
        np.testing.assert_array_equal(way(tmp_path, "sce", {}, tau, tau, tau), tau)
        large = way(tmp_path, "sce", {"density": 1}, tau, 2 * tau)
        np.testing.assert_allclose(large, tau * (1 + 4 * 2) / 5, rtol=1e-6)


def test_sce_selects_a_share_of_the_positions_that_differ(tmp_path: Path) -> None:
    one, other = np.zeros(100, np.float32), np.zeros(100, np.float32)
    one[:20], other[20:30] = np.arange(1, 21), 0.5
    out = way(tmp_path, "sce", {"density": 0.1}, one, other)  # 3 of 30 that differ, not 10 of 100
    np.testing.assert_array_equal(np.flatnonzero(out), [17, 18, 19])
    assert np.count_nonzero(way(tmp_path, "sce", {"density": 0.001}, one, other)) == 1


def test_pcb_survives_equal_magnitudes_equal_scores_and_many_experts(tmp_path: Path) -> None:
    for how in ("sum", "pairs"):
        params = {"density": 0.5, "inter_balance": how}
        for granularity in ("tensor", "model"):
            equal = way(tmp_path, "pcb", params | {"granularity": granularity}, [2, 2, 2, 2])
            assert np.isfinite(equal).all() and set(equal) <= {0, 2}
        np.testing.assert_array_equal(way(tmp_path, "pcb", params, [0, 0, 0], [0, 0, 0]), [0, 0, 0])
        taus = [
            [1, -2, 0.25 + i / 128, 4] for i in range(100)
        ]  # exp(n) overflows float32 at 89, float64 at 710
        many = way(tmp_path, "pcb", params, *taus)
        np.testing.assert_array_equal(many, [0, -2, 0, 2])  # the largest magnitude is clamped to the next
    twenty = way(tmp_path, "pcb", {"density": 1, "winsorize": 0}, np.arange(1, 21))
    assert twenty[0] == 0 and np.all(twenty[1:18] == np.arange(2, 19))  # the lowest score counts for nothing
