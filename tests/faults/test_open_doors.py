"""A study on this machine opens no door: every socket that its processes listen on is bound to loopback, and a machine beside
this one (a network namespace with a cable to it) reaches none of them."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.nodes import NEEDS, possible
from tests.faults.harness import Faults, process_facts, wait_until
from tests.world import World, start

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.chaos, pytest.mark.fault("F27")]
LISTENING = "0A"
NEAR, FAR = "10.99.9.1", "10.99.9.2"
CALL = """
import socket, sys
for door in sys.argv[1:]:
    address, _, port = door.rpartition(":")
    try:
        socket.create_connection((address, int(port)), timeout=2).close()
        print(door)
    except OSError:
        pass
"""
Door = tuple[str, int]


@pytest.fixture(scope="module")
def doors(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[set[Door]]:
    """Where the processes of a study listen while it trains, on a Ray that it has started itself."""
    room = tmp_path_factory.mktemp("doors")
    faults = Faults(room).at("train.after_step", do="spin")
    process = start("run", world.study(), "--out", room / "out", "--address", "local", faults=faults.placed)
    try:
        wait_until(faults.markers[0].exists, "no expert trains", 120)
        yield listening(family(process.pid))
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.fixture
def neighbour() -> Iterator[str]:
    """The name of a network namespace in which this machine is known as NEAR."""
    name, cable = f"tmd{os.getpid() % 100000}", f"tmd{os.getpid() % 10000}"
    _ip("netns", "add", name)
    try:
        _ip("link", "add", f"{cable}a", "type", "veth", "peer", "name", f"{cable}b", "netns", name)
        _ip("addr", "add", f"{NEAR}/24", "dev", f"{cable}a")
        _ip("link", "set", f"{cable}a", "up")
        _ip("-n", name, "addr", "add", f"{FAR}/24", "dev", f"{cable}b")
        _ip("-n", name, "link", "set", f"{cable}b", "up")
        _ip("-n", name, "route", "add", "default", "via", NEAR)
        yield name
    finally:
        _ip("netns", "del", name)


def test_local_study_listens_on_loopback_only(doors: set[Door]) -> None:
    assert len(doors) > 3, "these are not the sockets of a Ray"
    assert sorted((address, port) for address, port in doors if not _is_loopback(address)) == []


@pytest.mark.skipif(not possible(), reason=NEEDS)
def test_local_study_is_not_reached_from_a_machine_beside_it(doors: set[Door], neighbour: str) -> None:
    with socket.create_server(("0.0.0.0", 0)) as open_door:  # the cable works: this one is reached
        control = f"{NEAR}:{open_door.getsockname()[1]}"
        own = {f"{address}:{port}" for address, port in doors if "." in address and not _is_loopback(address)}
        all_doors = {f"{NEAR}:{port}" for _, port in doors} | own
        answer = subprocess.run(
            [*("ip", "netns", "exec", neighbour, sys.executable, "-c", CALL, control), *sorted(all_doors)],
            capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
    assert answer.stdout.split() == [control]


def family(pid: int) -> set[int]:
    """A process and all that descends from it."""
    children: dict[int, set[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            children.setdefault(int(process_facts(int(entry.name))[1]), set()).add(int(entry.name))
    found, todo = set[int](), [pid]
    while todo:
        one = todo.pop()
        found.add(one)
        todo += children.get(one, ())
    return found


def listening(pids: set[int]) -> set[Door]:
    """Address and port of every TCP socket that one of these processes listens on, as the kernel lists them."""
    found = set()
    for pid in pids:
        inodes = set()
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):  # closed, or ended, meanwhile
                inodes.add(str(link.readlink()))
        for table in ("tcp", "tcp6"):
            with contextlib.suppress(OSError):
                for row in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                    _, local, _, state, *_, inode = row.split()[:10]
                    if state == LISTENING and f"socket:[{inode}]" in inodes:
                        found.add(_door(local))
    return found


def _door(local: str) -> Door:
    """(address, port) of what the kernel writes as hex words in the byte order of the machine."""
    address, _, port = local.partition(":")
    words = [bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, len(address), 8)]
    if sys.byteorder == "big":
        words = [word[::-1] for word in words]
    packed = b"".join(words)
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed), int(port, 16)


def _is_loopback(address: str) -> bool:
    return address.removeprefix("::ffff:").startswith("127.") or address == "::1"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
