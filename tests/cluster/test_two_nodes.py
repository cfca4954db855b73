"""A submitted study over two nodes with their own IPs: the client is killed, a new one attaches, the bits are those of a local
run.
"""

from pathlib import Path

import pytest

from tests.cluster.nodes import NEEDS, possible
from tests.cluster.two_nodes import scenario


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not possible(), reason=NEEDS)
def test_study_submitted_to_two_nodes_survives_its_client_and_equals_the_local_run(tmp_path: Path) -> None:
    seen = scenario(tmp_path)
    print(seen)
    assert seen["job"].endswith(".1") and seen["identical_artifacts"] > 25
