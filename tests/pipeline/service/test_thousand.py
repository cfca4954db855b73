"""A thousand arrivals: what the last cost beside the second hundred, and that memory does not grow with them.

Run by `make faults`. What one more arrival costs is counted in `test_flat.py`; CPU time is printed here.
"""

import os
import resource
import time
from pathlib import Path
from statistics import median

import numpy as np
import pytest

from merge_service.checkpoints import sha256_of
from merge_service.live import Removed
from merge_service.merge import merge
from pipeline.service.operations import Operations
from pipeline.service.scoring import NoScorer
from tests.merge_service import toys as files
from tests.pipeline.service import toys
from tests.pipeline.service.soak import ARRIVALS

COUNT = int(os.environ.get(ARRIVALS, "1000"))
MEBIBYTES = 64
MATRICES = ("transformer.resblocks.0.mlp.weight", "visual.transformer.resblocks.0.mlp.weight")


def unlike(room: Path, number: int) -> Path:
    """An expert that is no copy of any other."""
    rng, start = np.random.default_rng(number), toys.base()
    by = {name: rng.standard_normal(value.shape) for name, value in start.items() if value.shape}
    norm = np.sqrt(sum(float((value**2).sum()) for value in by.values()))
    return files.save(
        room / f"{number}.safetensors", toys.moved({name: value / norm for name, value in by.items()})
    )


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("technique, count", [("ties", COUNT)])
def test_thousandth_arrival_costs_what_the_second_hundred_did(
    technique: str, count: int, tmp_path: Path
) -> None:
    strategy = {"init": "base", "deploy": "all", "technique": technique}
    service = toys.home(tmp_path / "out", strategy, same_task="add", limits={"per_owner_per_day": 10**6})
    spent, used, operations = list[float](), list[int](), Operations(service)
    with service.working():
        worker = service.worker(NoScorer())
        for number in range(count):
            path = unlike(tmp_path, number)
            began = time.process_time()
            name = operations.arrive(path, toys.Sender(f"task{number}", "tests"))
            state = worker.run()
            spent.append(time.process_time() - began)
            used.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
            assert state.shown(name) == "promoted", state.arrivals[name].detail
            if number < count - 20:
                path.unlink()
        ratio = median(spent[-count // 10 :]) / median(spent[count // 10 : count // 5])
        grown = (used[-1] - used[count // 10]) / 1024
        print(f"seconds of CPU {median(spent[count // 10 : count // 5]):.4f} then {median(spent[-count // 10 :]):.4f}: "
              f"{ratio:.2f} times; {grown:.0f} MiB more")  # fmt: skip
        leaving = state.sequence[count // 2].arrival
        operations.remove(leaving, Removed("takedown"))
        after = worker.run()
    assert state.t == count and after.t == count - 1
    assert grown <= MEBIBYTES
    served = service.store.find(state.served.fingerprint)
    assert served is None  # only what stays warm is kept
    ids = [f"t{t}" for t in range(1, count)]
    paths = [service.experts.path(one.sha256) for one in after.sequence]
    digests = dict(zip(ids, (one.sha256 for one in after.sequence)))
    start = service.store.open_verified(service.base)
    merge(technique, {}, start, paths, tmp_path / "m.safetensors", ids=ids, sha256=digests)
    assert sha256_of(tmp_path / "m.safetensors") == after.served.sha256
