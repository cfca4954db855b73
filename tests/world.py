"""A small world for end-to-end tests: a tiny random CLIP, four tiny datasets, and study files over them.

It proves that things run, resume and agree to the bit; the demo shows that they learn.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.servers import free_port
from workers.data.writer import Sample, write_dataset

ROOT = Path(__file__).parent.parent
MODEL = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}
TASKS = ("red", "green", "blue")
STRATEGIES: list[Any] = [
    {"init": "base", "deploy": "all", "technique": "ties", "params": {"density": 0.5}},
    "continual_finetuning",
    "best_in_time",
]


@dataclass(frozen=True)
class World:
    """The places of the tiny model and data."""

    home: Path

    def study(self, **changes: Any) -> Path:
        """A study file over the tasks; `changes` replace top-level keys."""
        tree = {
            "name": "tiny",
            "model": {"config": str(self.home / "model.json"), "pretrained": None},
            "data": {"root": str(self.home / "data"), "pretraining": ["grey"], "held_out": ["grey"], "cache": str(self.home / "cache")},
            "stream": {"tasks": list(TASKS)},
            "recipe": {
                "lr": 1e-3, "batch_size": 12, "precision": "fp32",
                "mixture": {"pretraining": 0.33, "update": 0.34, "buffer": 0.33},
            },
            "budget": {"steps_per_task": 6},
            "grid": {"strategies": STRATEGIES},
            "resources": {"experts": {"checkpoint_every": 2}},
        }  # fmt: skip
        text = yaml.safe_dump(tree | changes)
        path = self.home / f"study-{abs(hash(text)):x}.yaml"
        path.write_text(text)
        return path


def make_world(home: Path) -> World:
    """Write model and data into `home`."""
    (home / "model.json").write_text(json.dumps(MODEL))
    for number, name in enumerate((*TASKS, "grey")):
        rng = np.random.default_rng(number)
        splits = {"train": _samples(rng, number, 36), "test": _samples(rng, number, 18)}
        write_dataset(
            home / "data" / name, kind="classification", classes=["dark", "middle", "light"],
            templates=[f"a {{c}} {name} square"], splits=splits,
        )  # fmt: skip
    return World(home)


def _samples(rng: np.random.Generator, channel: int, count: int) -> list[Sample]:
    samples = []
    for index in range(count):
        image = rng.integers(0, 60, (16, 16, 3)).astype(np.uint8)
        image[..., slice(None) if channel == 3 else channel] += np.uint8(60 * (index % 3))
        samples.append(Sample(image, index % 3))
    return samples


class Cluster:
    """One warm Ray head for a whole test session, so that a study's run does not pay for starting one."""

    def __init__(
        self, room: Path, dashboard: bool = False, environment: dict[str, str] | None = None
    ) -> None:
        ports = {
            name: free_port()
            for name in ("port", "node", "object", "agent", "client", "metrics", "dashboard")
        }
        self.address = f"127.0.0.1:{ports['port']}"
        self.dashboard = f"http://127.0.0.1:{ports['dashboard']}"
        # Ray looks for "the newest head" in this folder, so that heads that share one take each other's jobs.
        self._place = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
        command = [
            str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1",
            f"--port={ports['port']}", f"--node-manager-port={ports['node']}", f"--object-manager-port={ports['object']}",
            f"--dashboard-agent-listen-port={ports['agent']}", f"--ray-client-server-port={ports['client']}",
            f"--metrics-export-port={ports['metrics']}", f"--include-dashboard={str(dashboard).lower()}",
            f"--dashboard-port={ports['dashboard']}", "--disable-usage-stats",
            f"--object-store-memory={128 * 2**20}", f"--temp-dir={self._place.name}",
            "--no-monitor", "--include-log-monitor=false",  # neither machines nor logs are for anybody here
        ]  # fmt: skip
        self.log = room / "ray.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ
                | {
                    "RAY_AUTH_MODE": "token",
                    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                }
                | (environment or {}),
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def _wait(self, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            if b"Ray runtime started" in self.log.read_bytes():
                return
            time.sleep(0.2)
        raise RuntimeError(f"Ray did not start: {self.log.read_text()[-2000:]}")

    def stop(self) -> None:
        """End this cluster's processes, and no other's."""
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(3)  # `ray start --block` does not listen to SIGTERM
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(20)
        self._place.cleanup()


_STARTED: list[subprocess.Popen[str]] = []


def start(
    *arguments: Any,
    faults: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None,
    cwd: Path = ROOT,
    start_new_session: bool = False,
) -> subprocess.Popen[str]:
    """Start `temporal-merge` as a person would, in its own process, and return at once."""
    ours = {
        "TEMPORAL_MERGE_FAULTS": json.dumps(faults or {}),
        "RAY_AUTH_MODE": "token",
        "PYTHONPATH": str(ROOT),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", *map(str, arguments)],
        cwd=cwd, env=os.environ | ours | (environment or {}), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=start_new_session,
        preexec_fn=_hear_hangups if start_new_session else None,
    )  # fmt: skip
    _STARTED.append(process)
    return process


def end_started() -> None:
    """Kill what `start` started and a test that failed has left running, so that no later test shares the machine with it."""
    while _STARTED:
        process = _STARTED.pop()
        if process.poll() is None:
            process.kill()
            process.wait()


def _hear_hangups() -> None:
    """Restore SIGHUP, which a process started by nohup and its child processes ignore."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def command(
    *arguments: Any, faults: dict[str, Any] | None = None, timeout: float = 240, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run `temporal-merge` as a person would, to its end; a process that takes longer than `timeout` is killed."""
    with start(*arguments, faults=faults, cwd=cwd) as process:
        try:
            said, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, said, errors)


def artifacts(out: Path) -> dict[str, str]:
    """sha256 of every weights file of a run by its artifact's directory, and the scores of every evaluation."""
    found = {}
    for record in sorted((out / "store").glob("*/*/record.json")):
        body = json.loads(record.read_text())
        weights = {
            name: entry["sha256"] for name, entry in body["files"].items() if name.endswith(".safetensors")
        }
        found[record.parent.name] = json.dumps([weights, body["result"].get("scores")], sort_keys=True)
    return found
