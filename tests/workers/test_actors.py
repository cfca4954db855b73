"""The expert actor around training: its output besides the artifact."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from merge_service.checkpoints import WEIGHTS_FILE, CheckpointWriter, sha256_of
from workers.actors import Worker
from workers.jobs import EngineSpec, TrainJob


def weights(room: Path, seed: int) -> Path:
    with CheckpointWriter(room / WEIGHTS_FILE, {"w": ("F32", (40,))}) as writer:
        writer.write("w", 0, np.random.default_rng(seed).standard_normal(40).astype(np.float32))
    return room


class Shelf:
    """A store that only moves the stage to its place."""

    def __init__(self, room: Path) -> None:
        self.room = room

    def make(self, step: Any, work: Callable[[Path], Any], *, held: str = "files") -> Any:
        assert held == "files"
        work(self.room / "stage")
        (self.room / "stage").rename(self.room / "expert")
        digest = sha256_of(self.room / "expert")
        return SimpleNamespace(path=self.room / "expert", sha256=lambda name: digest)


def test_expert_actor_keeps_the_thresholds_its_job_asks_for_and_nothing_in_the_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = weights(tmp_path / "base", 0)
    monkeypatch.setattr(
        "workers.training.expert.train_expert", lambda job, **_: weights(Path(job.out), 1) and {}
    )
    asked = (("ties", {"density": 0.25, "consensus": "mean", "granularity": "model", "count_frozen": True}),)
    job = TrainJob(
        fingerprint="f", label="t1", t=1, task="a", init=str(base), base=str(base), update=(), buffer=(), pretraining=(),
        recipe={}, steps=1, seed=0, engine=EngineSpec(), scratch=str(tmp_path / "scratch"), checkpoint_every=0, out="",
        cache="", asked_limits=asked, limits=str(tmp_path / "limits"),
    )  # fmt: skip
    record = Worker(0, 1, 1, "cpu").run(job, None, Shelf(tmp_path))
    (kept,) = (tmp_path / "limits").iterdir()
    body = json.loads(kept.read_text())
    assert body["expert"]["sha256"] == record.sha256(WEIGHTS_FILE)
    assert [path.name for path in record.path.iterdir()] == [WEIGHTS_FILE]
    both = [np.random.default_rng(seed).standard_normal(40).astype(np.float32) for seed in (0, 1)]
    threshold = np.sort(np.abs(both[1] - both[0]))[30 - 1]
    assert float.fromhex(body["entries"][0]["limits"]["model"][0]) == threshold
