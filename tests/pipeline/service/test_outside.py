"""The service from outside: weights change, workers are killed and the service ends under load, and clients notice as little as promised."""

import asyncio
import contextlib
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import httpx2
import psutil
import pytest

from tests.pipeline.service.conftest import set_up
from tests.pipeline.service.outside import Load, Promotions, Running, Truth, running, until
from tests.pipeline.service.test_app import problem
from tests.serving_toys import Zoo

TOLERANCE = 1e-4
"""Batches of other sizes round otherwise."""


@pytest.fixture(scope="module")
def service(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("outside")
    limits = {"header_s": 5, "body_s": 10, "connections": 40}
    setup, head, tokens = set_up(zoo, home / "state", serving={"workers": 2}, limits=limits)
    with running(setup, head, tokens, home) as one:
        yield one


@pytest.fixture(scope="module")
def truth(zoo: Zoo) -> Truth:
    return Truth(zoo.home, [zoo.served(t) for t in range(3)])


def swaps(service: Running, zoo: Zoo, truth: Truth, count: int) -> Load:
    """Exchange three models in turn under eight clients; every answer must be of one model, and of the right one."""
    service.promote(zoo.served(0))
    promotions = Promotions(zoo.served(0))

    async def main() -> Load:
        async with Load(service) as load:
            await load.more()
            for t in islice(cycle((1, 2, 0)), count):
                promotions.note(zoo.served(t))
                await asyncio.to_thread(service.promote, zoo.served(t))
                await load.more()
        return load

    load = asyncio.run(main())
    assert list(load.failed) == []
    assert {one.sha256 for one in load.asked} == {zoo.served(t).sha256 for t in range(3)}
    assert [one for one in load.asked if not promotions.allow(one)] == []
    assert max(map(truth.error, load.asked)) < TOLERANCE
    assert min(map(truth.nearest_other, load.asked)) > 5 * TOLERANCE  # so a mixture would have been seen
    return load


@pytest.mark.slow
def test_ten_swaps_under_load_fail_nothing_and_mix_nothing(service: Running, zoo: Zoo, truth: Truth) -> None:
    swaps(service, zoo, truth, 10)


@pytest.mark.chaos
def test_hundred_swaps_under_load_fail_nothing_mix_nothing_and_leave_no_memory(
    service: Running, zoo: Zoo, truth: Truth
) -> None:
    swaps(service, zoo, truth, 10)
    before = [one.memory_info().rss for one in service.workers()]
    load = swaps(service, zoo, truth, 100)
    after = [one.memory_info().rss for one in service.workers()]
    print(f"{len(load.asked)} requests; memory {before} -> {after}")
    assert len(load.asked) >= 1000
    assert all(now <= 1.15 * then for then, now in zip(before, after, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["truncated", "shapes", "sha256"])
def test_weights_that_cannot_load_leave_answers_going(
    service: Running, zoo: Zoo, truth: Truth, kind: str
) -> None:
    service.promote(zoo.served(0))
    damaged, code = zoo.damaged(kind)

    def problems() -> set[str | None]:
        found = {}
        for _ in range(10):
            body = httpx2.get(f"{service.url}/v1/status", headers=service.headers(), timeout=60).json()
            found[body["process"]] = body["serving"]["problem"]
        return set(found.values()) if len(found) == 2 else set()

    async def main() -> Load:
        async with Load(service) as load:
            service.head.write(damaged, [zoo.served(0)])
            await asyncio.to_thread(until, lambda: problems() == {code})
            await load.more(20)
        return load

    load = asyncio.run(main())
    assert load.failed == []
    assert {one.sha256 for one in load.asked} == {zoo.served(0).sha256}
    assert max(map(truth.error, load.asked)) < TOLERANCE
    service.promote(zoo.served(0))


@pytest.mark.chaos
def test_killed_worker_loses_no_more_than_it_was_answering_and_comes_back(
    service: Running, zoo: Zoo, truth: Truth
) -> None:
    service.promote(zoo.served(1))
    pids = [one.pid for one in service.workers()]

    async def main() -> Load:
        async with Load(service) as load:
            await load.more()
            os.kill(pids[0], signal.SIGKILL)
            await asyncio.to_thread(until, lambda: len(service.served()) == 2)
            await load.more(20)
        return load

    load = asyncio.run(main())
    again = [one.pid for one in service.workers()]
    assert again[1] == pids[1] and again[0] != pids[0]
    assert len(load.failed) <= 8 and {one.error for one in load.failed} <= {
        "RemoteProtocolError",
        "ReadError",
    }
    assert max(truth.error(one) for one in load.asked if one.status == 200) < TOLERANCE
    counted = httpx2.get(f"{service.url}/metrics", timeout=60).text
    assert 'tm_worker_restarts_total{child="serving-0"} 1.0' in counted


@pytest.mark.chaos
def test_connections_wait_while_all_workers_are_dead(service: Running, zoo: Zoo) -> None:
    for worker in service.workers():
        worker.kill()
    answers = [
        httpx2.get(f"{service.url}/v1/status", headers=service.headers(), timeout=240) for _ in range(2)
    ]
    assert [one.status_code for one in answers] == [200, 200]
    assert answers[0].json()["serving"]["served"]["t"] == 1  # a worker accepts when its model is loaded
    until(lambda: len(service.served()) == 2)


# --- hostile connections ----------------------------------------------------------------------------------------------


def raw(service: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", service.setup.listen.port), timeout=60)


def drip(connection: socket.socket, data: bytes, seconds: float) -> bytes:
    """Send a byte now and then until the other side has had enough; what it said."""
    deadline, said = time.monotonic() + 60, b""
    connection.settimeout(seconds)
    with contextlib.suppress(ConnectionError):
        for number in range(10_000):
            assert time.monotonic() < deadline, "the connection was kept"
            connection.send(data[number % len(data) : number % len(data) + 1])
            with contextlib.suppress(TimeoutError):
                part = connection.recv(65536)
                said += part
                if not part:
                    break
    return said


@pytest.mark.slow
def test_slow_clients_are_cut_off(service: Running) -> None:
    assert drip(raw(service), b"GET /v1/status HTTP/1.1\r\nX: " + b"a" * 10_000, 0.2) == b""
    body = raw(service)
    token = service.tokens["reader"]
    body.sendall(
        b"POST /v1/embed/text HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n"
        + f"Authorization: Bearer {token}\r\n\r\n".encode()
    )
    said = drip(body, b" ", 0.2)
    assert (
        said.startswith(b"HTTP/1.1 408") and b"request.slow" in said and b"connection: close" in said.lower()
    )


@pytest.mark.slow
def test_body_after_an_early_refusal_is_not_read_for_ever(service: Running) -> None:
    one = raw(service)
    one.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n")
    assert one.recv(100).startswith(b"HTTP/1.1 401")


@pytest.mark.slow
def test_connections_beyond_the_limit_are_refused_and_answers_go_on(service: Running) -> None:
    with contextlib.ExitStack() as stack:
        # connections fall to whichever process is quicker, so one may be full while the other has room
        held = [stack.enter_context(contextlib.closing(raw(service))) for _ in range(101)]
        said, deadline = list[bytes](), time.monotonic() + 4
        while len(said) < 21 and time.monotonic() < deadline:
            for one in select.select(held, [], [], 0.1)[0]:
                held.remove(one)
                with contextlib.suppress(OSError):
                    said.append(one.recv(10_000))
        assert len(said) >= 21
        assert all(one.startswith(b"HTTP/1.1 503") and b"service.busy" in one for one in said)
    until(lambda: len(service.served()) == 2)


@pytest.mark.slow
def test_many_wrong_tokens_leave_answers_going(service: Running) -> None:
    with httpx2.Client(base_url=service.url, timeout=60) as client:
        for number in range(300):
            answer = client.get(
                "/v1/status", headers={"authorization": f"Bearer tmk_{number:012x}_{'a' * 43}"}
            )
            assert answer.status_code == 401
        assert problem(answer) == "token.unknown"
        assert client.get("/v1/status", headers=service.headers()).status_code == 200


@pytest.mark.parametrize(
    "request_",
    [b"nonsense\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/1.1\r\nHost: a\r\nHost: localhost\r\n\r\n",
     b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n"],
)  # fmt: skip
@pytest.mark.slow
def test_what_is_no_request_is_refused(service: Running, request_: bytes) -> None:
    one = raw(service)
    with contextlib.suppress(ConnectionError):
        one.sendall(request_)
        said = one.recv(10_000)
        assert said == b"" or said.split(b" ")[1][:1] == b"4", said
    assert httpx2.get(f"{service.url}/healthz", timeout=60).status_code == 200


@pytest.mark.chaos
def test_tls_ends_in_the_workers(zoo: Zoo, tmp_path: Path) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    made = [
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=zoo",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
    ]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", "req", "-x509", *made, *files], check=True, capture_output=True)
    listen = {"port": 0, "tls": {"certificate": certificate, "key": key}}
    setup, head, tokens = set_up(zoo, tmp_path / "state", serving={"workers": 1}, listen=listen)
    with running(setup, head, tokens, tmp_path) as service:
        assert service.url.startswith("https://")
        with pytest.raises(httpx2.TransportError):
            httpx2.get(service.url.replace("https", "http") + "/healthz", timeout=60)
        with pytest.raises(httpx2.TransportError):
            httpx2.get(service.url + "/healthz", timeout=60)  # a certificate that nobody vouches for


# --- the end ----------------------------------------------------------------------------------------------------------


@pytest.mark.chaos
def test_terminated_service_answers_what_it_accepted_and_leaves_nothing_behind(
    zoo: Zoo, tmp_path: Path
) -> None:
    setup, head, tokens = set_up(zoo, tmp_path / "state", serving={"workers": 1})
    with running(setup, head, tokens, tmp_path) as service:
        children = service.workers()

        async def main() -> Load:
            async with Load(service) as load:
                await load.more()
                service.process.send_signal(signal.SIGTERM)
                await asyncio.to_thread(until, lambda: service.process.poll() is not None)
            return load

        load = asyncio.run(main())
        assert service.process.returncode == 0, service.log.read_text()
        assert {one.error for one in load.failed} <= {"RemoteProtocolError", "ReadError", "ConnectError"}
        assert all(one.status in (200, 0) for one in load.asked)
        assert not [
            child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE
        ]


@pytest.mark.chaos
def test_workers_of_a_killed_supervisor_end_and_the_same_command_resumes(zoo: Zoo, tmp_path: Path) -> None:
    setup, head, tokens = set_up(zoo, tmp_path / "state", serving={"workers": 1})
    with running(setup, head, tokens, tmp_path) as service:
        children = service.workers()
        service.process.kill()
        with running(service.setup, head, tokens, tmp_path) as again:
            assert again.url == service.url
            until(
                lambda: all(not one.is_running() or one.status() == psutil.STATUS_ZOMBIE for one in children)
            )
            assert not (setup.state / "service.token").exists()  # there were tokens
