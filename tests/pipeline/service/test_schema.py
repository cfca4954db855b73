"""The description of the API holds: whatever is sent, no answer of 500 and none outside the description."""

import os
import threading
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.pipeline.service import toys
from tests.pipeline.service.conftest import Service
from tests.pipeline.service.soak import EXAMPLES

CHECKS: list[Any] = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance,
    response_schema_conformance,
]  # fmt: skip
OPERATIONS = [
    ("POST", "/v1/classify"),
    ("POST", "/v1/embed/image"),
    ("POST", "/v1/embed/text"),
    ("GET", "/v1/label-sets"),
    ("GET", "/v1/label-sets/{name}"),
    ("PUT", "/v1/label-sets/{name}"),
    ("DELETE", "/v1/label-sets/{name}"),
    ("GET", "/v1/models/{which}"),
    ("GET", "/v1/models/{which}/files/{name}"),
    ("POST", "/v1/uploads"),
    ("GET", "/v1/uploads/{number}"),
    ("DELETE", "/v1/uploads/{number}"),
    ("PUT", "/v1/uploads/{number}/parts/{name}/{part}"),
    ("POST", "/v1/arrivals"),
    ("GET", "/v1/arrivals"),
    ("GET", "/v1/arrivals/{number}"),
    ("DELETE", "/v1/arrivals/{number}"),
    ("GET", "/v1/arrivals/{number}/lineage"),
    ("PUT", "/v1/arrivals/{number}/replacement"),
    ("POST", "/v1/arrivals/{number}/release"),
    ("POST", "/v1/arrivals/{number}/promote"),
    ("POST", "/v1/arrivals/{number}/reject"),
    ("POST", "/v1/rollback"),
    ("GET", "/v1/next"),
    ("GET", "/v1/starts/{sha256}/files/{name}"),
    ("GET", "/v1/log"),
    ("GET", "/v1/log/head"),
    ("GET", "/v1/events"),
    ("GET", "/v1/tokens"),
    ("POST", "/v1/tokens"),
    ("DELETE", "/v1/tokens/{number}"),
    ("GET", "/v1/status"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
]


MORE = int(os.environ.get(EXAMPLES, "1"))
"""Times as many requests, and others each time, in the slow tier."""
QUICK = (
    "/v1/uploads",
    "/v1/arrivals",
    "/v1/rollback",
    "/v1/log",
    "/v1/tokens",
    "/v1/next",
    "/v1/starts",
    "/v1/events",
)
"""Routes that are tried less often, since they share how bodies and names are read."""


@pytest.fixture(scope="module")
def small(make_service: Callable[..., Service], tmp_path_factory: pytest.TempPathFactory) -> Service:
    out, limits = tmp_path_factory.mktemp("live"), {"set_prompts": 500}
    toys.home(out)
    ending = threading.Event()
    ending.set()  # nothing waits, whatever is asked
    return make_service(out=out, ending=ending, serving={"max_wait_ms": 0, "max_batch": 8}, limits=limits)


def test_every_operation_is_tried(small: Service) -> None:
    described = small.ask("GET", "/openapi.json", None).json()["paths"]
    assert sorted(OPERATIONS) == sorted(
        (m.upper(), path) for path, methods in described.items() for m in methods
    )


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["fitting", "unfit"])
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_answers_are_as_described_whatever_is_sent(
    small: Service, method: str, path: str, mode: GenerationMode
) -> None:
    schema = schemathesis.openapi.from_dict(small.ask("GET", "/openapi.json", None).json())
    operation = schema[path][method]

    @settings(
        max_examples=MORE * (6 if path.startswith(QUICK) else 20),
        deadline=None,
        derandomize=MORE == 1,
        phases=(Phase.explicit, Phase.generate),  # minutes would pass until a failure is shrunk
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def tried(case: Case) -> None:
        sent = case.as_transport_kwargs(base_url="http://localhost")
        prepared = requests.Request(
            **{key: value for key, value in sent.items() if key != "timeout"}
        ).prepare()
        headers = {
            name: value
            for name, value in prepared.headers.items()
            if name.lower() not in ("host", "content-length")
        }
        headers["authorization"] = f"Bearer {small.tokens['operator']}"
        body = prepared.body.encode() if isinstance(prepared.body, str) else prepared.body
        try:
            answer = small.client.request(
                str(prepared.method), str(prepared.url), headers=headers, content=body
            )
        except httpx2.InvalidURL:
            return  # longer than the client sends
        case.validate_response(answer, checks=CHECKS)

    if (
        mode is GenerationMode.NEGATIVE
        and path
        in ("/v1/status", "/v1/label-sets", "/v1/log/head", "/v1/tokens", "/healthz", "/readyz", "/metrics")
        and method == "GET"
    ):
        pytest.skip("nothing of it can be unfit")
    tried()
