"""Learning that is killed for real, by SIGKILL, goes on from its checkpoint to the same bytes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

import temporal_merge as tm
from tests.merge_service.statistics import golden
from tests.world import ROOT

CASE = golden.case("adamerging-learn")
STEPS, EVERY = 5, 2
CODE = "import sys, torch; torch.set_num_threads(int(sys.argv[2])); from tests.workers.learning.test_killed import learned; learned(sys.argv[1])"


def learned(out: str | Path) -> None:
    """Coefficients of the golden experts, with a checkpoint every two steps."""
    tasks = [load_file(file) for file in golden.files(CASE, "inputs")]
    tm.learn(
        "adamerging", golden.files(CASE, "experts"), tasks, base=golden.FOLDER / CASE["base"], out=out,
        model=str(golden.FOLDER / CASE["config"]), steps=STEPS, every=EVERY, learning_rate=0.05,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("point", "nth"), [("learn.after_step", 4), pytest.param("learn.after_ckpt", 1, marks=pytest.mark.slow)]
)
def test_killed_learning_goes_on_to_the_same_bytes(point: str, nth: int, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.safetensors", tmp_path / "out.safetensors"
    learned(whole)
    fault = {point: {"at": nth, "marker": str(tmp_path / "fired")}}
    room = {**os.environ, "TEMPORAL_MERGE_FAULTS": json.dumps(fault), "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", CODE, str(out), str(torch.get_num_threads())]
    killed = subprocess.run(line, cwd=ROOT, env=room, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    kept = out.with_name("out.learning.safetensors")
    assert kept.exists() and not out.exists()
    learned(out)
    assert out.read_bytes() == whole.read_bytes() and not kept.exists()
