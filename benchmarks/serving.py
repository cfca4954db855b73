"""What exchanging the served weights costs those who ask: rate and latency with swaps, beside the same without.

    python benchmarks/serving.py

Starts a service in processes of its own, and clients that each ask what a picture shows, and again when they have the answer. Phases
without and with swaps alternate; in those with, two checkpoints are served in turn, `--swaps` times. Prints a table.
README.md in this directory explains the columns.

Invariant: a ratio is taken between neighbouring phases of one run, by the same clients on the same processes; an answer that is no 200,
or that names weights which were not promoted, ends the benchmark.
"""

import argparse
import asyncio
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx2
import numpy as np
import psutil
import record
from PIL import Image
from safetensors.numpy import load_file, save_file

from merge_service.checkpoints import CONFIG_FILE, WEIGHTS_FILE
from pipeline.service.settings import Setup
from pipeline.service.tokens import Tokens
from workers.serving.served import HeadFile, Served

LABELS = ("a cat", "a dog", "a bird", "a fish", "a tree", "a house", "a boat", "a letter")
PLAIN, SWAPS = "without swaps", "with swaps"


@dataclass
class Phase:
    """What the clients saw in a while: seconds of each answer, of the whole, and of each swap; memory in bytes at its end."""

    answers: list[float] = field(default_factory=list)
    seconds: float = 0.0
    swaps: list[float] = field(default_factory=list)
    memory: int = 0

    def figures(self) -> dict[str, float]:
        """Rate and percentiles."""
        p50, p99 = np.percentile(self.answers, (50, 99)).tolist()
        return {
            "requests": len(self.answers), "rate": len(self.answers) / self.seconds, "p50": p50, "p99": p99,
            "longest": max(self.answers), "swaps": len(self.swaps), "swap": median(self.swaps) if self.swaps else 0.0,
            "memory": self.memory,
        }  # fmt: skip


def checkpoints(model: Path, work: Path) -> list[Served]:
    """The model's weights, and the same with a little noise."""
    tensors, found = load_file(model / WEIGHTS_FILE), []
    rng = np.random.default_rng(0)
    for t in range(2):
        path = work / f"t{t}.safetensors"
        save_file(tensors, path)
        found.append(Served(t, f"a-{t:06d}", hashlib.sha256(path.read_bytes()).hexdigest(), path, t + 1))
        tensors = {
            name: np.asarray(one + rng.normal(0, 1e-3, one.shape), one.dtype)
            if one.dtype.kind == "f"
            else one
            for name, one in tensors.items()
        }
    return found


def picture() -> bytes:
    """A photograph's worth of JPEG, 640 x 480."""
    rng = np.random.default_rng(1)
    small = Image.fromarray(rng.integers(0, 255, (12, 16, 3), np.uint8))
    out = io.BytesIO()
    small.resize((640, 480), Image.Resampling.BICUBIC).save(out, "JPEG")
    return out.getvalue()


class Run:
    """A service that runs, and its clients."""

    def __init__(self, args: argparse.Namespace, url: str, head: HeadFile, token: str, process: int) -> None:
        self._args, self._url, self._head, self._process = args, url, head, process
        self._headers = {"authorization": f"Bearer {token}"}
        self._picture = picture()
        self._promoted: set[str] = set()

    async def phases(self, models: list[Served]) -> dict[str, list[dict[str, float]]]:
        """Alternating phases, each `--seconds` long."""
        found: dict[str, list[dict[str, float]]] = {PLAIN: [], SWAPS: []}
        limits = httpx2.Limits(
            max_connections=self._args.clients, max_keepalive_connections=self._args.clients
        )
        once = {**self._headers, "connection": "close"}
        async with (
            httpx2.AsyncClient(
                base_url=self._url, headers=self._headers, timeout=120, limits=limits
            ) as client,
            httpx2.AsyncClient(base_url=self._url, headers=once, timeout=60) as self._watch,
        ):
            await self._promote(models[0])
            await self._phase(client, [])
            for number in range(self._args.rounds):
                for name in (PLAIN, SWAPS):
                    figures = (await self._phase(client, models if name == SWAPS else [])).figures()
                    print(f"{number + 1}/{self._args.rounds} {name}: {_line(figures)}", flush=True)
                    found[name].append(figures)
        return found

    async def _phase(self, client: httpx2.AsyncClient, models: list[Served]) -> Phase:
        phase, stop = Phase(), asyncio.Event()
        clients = [asyncio.create_task(self._client(client, phase, stop)) for _ in range(self._args.clients)]
        started = time.perf_counter()
        every = self._args.seconds / max(1, self._args.swaps)
        for number in range(self._args.swaps if models else 0):
            await asyncio.sleep(max(0.0, started + number * every - time.perf_counter()))
            phase.swaps.append(await self._promote(models[(number + 1) % len(models)]))
        await asyncio.sleep(max(0.0, started + self._args.seconds - time.perf_counter()))
        phase.seconds = time.perf_counter() - started
        stop.set()
        await asyncio.gather(*clients)
        phase.memory = sum(one.memory_full_info().pss for one in psutil.Process(self._process).children())
        return phase

    async def _client(self, client: httpx2.AsyncClient, phase: Phase, stop: asyncio.Event) -> None:
        while not stop.is_set():
            began = time.perf_counter()
            answer = await client.post(
                "/v1/classify",
                params={"labels": LABELS},
                content=self._picture,
                headers={"content-type": "image/jpeg"},
            )
            phase.answers.append(time.perf_counter() - began)
            if answer.status_code != 200 or answer.headers["x-model-sha256"] not in self._promoted:
                sys.exit(f"{answer.status_code}: {answer.text[:500]}")

    async def _promote(self, served: Served) -> float:
        """Seconds until every process serves these weights."""
        self._promoted.add(served.sha256)
        began = time.perf_counter()
        self._head.write(served)
        waiting = set(range(self._args.workers))
        while waiting:
            await asyncio.sleep(0.2)
            state = (
                await self._watch.get("/v1/status")
            ).json()  # over a new connection, to any of the processes
            if state["serving"]["served"] and state["serving"]["served"]["sha256"] == served.sha256:
                waiting.discard(int(state["process"].rpartition("-")[2] or 0))
        return time.perf_counter() - began


def measure(args: argparse.Namespace, work: Path) -> dict[str, list[dict[str, float]]]:
    """Start the service, run the phases, end it."""
    home = work / "home"
    home.mkdir(parents=True)
    shutil.copyfile(args.model / CONFIG_FILE, home / CONFIG_FILE)
    models = checkpoints(args.model, work)
    setup = Setup.model_validate(
        {
            "name": "benchmark", "home": home, "head": work / "head.json", "state": work / "state",
            "serving": {"workers": args.workers, "threads": args.threads}, "listen": {"port": 0},
        }
    )  # fmt: skip
    head = HeadFile(setup.head)
    head.write(models[0])
    token = Tokens(setup.tokens).issue("reader")[0]
    (work / "setup.json").write_text(setup.model_dump_json())
    command = [sys.executable, "-m", "pipeline.service.processes.supervisor", str(work / "setup.json")]
    with (work / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().rpartition(" ")[2].strip()
        return asyncio.run(Run(args, url, head, token, process.pid).phases(models))
    finally:
        os.kill(process.pid, signal.SIGTERM)
        process.wait(60)


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: medians over the phases, and the ratios of neighbouring phases."""
    lines = [
        "| | requests/s | p50, ms | p99, ms | longest, ms | memory, MB | one swap, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, phases in found.items():
        m = {key: median(one[key] for one in phases) for key in phases[0]}
        lines.append(
            f"| {name} | {m['rate']:.0f} | {m['p50'] * 1e3:.0f} | {m['p99'] * 1e3:.0f} | {m['longest'] * 1e3:.0f} | "
            f"{m['memory'] / 1e6:.0f} | {m['swap'] * 1e3:.0f} |"
        )
    return "\n".join(lines)


def ratios(found: dict[str, list[dict[str, float]]]) -> dict[str, list[float]]:
    """Of each phase with swaps to the one before it without."""
    pairs = list(zip(found[PLAIN], found[SWAPS], strict=True))
    return {key: [after[key] / before[key] for before, after in pairs] for key in ("rate", "p99", "memory")}


def _line(figures: dict[str, float]) -> str:
    return f"{figures['rate']:.0f}/s, p99 {figures['p99'] * 1e3:.0f} ms, {figures['requests']:.0f} requests, {figures['swaps']:.0f} swaps"


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, default=Path("configs/models/tiny-clip"), help="a weights directory"
    )
    parser.add_argument("--workers", type=int, default=1, help="serving processes")
    parser.add_argument("--threads", type=int, default=1, help="of torch in each")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=20, help="of a phase")
    parser.add_argument("--swaps", type=int, default=25, help="in a phase that has any")
    parser.add_argument("--rounds", type=int, default=4)
    record.add_json(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="temporal-merge-serving-") as work:
        found = measure(args, Path(work))
    against = ratios(found)
    print(f"\n{table(found)}\n")
    print(
        "with swaps, times without: "
        + ", ".join(f"{key} {median(values):.2f}" for key, values in against.items())
    )
    settings: dict[str, Any] = {
        key: getattr(args, key) for key in ("workers", "threads", "clients", "seconds", "swaps", "rounds")
    }
    record.save(args.json, {"model": args.model.name, **settings}, {"phases": found, "ratios": against})


if __name__ == "__main__":
    main()
