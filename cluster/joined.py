"""Wait until the nodes of a cluster have joined, because a study uses the nodes that are present when it starts.

python -m cluster.joined HOST:PORT NODES SECONDS
"""

import sys
import time

import ray

from cluster.session import connect


def wait(address: str, nodes: int, seconds: float) -> int:
    """The number of live nodes: at least `nodes`, or fewer after `seconds`. Raises ClusterError if no cluster answers."""
    deadline = time.monotonic() + seconds
    with connect(address):
        while True:
            there = sum(node["Alive"] for node in ray.nodes())
            if there >= nodes or time.monotonic() > deadline:
                return there
            time.sleep(1)


if __name__ == "__main__":
    wanted = int(sys.argv[2])
    found = wait(sys.argv[1], wanted, float(sys.argv[3]))
    if found < wanted:
        sys.exit(
            f"error: {found} of {wanted} nodes have joined {sys.argv[1]} after {sys.argv[3]} s; see their logs"
        )
