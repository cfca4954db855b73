"""A merge in a study, counted by the kernel: no input is read by calls beside the pass that merges, and one output is written."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from merge_service.checkpoints import WEIGHTS_FILE
from merge_service.service import Merger
from pipeline.plan.steps import Step
from pipeline.store.artifact import hash_file
from pipeline.store.local import Store
from tests.merge_service import toys
from tests.pipeline.plan_toys import facts, make_plan, study
from tests.pipeline.recipe_toys import AVERAGES, filled, job, merges, put, record_of

IO = Path("/proc/self/io")
SIDE = 400
FOLD = {"init": "base", "deploy": "ema", "technique": "average"}
pytestmark = pytest.mark.skipif(not IO.exists(), reason="only Linux counts the bytes of a process")


def counted() -> dict[str, int]:
    """Bytes that this process has read and written by calls, as far as these went through the kernel: not what it has mapped."""
    return {name: int(value) for name, value in (line.split(": ") for line in IO.read_text().splitlines())}


def model(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "logit_scale": np.float32(1).reshape(()),
        "visual.proj": toys.dyadic(rng, (SIDE, SIDE), 64),
        "text_projection": toys.dyadic(rng, (SIDE, SIDE), 64),
    }


@pytest.mark.parametrize("strategy", [FOLD, AVERAGES], ids=["fold", "merge"])
def test_merge_in_a_study_reads_no_weights_by_calls_and_writes_one_output(
    strategy: Any, tmp_path: Path
) -> None:
    store, plan = Store(tmp_path / "store"), make_plan(study([strategy], 3), facts())
    store.prepare()
    rng = np.random.default_rng(7)
    base = model(rng)
    for step in plan.bases.values():
        put(store, step, base)
    steps: list[Step] = []
    for step in plan.steps.values():
        if step.kind == "train":
            put(store, step, toys.moved(rng, base, spread=3))
        steps += [step] if step.kind == "merge" else []
    merger = Merger()
    for step in steps[:-1]:
        merger.run(job(store, step, tmp_path), step, store)
    store.open_inputs(steps[-1])  # verified once by a process, and found as they were from then on
    last = job(store, steps[-1], tmp_path)
    before = counted()
    merger.run(last, steps[-1], store)
    after = counted()
    size = record_of(store, steps[-1].fingerprint).files[WEIGHTS_FILE]["bytes"]
    state = size if last.form == "merge" else 0
    assert after["rchar"] - before["rchar"] < size / 2
    assert size <= after["wchar"] - before["wchar"] < 1.1 * size + state


def test_record_states_the_sha256_that_the_merge_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(
        "pipeline.store.local.hash_file", lambda path: read.append(path.name) or hash_file(path)
    )
    store, plan = filled(tmp_path / "store", [FOLD], tasks=2)
    assert read.count(WEIGHTS_FILE) == len(plan.bases) + 2  # of the base and the experts, none of a merge
    for record in merges(store, plan):
        assert record.sha256(WEIGHTS_FILE) == hash_file(record.path / WEIGHTS_FILE)
