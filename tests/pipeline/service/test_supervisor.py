"""The supervisor restarts what ends, waits longer each time, and takes its children with it."""

import asyncio
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.service.processes import supervisor
from pipeline.service.processes.supervisor import Child, listening, supervise
from pipeline.service.settings import ListenSection


def python(code: str, *given: object) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", code, *map(str, given))


def lines(file: Path) -> list[str]:
    return file.read_text().split() if file.exists() else []


async def until(file: Path, count: int) -> None:
    for _ in range(6000):
        if len(lines(file)) >= count:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(lines(file))


NOTE = "import os,sys,time; f=open(sys.argv[1],'a'); f.write(f'{os.getpid()}\\n'); f.close(); "


def test_child_that_ends_is_started_again_and_a_signal_ends_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(supervisor, "LAST_WAIT", 0.04)
    short, long = tmp_path / "short", tmp_path / "long"
    ended: list[str] = []
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    children = [
        Child("short", python(NOTE, short)),
        Child("long", python(NOTE + "time.sleep(600)", long), environment={"X": "1"}, nice=3),
    ]

    async def main() -> None:
        with listening(ListenSection(port=0)) as sock:
            running = asyncio.create_task(supervise(sock, children, 30, ended.append))
            await until(short, 4)
            await until(long, 1)
            while os.getpriority(os.PRIO_PROCESS, int(lines(long)[0])) != min(19, mine + 3):
                await asyncio.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            await running

    asyncio.run(main())
    assert ended.count("short") >= 3 and "long" not in ended
    assert len(lines(long)) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int(lines(long)[0]), 0)


def test_child_that_does_not_end_is_killed_after_its_grace(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + NOTE + "time.sleep(600)"

    async def main() -> None:
        with listening(ListenSection(port=0)) as sock:
            running = asyncio.create_task(supervise(sock, [Child("stubborn", python(stubborn, file))], 0.2))
            await until(file, 1)
            os.kill(os.getpid(), signal.SIGINT)
            await running

    asyncio.run(main())
    with pytest.raises(ProcessLookupError):
        os.kill(int(lines(file)[0]), 0)


def test_children_see_the_end_of_their_supervisor_however_it_ends(tmp_path: Path) -> None:
    """The supervisor is killed; its child, which waits for that, writes a second line."""
    file = tmp_path / "pids"
    child = (
        NOTE
        + "os.read(int(os.environ['TEMPORAL_MERGE_SUPERVISOR']), 1); f=open(sys.argv[1],'a'); f.write('gone\\n'); f.close()"
    )
    code = (
        "import asyncio, sys; from pipeline.service.processes.supervisor import *; "
        "from pipeline.service.settings import ListenSection; "
        "asyncio.run(supervise(listening(ListenSection(port=0)), [Child('one', (sys.executable, '-S', '-c', sys.argv[1], sys.argv[2]))], 1))"
    )

    async def main() -> None:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, child, str(file))
        await until(file, 1)
        process.kill()
        await process.wait()
        await until(file, 2)

    asyncio.run(main())
    assert lines(file)[1] == "gone"


def test_port_in_use_is_waited_for_and_then_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        started = time.monotonic()
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}"):
            listening(ListenSection(port=port), patience=0.3)
        assert time.monotonic() - started >= 0.3
    with listening(ListenSection(port=port)) as mine:
        assert mine.getsockname()[1] == port
