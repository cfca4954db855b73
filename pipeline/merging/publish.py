"""Hands an adapter or a merged model to a server that is running, by the requests that the server documents.

| server | adapter | model |
|---|---|---|
| vLLM | POST /v1/load_lora_adapter {lora_name, lora_path} | none: a model is given at the start |
| SGLang | POST /load_lora_adapter {lora_name, lora_path} | POST /update_weights_from_disk {model_path} |
| llama.cpp | POST /lora-adapters [{id, scale}], of those given at the start | POST /models/load {model} of a router |

The name of an adapter ends with digits of its weights' sha256, so a name never stands for two contents.

Invariant: nothing is reported as published that the server did not confirm.
"""

import http.client
import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merge_service.checkpoints import sha256_of
from merge_service.errors import UserError
from pipeline.errors import speaks_python
from pipeline.study.addresses import server_at

SERVERS = ("vllm", "sglang", "llamacpp")
_DIGITS = 12
_LIMIT = 1 << 22
_GGUF = ".gguf"


@dataclass(frozen=True)
class Publication:
    """What is published: a folder or GGUF file, to which kind of server at which URL. `name` is the name before the digest, `there` the
    path of the same files as the server sees them, `key` the name of an environment variable with a bearer token.
    """

    source: Path
    to: str
    url: str
    name: str | None = None
    there: str | None = None
    key: str | None = None
    timeout: float = 600.0


@dataclass(frozen=True)
class Published:
    """How requests name it now, and the request that the server answered."""

    name: str
    request: str
    answer: Any


@speaks_python
def publish(what: Publication) -> Published:
    """Load it into the server. Raises UserError for what that server cannot load while it runs, or with the server's answer."""
    if what.to not in SERVERS:
        raise UserError(f"--to {what.to}: there is no such server; choose of {', '.join(SERVERS)}")
    what = replace(what, url=server_at(what.url, "name the variable with its token by --key-from"))
    if not what.source.exists():
        raise UserError(f"{what.source} is not there")
    if what.to == "llamacpp":
        return _to_llamacpp(what)
    is_adapter = (what.source / "adapter_config.json").is_file()
    name = _name(what)
    path = what.there or str(what.source.absolute())
    if is_adapter:
        route = "/v1/load_lora_adapter" if what.to == "vllm" else "/load_lora_adapter"
        answer = _asked(what, route, {"lora_name": name, "lora_path": path})
        _confirm(what, route, answer)
        if what.to == "vllm":
            models = _asked(what, "/v1/models", None)
            held = models.get("data") if isinstance(models, dict) else None
            listed = [one.get("id") for one in held or () if isinstance(one, dict)]
            if name not in listed:
                raise UserError(
                    f"{what.url}{route} answered, but {name} is not among its models: {', '.join(map(str, listed[:5]))}"
                )
        return Published(name, route, answer)
    if what.to == "vllm":
        raise UserError(
            f"{what.source} is a whole model, and vLLM loads only adapters while it runs; start it with this folder, or publish an adapter"
        )
    route = "/update_weights_from_disk"
    answer = _asked(what, route, {"model_path": path})
    _confirm(what, route, answer)
    return Published(name, route, answer)


def _to_llamacpp(what: Publication) -> Published:
    """A GGUF file that the server was given: as an adapter at scale 1 and all others at 0, else as a model of a router."""
    if what.source.suffix != _GGUF:
        raise UserError(
            f"{what.source}: llama.cpp reads GGUF files; convert it with llama.cpp's own scripts (convert_lora_to_gguf.py, convert_hf_to_gguf.py)"
        )
    path = what.there or str(what.source.absolute())
    if what.name is not None:
        answer = _asked(what, "/models/load", {"model": what.name})
        _confirm(what, "/models/load", answer)
        return Published(what.name, "/models/load", answer)
    held = _asked(what, "/lora-adapters", None)
    adapters = held if isinstance(held, list) else []
    mine = [
        one
        for one in adapters
        if isinstance(one, dict) and Path(str(one.get("path"))).name == Path(path).name
    ]
    if len(mine) != 1:
        known = ", ".join(str(one.get("path")) for one in adapters if isinstance(one, dict)) or "none"
        raise UserError(
            f"{what.url} has the adapters {known}; start it with `--lora {path} --lora-init-without-apply`, or name a model of a "
            "router with --name"
        )
    scales = [{"id": one["id"], "scale": 1.0 if one is mine[0] else 0.0} for one in adapters]
    answer = _asked(what, "/lora-adapters", scales)
    _confirm(what, "/lora-adapters", answer)
    return Published(str(mine[0]["id"]), "/lora-adapters", answer)


def _name(what: Publication) -> str:
    """The name with the lineage: what the weights are called, the technique that made them, and digits of their sha256."""
    called = what.name or what.source.resolve().name
    card = what.source / "merge.yaml"
    technique = ""
    if card.is_file():
        lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
        found = [
            line.partition(":")[2].strip()
            for line in lines
            if line.strip().lstrip("- ").startswith("technique:")
        ]
        technique = f"-{found[-1]}" if found else ""
    return f"{called}{technique}-{sha256_of(what.source)[:_DIGITS]}"


def _confirm(what: Publication, route: str, answer: Any) -> None:
    """Raise UserError unless the answer says that it was done; vLLM answers with words, and lists its models."""
    if what.to == "vllm" or (isinstance(answer, dict) and answer.get("success") is True):
        return
    said = answer
    if isinstance(answer, dict):
        said = answer.get("error_message") or answer.get("message") or answer.get("error") or answer
    raise UserError(f"{what.url}{route} did not confirm: {str(said)[:400]}")


def _asked(what: Publication, route: str, body: Any) -> Any:
    """The answer to a POST of JSON, or to a GET without one; text where it is no JSON."""
    headers = {"Content-Type": "application/json"}
    if what.key is not None:
        token = os.environ.get(what.key)
        if not token:
            raise UserError(f"--key-from {what.key}: this environment variable is not set")
        headers["Authorization"] = f"Bearer {token}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(what.url + route, data, headers)
    try:
        with _opener().open(request, timeout=what.timeout) as answer:
            text = answer.read(_LIMIT).decode(errors="replace")
    except urllib.error.HTTPError as error:
        said = error.read(2000).decode(errors="replace").strip()
        hint = _HINTS.get((what.to, error.code), "")
        raise UserError(f"{what.url}{route} answered {error.code}: {said or error.reason}{hint}") from None
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"{what.url} does not answer ({getattr(error, 'reason', error)}); is the server running there?"
        ) from None
    try:
        return json.loads(text)
    except ValueError:
        return text


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_Stays)


class _Stays(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: a token belongs to the server that was named."""

    def redirect_request(self, *_: object) -> None:
        return None


_HINTS = {
    ("vllm", 404): "; start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True",
    (
        "sglang",
        404,
    ): "; start SGLang with --enable-lora, and --max-lora-rank and --lora-target-modules for adapters that come later",
    ("llamacpp", 404): "; /models/load needs llama-server without a model (router mode)",
}
