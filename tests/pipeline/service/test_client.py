"""The client against a service behind a port: breaks, repetitions, and everything that it may ask."""

import asyncio
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from merge_service.errors import UserError
from pipeline.service.client import AsyncService, Service, ServiceError
from pipeline.service.client.connection import Connection
from pipeline.service.client.sending import download
from pipeline.service.home import Home
from pipeline.service.http.schemas import File
from pipeline.service.intake import uploads
from pipeline.service.settings import Setup
from tests.pipeline.service import toys
from tests.pipeline.service.conftest import set_up
from tests.pipeline.service.live_toys import reached, worked
from tests.serving_toys import LABELS, Zoo, picture

Named = tuple[Setup, dict[str, str], Path]


@pytest.fixture
def named(zoo: Zoo, tmp_path: Path) -> Named:
    """A toy service that does not run yet: its setup, its tokens and its directory."""
    toys.home(tmp_path / "out")
    setup, _, tokens = set_up(zoo, tmp_path / "state", out=tmp_path / "out")
    return setup, tokens, tmp_path / "out"


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every third request is carried out, and its answer is lost; the addresses of those."""
    lost, asked = list[str](), [0]
    request: Callable[..., Any] = httpx2.Client.request

    def broken(self: httpx2.Client, method: str, url: str, **given: Any) -> httpx2.Response:
        answer = request(self, method, url, **given)
        asked[0] += 1
        if asked[0] % 3 == 0:
            lost.append(f"{method} {url}")
            raise httpx2.ReadError("cut")
        return answer  # type: ignore[no-any-return]

    monkeypatch.setattr(httpx2.Client, "request", broken)
    monkeypatch.setattr("pipeline.service.client.connection.FIRST_WAIT", 0.01)
    yield lost


def test_interrupted_upload_goes_on_after_a_restart_and_sends_at_most_one_part_again(
    named: Named, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "PART_BYTES", 500)
    setup, tokens, _ = named
    path = toys.expert(tmp_path, "task0")
    parts = -(-path.stat().st_size // 500)

    def stop(there: int, every: int) -> None:
        if there >= every / 2:
            raise KeyboardInterrupt

    with reached(setup) as first, Service(first.url, tokens["submitter"]) as service:
        with pytest.raises(KeyboardInterrupt):
            service.arrive(path, "task0", progress=stop)
        assert 0 < len(first.puts()) < parts
    with reached(setup) as second, Service(second.url, tokens["submitter"]) as service:
        assert service.arrive(path, "task0").status == "received"
    assert len(first.puts()) + len(second.puts()) <= parts + 1


def test_experts_delivered_twice_shuffled_over_cut_connections_come_once(
    named: Named, tmp_path: Path, cut: list[str]
) -> None:
    setup, tokens, out = named
    experts = [(toys.expert(tmp_path, task), task) for task in toys.TASKS[:4]]
    again = random.Random(1).sample(experts, len(experts))
    with reached(setup) as at, worked(out), Service(at.url, tokens["submitter"]) as service:
        ids = [service.arrive(path, task, owner="ann").id for path, task in experts]
        found = [service.wait(one) for one in ids]
        length = service.status().live
        repeated = {service.arrive(path, task, owner="ann").id for path, task in again}
        assert service.status().live == length and repeated == set(ids)
    assert cut and [one.t for one in found] and found[-1].status == "promoted"
    quiet = toys.home(tmp_path / "quiet")
    for path, task in experts:
        toys.arrive(quiet, path, task)
    state = Home.open(out).log.state
    assert state.served.sha256 == quiet.log.state.served.sha256
    assert len(state.arrivals) == 4 and state.seq == quiet.log.state.seq


def test_client_does_whatever_the_routes_do(named: Named, tmp_path: Path) -> None:
    setup, tokens, out = named
    with reached(setup) as at, worked(out), Service(at.url, tokens["operator"]) as service:
        ids = []
        for task in toys.TASKS[:2]:
            start = service.next(task, tmp_path / task)
            assert (tmp_path / task / "ticket").read_text().strip() == start.ticket
            came = service.arrive(toys.expert(tmp_path, task), task, start.ticket, license="MIT", owner="ann")
            ids.append(service.wait(came.id).id)
        assert [one.status for one in service.arrivals()] == ["superseded", "promoted"]
        assert [one.id for one in service.arrivals(task="task1")] == ids[1:]
        assert service.lineage(ids[0]).descendants == []
        assert service.rollback(1, "complaints").served.t == 1
        with pytest.raises(ServiceError, match="head") as refused:
            service.rollback(0, "x", if_head="0" * 64)
        assert (refused.value.code, refused.value.status) == ("head.moved", 412)
        assert service.remove(ids[0], "takedown", force=True, purge=True).status == "purged"
        entries = [*service.log()]
        assert [one.seq for one in entries] == [*range(1, len(entries) + 1)]
        assert [one.seq for one in service.log(after=3)] == [one.seq for one in entries[3:]]
        seen = service.classify([picture(0), picture(1)], LABELS, top=2)
        assert len(seen.results) == 2 and len(seen.results[0].top) == 2
        new = service.issue("submitter", owners=["bob"], per_day=1)
        assert new.id in {one.id for one in service.tokens().tokens}
        service.revoke(new.id)
        with Service(at.url, new.token) as closed, pytest.raises(ServiceError, match=r"token\.revoked"):
            closed.status()
    with pytest.raises(ServiceError, match="does not answer"):
        Service(at.url, tokens["reader"], patience=0.1).status()


def test_client_in_an_event_loop_does_the_same(named: Named, tmp_path: Path) -> None:
    setup, tokens, out = named

    async def calls(url: str) -> None:
        async with AsyncService(url, tokens["operator"]) as service:
            start = await service.next("task0", tmp_path / "task0")
            assert (tmp_path / "task0/ticket").read_text().strip() == start.ticket
            experts = [toys.expert(tmp_path, task) for task in toys.TASKS[:2]]
            first = await service.arrive(experts[0], "task0", start.ticket, license="MIT", owner="ann")
            second = await service.arrive(experts[1], "task1", license="MIT", owner="ann")
            found = await asyncio.gather(service.wait(first.id), service.wait(second.id))
            assert [one.status in ("promoted", "superseded") for one in found] == [True, True]
            assert [one.id async for one in service.arrivals()] == [first.id, second.id]
            assert (await service.rollback(1, "complaints")).served.t == 1
            with pytest.raises(ServiceError, match="head") as refused:
                await service.rollback(0, "x", if_head="0" * 64)
            assert (refused.value.code, refused.value.status) == ("head.moved", 412)
            entries = [one async for one in service.log()]
            assert [one.seq for one in entries] == [*range(1, len(entries) + 1)]
            seen = await service.classify([picture(0), picture(1)], LABELS, top=2)
            assert len(seen.results) == 2
            assert (await service.remove(first.id, "takedown", force=True)).status == "removed"

    with reached(setup) as at, worked(out):
        asyncio.run(calls(at.url))

    async def nobody() -> None:
        async with AsyncService(at.url, tokens["reader"], patience=0.1) as service:
            await service.status()

    with pytest.raises(ServiceError, match="does not answer"):
        asyncio.run(nobody())


def test_both_clients_have_the_same_calls() -> None:
    blocking, awaited = ({name for name in vars(one) if name[0] != "_"} for one in (Service, AsyncService))
    assert blocking == awaited


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (httpx2.Response(404, text="<html>"), "404, which is no answer of a service"),
        (httpx2.Response(200, text="<html>"), "200, which is no answer of a service"),
        (httpx2.Response(200, json={"service": 1}), "200, which is no answer of a service"),
        (httpx2.Response(301, headers={"location": "https://other/"}), "a redirect to https://other/, which is not followed"),
    ],
)  # fmt: skip
def test_answer_of_something_else_is_said_to_be_none_of_a_service(
    answer: httpx2.Response, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(httpx2.Client, "request", lambda *_, **__: answer)
    with pytest.raises(ServiceError, match=said):
        Service("http://127.0.0.1:1", "t").status()


def test_download_without_bytes_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httpx2.Client, "request", lambda *_, **__: httpx2.Response(206, content=b""))
    wanted = File(name="x", bytes=5, sha256="0" * 64)
    with pytest.raises(ServiceError, match="gave no bytes from 0 on"):
        to = Connection("http://127.0.0.1:1", "t")
        to.carry_out(download(to.peer, "/v1/x", tmp_path / "x", wanted))
    assert not (tmp_path / "x").exists()


def test_address_of_a_service_that_holds_a_secret_is_refused_and_not_repeated() -> None:
    with pytest.raises(UserError, match="holds a secret") as refused:
        Service("http://ann:hush@127.0.0.1:1", "t")
    assert "hush" not in str(refused.value)
    with pytest.raises(UserError, match="is no address of a server"):
        Service("127.0.0.1:8420", "t")
