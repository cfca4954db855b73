"""Which file a worker of the suite takes next."""

from tests.lanes import next_file

TEXTS = {
    "many": "def test_a(): ...",
    "ray": "def test_b(cluster: Cluster): ...",
    "slow": "@pytest.mark.slow\ndef test_c(): ...",
    "slow ray": "@pytest.mark.slow\ndef test_d(undisturbed: Path): ...",
    "few": "def test_e(cluster_name: str): ...",
}


def taken(with_head: bool) -> list[str]:
    """The order in which one worker alone takes all files."""
    left, order = list(TEXTS), list[str]()
    while left:
        order.append(next_file(left, with_head, TEXTS.__getitem__))
        left.remove(order[-1])
    return order


def test_worker_with_the_head_takes_what_needs_it_first_and_slow_files_before_others() -> None:
    assert taken(True) == ["slow ray", "ray", "few", "many", "slow"]


def test_other_worker_takes_what_needs_no_head_and_at_the_end_what_is_left_of_the_rest() -> None:
    assert taken(False) == ["slow", "many", "few", "ray", "slow ray"]
