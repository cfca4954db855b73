"""Adapters and models handed to servers, against stubs that speak the documented requests of vLLM, SGLang and llama.cpp."""

import json
import socketserver
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from merge_service.errors import UserError
from pipeline.merging.publish import Publication, publish

Answers = dict[str, Callable[[Any], tuple[int, Any]]]


class Stub:
    """A server that answers by route, and keeps what it was asked."""

    def __init__(self, answers: Answers) -> None:
        self.seen: list[tuple[str, str, Any, str | None]] = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self, method: str) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(size)) if size else None
                stub.seen.append((method, self.path, body, self.headers.get("Authorization")))
                code, said = answers.get(f"{method} {self.path}", lambda _: (404, {"detail": "Not Found"}))(
                    body
                )
                text = said if isinstance(said, str) else json.dumps(said)
                self.send_response(code)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def do_GET(self) -> None:
                self._answer("GET")

            def do_POST(self) -> None:
                self._answer("POST")

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[[Answers], Stub]]:
    stubs: list[Stub] = []

    def start(answers: Answers) -> Stub:
        stubs.append(Stub(answers))
        return stubs[-1]

    yield start
    for one in stubs:
        one.close()


def vllm(loaded: list[str]) -> Answers:
    def load(body: Any) -> tuple[int, Any]:
        loaded.append(body["lora_name"])
        return 200, f"Success: LoRA adapter '{body['lora_name']}' added successfully."

    models = lambda _: (200, {"object": "list", "data": [{"id": "base"}, *({"id": one} for one in loaded)]})  # noqa: E731
    return {"POST /v1/load_lora_adapter": load, "GET /v1/models": models}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    place = tmp_path / "tuned"
    place.mkdir()
    save_file(
        {"base_model.model.w.lora_A.weight": np.ones((2, 3), np.float32)}, place / "adapter_model.safetensors"
    )
    (place / "adapter_config.json").write_text("{}")
    (place / "merge.yaml").write_text("technique: ties\nexperts: [a]\n")
    return place


def test_adapter_is_loaded_by_vllm_under_a_name_of_its_content(adapter: Path, serve, cli) -> None:
    stub = serve(vllm([]))
    said = json.loads(cli("publish", adapter, "--to", "vllm", "--url", stub.url, "--json").out)
    assert said["name"].startswith("tuned-ties-") and len(said["name"]) == len("tuned-ties-") + 12
    assert stub.seen[0][:3] == (
        "POST",
        "/v1/load_lora_adapter",
        {"lora_name": said["name"], "lora_path": str(adapter)},
    )
    save_file(
        {"base_model.model.w.lora_A.weight": np.zeros((2, 3), np.float32)},
        adapter / "adapter_model.safetensors",
    )
    assert publish(Publication(adapter, "vllm", stub.url)).name != said["name"]


def test_name_path_and_token_are_those_given(adapter: Path, serve, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = serve(vllm([]))
    monkeypatch.setenv("SERVER_TOKEN", "secret")
    publish(Publication(adapter, "vllm", stub.url, "mine", "/models/mine", "SERVER_TOKEN"))
    _, _, body, token = stub.seen[0]
    assert (
        body["lora_name"].startswith("mine-ties-")
        and body["lora_path"] == "/models/mine"
        and token == "Bearer secret"
    )
    with pytest.raises(UserError, match="NO_TOKEN"):
        publish(Publication(adapter, "vllm", stub.url, key="NO_TOKEN"))


def test_sglang_takes_adapters_and_models(adapter: Path, tmp_path: Path, serve) -> None:
    stub = serve(
        {
            "POST /load_lora_adapter": lambda body: (
                200,
                {"success": True, "loaded_adapters": {body["lora_name"]: body["lora_path"]}},
            ),
            "POST /update_weights_from_disk": lambda _: (
                200,
                {"success": True, "message": "Succeeded to update model weights."},
            ),
        }
    )
    assert publish(Publication(adapter, "sglang", stub.url)).request == "/load_lora_adapter"
    model = tmp_path / "model"
    model.mkdir()
    save_file({"w": np.ones(3, np.float32)}, model / "model.safetensors")
    assert publish(Publication(model, "sglang", stub.url)).request == "/update_weights_from_disk"
    assert stub.seen[-1][2] == {"model_path": str(model)}
    with pytest.raises(UserError, match="vLLM loads only adapters"):
        publish(Publication(model, "vllm", stub.url))


def test_llamacpp_scales_one_of_its_adapters_or_loads_a_model_of_a_router(tmp_path: Path, serve) -> None:
    held = [{"id": 0, "path": "/m/a.gguf", "scale": 1.0}, {"id": 1, "path": "/m/b.gguf", "scale": 0.0}]
    stub = serve(
        {
            "GET /lora-adapters": lambda _: (200, held),
            "POST /lora-adapters": lambda _: (200, {"success": True}),
            "POST /models/load": lambda _: (200, {"success": True}),
        }
    )
    for name in ("b.gguf", "c.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert publish(Publication(tmp_path / "b.gguf", "llamacpp", stub.url)).name == "1"
    assert stub.seen[-1][2] == [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 1.0}]
    with pytest.raises(UserError, match="--lora-init-without-apply"):
        publish(Publication(tmp_path / "c.gguf", "llamacpp", stub.url))
    publish(Publication(tmp_path / "c.gguf", "llamacpp", stub.url, name="c"))
    assert stub.seen[-1][1:3] == ("/models/load", {"model": "c"})


@pytest.fixture
def talkative() -> Iterator[str]:
    """The address of a port that answers with something else than HTTP."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.request.recv(1 << 16)
            self.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_refusals_of_servers_are_errors_with_their_words(adapter: Path, talkative: str, serve) -> None:
    refusing = serve(
        {
            "POST /load_lora_adapter": lambda _: (
                200,
                {"success": False, "error_message": "rank 64 is above the limit"},
            )
        }
    )
    with pytest.raises(UserError, match="rank 64 is above the limit"):
        publish(Publication(adapter, "sglang", refusing.url))
    with pytest.raises(UserError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        publish(Publication(adapter, "vllm", refusing.url))
    forgetful = serve({**vllm([]), "GET /v1/models": lambda _: (200, {"data": [{"id": "base"}]})})
    with pytest.raises(UserError, match="is not among its models: base"):
        publish(Publication(adapter, "vllm", forgetful.url))
    moved = serve({"POST /load_lora_adapter": lambda _: (307, "elsewhere")})
    with pytest.raises(UserError, match="answered 307"):
        publish(Publication(adapter, "sglang", moved.url))
    wordy = serve({**vllm([]), "GET /v1/models": lambda _: (200, "not JSON")})
    for url, to, said in (
        ("ftp://x", "vllm", "give http"),
        (moved.url, "ollama", "no such server"),
        ("http://127.0.0.1:9", "vllm", "does not answer"),
        (talkative, "vllm", "does not answer"),
        (wordy.url, "vllm", "is not among its models: $"),
        ("http://ann:hush@127.0.0.1:9", "vllm", "holds a secret .*--key-from"),
    ):
        with pytest.raises(UserError, match=said):
            publish(Publication(adapter, to, url))
