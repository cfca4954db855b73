"""The sockets and the token of a local Ray, which only this machine can reach."""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.errors import ClusterError
from cluster.local import SHORT_PLACES, SOCKET_OF_A_SESSION, _ensure_token, temporary_directory
from tests.world import ROOT

LISTENS = """
import os, sys
from pathlib import Path
import ray
from cluster.session import connect

def listening(pids):
    mine = {os.readlink(handle) for pid in pids for handle in Path(f"/proc/{pid}/fd").iterdir() if handle.is_symlink()}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in mine:
                yield local

def tree(pid):
    return [pid, *(child for one in Path(f"/proc/{pid}/task").iterdir() for child in below(one))]

def below(task):
    return [child for pid in (task / "children").read_text().split() for child in tree(int(pid))]

with connect("local", cpus=1):
    ray.get(ray.remote(lambda: 1).remote())
    print("processes", len(tree(os.getpid())))
    print("ports", *listening(tree(os.getpid())))
    sys.stdout.flush()
    sys.stdin.readline()
"""


@pytest.fixture(scope="module")
def ports() -> Iterator[list[tuple[bytes, int]]]:
    """(address, port) of everything that a local session and one of its workers listen on while it runs."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with subprocess.Popen(
        [sys.executable, "-c", LISTENS], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=environment | {"PYTHONPATH": str(ROOT), "HOME": "/proc"},
    ) as session:  # fmt: skip
        assert session.stdin is not None and session.stdout is not None
        processes, found = (session.stdout.readline().split() for _ in range(2))
        assert processes[0] == "processes" and int(processes[1]) >= 6, processes
        yield [(_address(host), int(port, 16)) for host, port in (entry.split(":") for entry in found[1:])]
        session.stdin.close()
        session.wait(60)


def _address(digits: str) -> bytes:
    """An address as the kernel prints it: 32-bit words in this machine's byte order."""
    words = [bytes.fromhex(digits[start : start + 8]) for start in range(0, len(digits), 8)]
    return b"".join(word[::-1] if sys.byteorder == "little" else word for word in words)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.fault("F27")
def test_local_session_listens_on_loopback_only_without_a_home_to_write_to(
    ports: list[tuple[bytes, int]],
) -> None:
    assert len(ports) >= 6
    loopback = {
        socket.inet_pton(socket.AF_INET, "127.0.0.1"),
        socket.inet_pton(socket.AF_INET6, "::1"),
        socket.inet_pton(socket.AF_INET6, "::ffff:127.0.0.1"),
    }
    assert {address for address, _ in ports} <= loopback


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.fault("F27")
@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None,
    reason="another network namespace needs root and the `ip` command of iproute2",
)
def test_local_session_is_out_of_reach_of_another_network_namespace(ports: list[tuple[bytes, int]]) -> None:
    name, near, far = f"tml{os.getpid() % 100000}", f"tmn{os.getpid() % 10000}", f"tmf{os.getpid() % 10000}"
    script = (
        "import socket, sys\n"
        "for port in sys.argv[1:]:\n"
        "    with socket.socket() as one:\n"
        "        one.settimeout(2)\n"
        "        print(port, one.connect_ex(('10.98.7.1', int(port))))\n"
    )
    with socket.socket() as open_to_all:
        open_to_all.bind(("0.0.0.0", 0))
        open_to_all.listen()
        known = open_to_all.getsockname()[1]
        try:
            _ip("netns", "add", name)
            _ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
            for prefix, device, last in (((), near, 1), (("-n", name), far, 2)):
                _ip(*prefix, "addr", "add", f"10.98.7.{last}/24", "dev", device)
                _ip(*prefix, "link", "set", device, "up")
            answer = subprocess.run(
                ["ip", "netns", "exec", name, sys.executable, "-c", script, str(known), *(str(port) for _, port in ports)],
                capture_output=True, text=True, timeout=60, check=True,
            )  # fmt: skip
        finally:
            subprocess.run(["ip", "link", "del", near], capture_output=True)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
    codes = {int(port): int(code) for port, code in (line.split() for line in answer.stdout.splitlines())}
    assert codes.pop(known) == 0, "the namespace does not reach this machine at all"
    assert codes and all(codes.values()), codes


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_place_that_is_too_long_for_a_socket_gives_way_to_a_short_one(variable: str, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 90)
    long.mkdir()
    said: list[str] = []
    place = temporary_directory({variable: str(long)}, said.append)
    assert len(said) == 1 and f"{place} instead of {variable}" in said[0] and "107 are allowed" in said[0]
    assert str(place.parent) in SHORT_PLACES and len(f"{place.parent}{SOCKET_OF_A_SESSION}") <= 107


def test_short_place_that_the_environment_names_is_taken() -> None:
    said: list[str] = []
    both = {"TMPDIR": "/var/tmp", "RAY_TMPDIR": "/dev/shm"}
    assert temporary_directory(both, said.append).parent == Path("/dev/shm")
    assert temporary_directory({"TMPDIR": "/var/tmp"}, said.append).parent == Path("/var/tmp")
    assert not said


def test_machine_without_any_place_for_sockets_is_refused_with_the_variable_and_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.local.SHORT_PLACES", ("/nowhere",))
    with pytest.raises(ClusterError, match=r"RAY_TMPDIR .*at most \d\d characters") as caught:
        temporary_directory({"TMPDIR": f"{tmp_path}/{'x' * 90}"}, print)
    assert "107 are allowed" in str(caught.value) and "/nowhere/ray: no directory" in str(caught.value)


def test_token_is_made_for_the_process_only_where_ray_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    environment: dict[str, str] = {}
    _ensure_token(environment)
    assert re.fullmatch("[0-9a-f]{64}", environment["RAY_AUTH_TOKEN"])
    for given in ({"RAY_AUTH_TOKEN": "mine"}, {"RAY_AUTH_TOKEN_PATH": "/x"}):
        kept = dict(given)
        _ensure_token(kept)
        assert kept == given
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("mine")
    environment = {}
    _ensure_token(environment)
    assert environment == {}
