"""Which clusters a session joins, and which it refuses at once."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from cluster.session import JOINS, ClusterError, check_address, connect
from tests.world import ROOT, Cluster


@pytest.mark.fault("F27")
@pytest.mark.parametrize("address", ["10.1.2.3:6379", "ray://head.example:10001", "head:6379"])
def test_remote_cluster_without_token_authentication_is_refused(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for mode in ("disabled", ""):
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
        with pytest.raises(ClusterError, match="RAY_AUTH_MODE=token") as caught:
            check_address(address)
        assert caught.value.exit_code == 2 and address in str(caught.value)
    monkeypatch.delenv("RAY_AUTH_MODE")
    with pytest.raises(ClusterError, match="without token authentication"):
        check_address(address)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    check_address(address)


HERE = ["local", "auto", "127.0.0.1:6379", "localhost:6379", "ray://127.0.0.1:10001"]


@pytest.mark.fault("F27")
@pytest.mark.parametrize("address", HERE)
def test_session_of_this_machine_with_the_token_switched_off_is_refused(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for mode in ("disabled", ""):
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
        with pytest.raises(ClusterError, match="RAY_AUTH_MODE") as caught, connect(address):
            pass
        assert caught.value.exit_code == 2 and "runs code as you" in str(caught.value)
    for mode in ("token", "TOKEN"):
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
        check_address(address)


@pytest.mark.fault("F27")
@pytest.mark.parametrize("address", ["head", "head:", ":6379", "head:port", "http://head", ""])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ClusterError, match="give `local`, `auto` or HOST:PORT"):
        check_address(address)


def test_silent_address_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray would try for minutes"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(ClusterError, match="no Ray cluster answers there") as caught, connect(address):
            pass
    assert address in str(caught.value)


@pytest.mark.fault("F27")
def test_cluster_is_not_joined_without_a_token_and_the_error_says_where_to_put_it(tmp_path: Path) -> None:
    join = "import sys; from cluster.session import connect\nwith connect(sys.argv[1]): pass"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with socket.create_server(("127.0.0.1", 0)) as silent:
        answer = subprocess.run(
            [sys.executable, "-c", join, f"127.0.0.1:{silent.getsockname()[1]}"], cwd=ROOT,
            env=environment | {"HOME": str(tmp_path)}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    last = answer.stderr.strip().splitlines()[-1]
    assert "ClusterError" in last and "RAY_AUTH_TOKEN_PATH" in last, answer.stderr


@pytest.mark.fault("F27")
def test_program_that_imported_ray_first_uses_a_token_all_the_same() -> None:
    program = (
        "import ray\nfrom ray._raylet import AuthenticationMode, get_authentication_mode as mode\nbefore = mode()\n"
        "from cluster import session\nsession._reload_token_mode()\n"
        "print(*(one == AuthenticationMode.TOKEN for one in (before, mode())))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert answer.stdout.split() == ["False", "True"], answer.stderr


def test_job_that_joined_another_cluster_of_its_machine_is_refused(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    with connect("auto"):
        here = ray.get_runtime_context().get_session_name()
    monkeypatch.setenv(JOINS, here)
    with connect("auto"):
        pass
    monkeypatch.setenv(JOINS, "session_of_another_head")
    with (
        pytest.raises(ClusterError, match=f"session_of_another_head and joined {here}.*--temp-dir"),
        connect("auto"),
    ):
        pass
