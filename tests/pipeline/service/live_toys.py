"""A toy service behind an application: experts come over HTTP, and the test does the work of the working process."""

import base64
import contextlib
import hashlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import uvicorn

from merge_service.live import State
from pipeline.service.app import create_app
from pipeline.service.home import Home
from pipeline.service.intake import uploads
from pipeline.service.settings import Setup
from tests.pipeline.service import toys
from tests.pipeline.service.conftest import Service
from tests.pipeline.service.outside import until


@dataclass
class LiveService:
    """An application over the toy service in `out`; `key` is the token that asks."""

    app: Service
    out: Path
    room: Path

    @property
    def home(self) -> Home:
        return Home.open(self.out)

    def ask(self, method: str, path: str, key: str = "operator", **given: Any) -> httpx2.Response:
        """An answer; `key` is a role or the text of a token."""
        headers = {**given.pop("headers", {}), "authorization": f"Bearer {self.app.tokens.get(key, key)}"}
        return self.app.client.request(method, path, headers=headers, **given)

    def work(self) -> State:
        return toys.work(self.home)

    def issue(self, role: str = "submitter", **bounds: Any) -> tuple[str, str]:
        """The text and the id of a new token."""
        answer = self.ask("POST", "/v1/tokens", json={"role": role, **bounds})
        assert answer.status_code == 201, answer.text
        return answer.json()["token"], answer.json()["id"]

    def announce(self, path: Path, task: str, key: str = "submitter") -> httpx2.Response:
        data = path.read_bytes()
        file = {"name": path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        return self.ask("POST", "/v1/uploads", key, json={"task": task, "files": [file]})

    def put(
        self, number: str, name: str, part: int, data: bytes, key: str = "submitter", **headers: str
    ) -> httpx2.Response:
        stated = {"content-digest": content_digest(data), **headers}
        return self.ask("PUT", f"/v1/uploads/{number}/parts/{name}/{part}", key, content=data, headers=stated)

    def upload(self, path: Path, task: str, key: str = "submitter") -> str:
        """The id of a whole upload."""
        answer = self.announce(path, task, key)
        assert answer.status_code in (200, 201), answer.text
        number, data, size = answer.json()["id"], path.read_bytes(), uploads.PART_BYTES
        for first, last in answer.json()["missing"].get(path.name, []):
            for part in range(first, last + 1):
                came = self.put(number, path.name, part, data[part * size : (part + 1) * size], key)
                assert came.status_code == 204, came.text
        return str(number)

    def arrive(
        self, path: Path, task: str, key: str = "submitter", headers: Mapping[str, str] = {}, **body: Any
    ) -> httpx2.Response:
        asked = {"task": task, "upload": self.upload(path, task, key), "owner": "ann", **body}
        return self.ask("POST", "/v1/arrivals", key, json=asked, headers=dict(headers))


def content_digest(data: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(data).digest()).decode()}:"


@dataclass
class Reached:
    """The application of a setup behind a port, and what came: method and path of every request."""

    url: str
    came: list[tuple[str, str]] = field(default_factory=list)

    def puts(self) -> list[str]:
        """The parts that came, by their addresses."""
        return [path for method, path in self.came if method == "PUT"]


@contextlib.contextmanager
def reached(setup: Setup) -> Iterator[Reached]:
    """Listen on a free port of loopback, in a thread."""
    app, found = create_app(setup), Reached("")

    async def counted(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            found.came.append((scope["method"], scope["path"]))
        await app(scope, receive, send)

    server = uvicorn.Server(uvicorn.Config(counted, host="127.0.0.1", port=0, log_config=None, lifespan="on"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started or not thread.is_alive())
    found.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield found
    finally:
        server.should_exit = True
        thread.join(60)


@contextlib.contextmanager
def worked(out: Path) -> Iterator[None]:
    """Do the work of the toy service in OUT, in a thread, as its working process would."""
    ending = threading.Event()

    def work() -> None:
        home = Home.open(out)
        with home.working():
            worker = home.worker(toys.ToyScorer(home.store))
            while not ending.is_set():
                if not worker.step():
                    ending.wait(0.02)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join(60)
