"""A toy service behind an application: experts come over HTTP, and the test does the work of the working process."""

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from merge_service.live import State
from pipeline.service.home import Home
from pipeline.service.intake import uploads
from tests.pipeline.service import toys
from tests.pipeline.service.conftest import Service


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
