"""Models to serve, and an application in this process."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from pipeline.service.app import create_app
from pipeline.service.settings import Setup
from pipeline.service.tokens import Role, Tokens
from tests.serving_toys import Zoo, make_zoo
from workers.serving.served import HeadFile


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_zoo(tmp_path_factory.mktemp("zoo"))


@dataclass
class Service:
    """An application that serves `model-0`, with a token of every role."""

    client: TestClient
    setup: Setup
    head: HeadFile
    tokens: dict[str, str]

    def ask(self, method: str, path: str, role: Role | None = "reader", **given: Any) -> httpx2.Response:
        headers = dict(given.pop("headers", {}))
        if role is not None:
            headers["authorization"] = f"Bearer {self.tokens[role]}"
        return self.client.request(method, path, headers=headers, **given)


def set_up(
    zoo: Zoo, state: Path, promoted: bool = True, **changes: Any
) -> tuple[Setup, HeadFile, dict[str, str]]:
    """A setup whose head says model 0 if one was promoted, and tokens."""
    state.mkdir(parents=True, exist_ok=True)
    setup = Setup.model_validate(
        {
            "name": "zoo",
            "home": zoo.home,
            "head": state / "head.json",
            "state": state,
            "listen": {"port": 0},
            **changes,
        }
    )
    head = HeadFile(setup.head)
    if promoted:
        head.write(zoo.served(0), [zoo.served(1)])
    tokens = Tokens(setup.tokens)
    return setup, head, {role: tokens.issue(role)[0] for role in ("reader", "submitter", "operator")}


@pytest.fixture(scope="module")
def make_service(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Service]]:
    with ExitStack() as stack:

        def make(**changes: Any) -> Service:
            ending = changes.pop("ending", None)
            setup, head, tokens = set_up(zoo, tmp_path_factory.mktemp("service"), **changes)
            client = stack.enter_context(
                TestClient(
                    create_app(setup, ending=ending),
                    base_url="http://localhost",
                    raise_server_exceptions=True,
                )
            )
            return Service(client, setup, head, tokens)

        yield make


@pytest.fixture(scope="module")
def service(make_service: Callable[..., Service]) -> Service:
    return make_service(serving={"max_wait_ms": 0})
