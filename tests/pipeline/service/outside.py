"""A service in processes of its own, and clients that ask it all the time."""

import asyncio
import contextlib
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import numpy as np
import psutil

from pipeline.service.settings import Setup
from tests.servers import PATIENCE_SECONDS, free_port
from tests.serving_toys import LABELS, picture
from workers.serving.served import HeadFile, Served

TEMPLATES = ("a {c} thing",)
QUESTION = {"labels": list(LABELS), "templates": list(TEMPLATES), "top": len(LABELS)}


@dataclass
class Running:
    """A service that runs: its supervisor, where it listens, and what it is set up by."""

    process: subprocess.Popen[bytes]
    setup: Setup
    head: HeadFile
    tokens: Mapping[str, str]
    log: Path

    @property
    def url(self) -> str:
        scheme = "https" if self.setup.listen.tls else "http"
        return f"{scheme}://127.0.0.1:{self.setup.listen.port}"

    @property
    def verify(self) -> ssl.SSLContext | bool:
        """What clients trust: the service's own certificate, if it has one."""
        tls = self.setup.listen.tls
        return ssl.create_default_context(cafile=str(tls.certificate)) if tls else True

    def headers(self, role: str = "reader") -> dict[str, str]:
        return {"authorization": f"Bearer {self.tokens[role]}"}

    def workers(self) -> list[psutil.Process]:
        """The serving processes, by their places."""
        found = psutil.Process(self.process.pid).children()
        return sorted(found, key=lambda one: one.environ()["TEMPORAL_MERGE_PLACE"])

    def served(self) -> dict[str, str]:
        """Process -> sha256 that it serves; of those that happened to answer ten new connections."""
        found = {}
        for _ in range(10):
            with contextlib.suppress(httpx2.TransportError):
                body = httpx2.get(
                    f"{self.url}/v1/status", headers=self.headers(), timeout=60, verify=self.verify
                ).json()
                found[body["process"]] = (body["serving"]["served"] or {}).get("sha256", "")
        return found

    def promote(self, served: Served, kept: Sequence[Served] = ()) -> None:
        """Write the head, and wait until every process serves it."""
        self.head.write(served, kept)
        until(lambda: sorted(self.served().values()) == [served.sha256] * self.setup.serving.workers)


def until(condition: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be"
        time.sleep(0.02)


@contextmanager
def running(setup: Setup, head: HeadFile, tokens: Mapping[str, str], home: Path) -> Iterator[Running]:
    """Start the supervisor on a free port, wait until all workers answer; at the end it is killed with all that it started."""
    listen = {**setup.listen.model_dump(), "port": setup.listen.port or free_port()}
    setup = Setup.model_validate({**setup.model_dump(), "listen": listen})
    file, log = home / "given.json", home / "service.log"
    file.write_text(setup.model_dump_json())
    command = [sys.executable, "-m", "pipeline.service.processes.supervisor", str(file)]
    with log.open("ab") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, start_new_session=True)
    one = Running(process, setup, head, tokens, log)
    try:
        until(lambda: process.poll() is not None or len(one.served()) == setup.serving.workers)
        assert process.poll() is None, log.read_text()
        yield one
    finally:
        for child in psutil.Process(process.pid).children() if process.poll() is None else ():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.wait(30)


@dataclass
class Asked:
    """One request: when it began and ended, what came of it, and which connection error there was."""

    began: float
    ended: float
    status: int = 0
    sha256: str = ""
    picture: int = 0
    probabilities: Mapping[str, float] = field(default_factory=dict)
    error: str = ""


class Load:
    """Closed-loop clients: each asks what a picture shows, and again when it has the answer."""

    def __init__(self, service: Running, clients: int = 8, pictures: int = 4) -> None:
        self._service, self._clients, self._pictures = service, clients, pictures
        self.asked: list[Asked] = []
        self._stop = asyncio.Event()

    async def __aenter__(self) -> "Load":
        self._tasks = [asyncio.create_task(self._client(number)) for number in range(self._clients)]
        return self

    async def __aexit__(self, *error: object) -> None:
        self._stop.set()
        await asyncio.gather(*self._tasks)

    @property
    def failed(self) -> list[Asked]:
        return [one for one in self.asked if one.status != 200]

    async def more(self, count: int = 10) -> None:
        """Wait until so many more requests were answered."""
        wanted = len(self.asked) + count
        while len(self.asked) < wanted:
            await asyncio.sleep(0.005)

    async def _client(self, number: int) -> None:
        async with httpx2.AsyncClient(
            base_url=self._service.url, headers=self._service.headers(), timeout=120
        ) as client:
            turn = number
            while not self._stop.is_set():
                turn += 1
                self.asked.append(await self._ask(client, turn % self._pictures))

    async def _ask(self, client: httpx2.AsyncClient, which: int) -> Asked:
        began = time.time()
        one = Asked(began, began, picture=which)
        try:
            answer = await client.post(
                "/v1/classify", params=QUESTION, content=picture(which), headers={"content-type": "image/png"}
            )
            one.status, one.sha256 = answer.status_code, answer.headers.get("x-model-sha256", "")
            if answer.status_code == 200:
                (seen,) = answer.json()["results"]
                one.probabilities = {likely["label"]: likely["probability"] for likely in seen["top"]}
                assert answer.json()["model"]["sha256"] == one.sha256
        except httpx2.TransportError as error:
            one.error = type(error).__name__
            await asyncio.sleep(0.05)
        one.ended = time.time()
        return one


class Truth:
    """What each model answers, computed in this process by the code of evaluation; and what mixtures of two would answer."""

    def __init__(self, home: Path, models: Sequence[Served], pictures: int = 4) -> None:
        import torch

        from workers.models.model import preprocess_cfg
        from workers.scoring.evaluate import Encoder
        from workers.serving.decoding import Decoder

        async def decoded() -> np.ndarray:
            decoder = Decoder(preprocess_cfg(home))
            return np.stack([await decoder.decode(picture(which)) for which in range(pictures)])

        images = asyncio.run(decoded())
        self._answers: dict[tuple[str, str], np.ndarray] = {}
        with torch.inference_mode():
            encoders = {one.sha256: Encoder(home, "cpu", 8, weights=one.path) for one in models}
            for seeing, eye in encoders.items():
                features = eye.model.logit_scale.exp() * eye.pictures(images)
                for naming, mouth in encoders.items():
                    logits = features @ mouth.classifier(LABELS, TEMPLATES)
                    self._answers[seeing, naming] = np.asarray(logits.softmax(dim=1))

    def error(self, asked: Asked) -> float:
        """How far an answer is from that of the model that it names."""
        return self._distance(asked, (asked.sha256, asked.sha256))

    def nearest_other(self, asked: Asked) -> float:
        """How far it is from the nearest answer of another model, or of a mixture of two."""
        return min(
            self._distance(asked, pair) for pair in self._answers if pair != (asked.sha256, asked.sha256)
        )

    def _distance(self, asked: Asked, pair: tuple[str, str]) -> float:
        found = np.array([asked.probabilities[label] for label in LABELS])
        return float(np.abs(found - self._answers[pair][asked.picture]).max())


class Promotions:
    """Who was promoted when."""

    def __init__(self, first: Served) -> None:
        self._log = [(0.0, first.sha256)]

    def note(self, served: Served) -> None:
        self._log.append((time.time(), served.sha256))

    def allow(self, asked: Asked) -> bool:
        """Whether what answered was promoted while the request ran, or one swap earlier."""
        shas = [sha for _, sha in self._log]
        times = [at for at, _ in self._log]
        first = max(0, int(np.searchsorted(times, asked.began, side="right")) - 2)
        last = int(np.searchsorted(times, asked.ended, side="right"))
        return asked.sha256 in shas[first:last]
