"""The process that keeps the others running: it owns the listening socket, starts children, and starts again those that end.

It imports neither torch nor the application, so there is little in it that could fail.
Invariant: while it lives the socket is open, so connections wait instead of being refused, whatever becomes of the children; when it
ends, its children end.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_service.checkpoints import CONFIG_FILE
from merge_service.files import make_directory, replace_whole
from pipeline.errors import ConfigError
from pipeline.service import metrics
from pipeline.service.processes.child import PIPE
from pipeline.service.settings import ListenSection, Setup
from pipeline.service.tokens import Tokens
from workers.models.configuration import read_configuration

BACKLOG = 1024
"""Connections that wait until a process accepts them."""
FIRST_WAIT, LAST_WAIT = 0.5, 30.0
"""Seconds before a child is started again, from its second end in a row on: twice as long each time."""
SUPERVISOR = "supervisor"
"""Its place among the processes that count."""
STEADY_SECONDS = 60.0
"""A child that ran for so long counts as sound again."""
ENDING_SECONDS = 40.0
"""Patience with an earlier supervisor or its children, which still answer what they accepted."""


@dataclass(frozen=True)
class Child:
    """A process to keep running. `shares` hands it the listening socket; `nice` lowers its priority
    by so much below the supervisor's."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    shares: bool = False
    nice: int = 0


def listening(listen: ListenSection, patience: float = ENDING_SECONDS) -> socket.socket:
    """The listening socket of a service. Raises ConfigError."""
    listen.check()
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    until = time.monotonic() + patience
    while True:
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((listen.host.strip("[]"), listen.port))
            found.listen(BACKLOG)
            return found
        except OSError as error:
            found.close()
            if time.monotonic() > until:
                raise ConfigError(
                    f"listen: {listen.host}:{listen.port} cannot be listened on ({error.strerror}); end what listens there, or "
                    "choose another port"
                ) from None
            time.sleep(0.2)


def workers(setup: Setup, file: Path, descriptor: int) -> list[Child]:
    """The serving processes of a setup that was written to `file`."""
    command = (sys.executable, "-m", "pipeline.service.processes.serving_worker", str(file), str(descriptor))
    threads = {"OMP_NUM_THREADS": str(setup.serving.threads)}
    return [
        Child(f"serving-{number}", command, {**threads, metrics.PLACE: str(number)}, shares=True)
        for number in range(setup.serving.workers)
    ]


async def supervise(
    sock: socket.socket,
    children: Sequence[Child],
    grace: float,
    ended: Callable[[str], None] = lambda name: None,
) -> None:
    """Keep the children running until SIGTERM or Ctrl-C; then they have `grace` seconds to finish. A second signal kills them.

    `ended` is called with the name of a child that ended by itself and will be started again.
    """
    ending = asyncio.Event()
    impatient = asyncio.Event()

    def signalled() -> None:
        (impatient if ending.is_set() else ending).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled)
    theirs, mine = os.pipe()
    try:
        keeping = [_Keeper(child, sock, theirs, ended) for child in children]
        tasks = [asyncio.create_task(one.keep(ending)) for one in keeping]
        await ending.wait()
        for one in keeping:
            one.signal(signal.SIGTERM)
        waiting = asyncio.create_task(impatient.wait())
        all_ended = asyncio.ensure_future(asyncio.gather(*tasks))
        both: set[asyncio.Future[Any]] = {waiting, all_ended}
        await asyncio.wait(both, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        for one in keeping:
            one.signal(signal.SIGKILL)
        await all_ended
        waiting.cancel()
    finally:
        os.close(theirs)
        os.close(mine)


class _Keeper:
    """Starts one child, again and again."""

    def __init__(self, child: Child, sock: socket.socket, pipe: int, ended: Callable[[str], None]) -> None:
        self._child, self._ended = child, ended
        self._inherited = (pipe, sock.fileno()) if child.shares else (pipe,)
        self._environment = {**os.environ, **child.environment, PIPE: str(pipe)}
        self._process: asyncio.subprocess.Process | None = None

    async def keep(self, ending: asyncio.Event) -> None:
        """Until `ending` is set and the child has ended."""
        wait = 0.0
        while not ending.is_set():
            started = time.monotonic()
            self._process = await asyncio.create_subprocess_exec(
                *self._child.command,
                env=self._environment,
                pass_fds=self._inherited,
                start_new_session=True,  # Ctrl-C is for the supervisor, which hands it on
            )
            if self._child.nice:
                own = os.getpriority(os.PRIO_PROCESS, 0)
                os.setpriority(os.PRIO_PROCESS, self._process.pid, min(19, own + self._child.nice))
            if ending.is_set():
                self.signal(signal.SIGTERM)
            code = await self._process.wait()
            if ending.is_set():
                return
            self._ended(self._child.name)
            sound = time.monotonic() - started > STEADY_SECONDS
            wait = 0.0 if sound else wait
            print(
                f"{self._child.name} ended ({_how(code)}); it is started again in {wait:g} s",
                file=sys.stderr,
                flush=True,
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ending.wait(), wait or 0.01)
            wait = min(max(FIRST_WAIT, 2 * wait), LAST_WAIT)

    def signal(self, number: int) -> None:
        """Send a signal to the child, if it runs."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)


def begun(setup: Setup) -> None:
    """Make the place of a setup, with the first token. Raises UserError, OSError."""
    read_configuration(setup.home / CONFIG_FILE)
    make_directory(setup.state)
    if Tokens(setup.tokens).first(setup.first_token):
        print(f"the first operator token is in {setup.first_token}", flush=True)


def run(sock: socket.socket, setup: Setup, others: Sequence[Child] = ()) -> None:
    """Serve a setup on a listening socket, with other processes beside, until SIGTERM or Ctrl-C. Raises UserError, OSError."""
    begun(setup)
    file = setup.state / "setup.json"
    replace_whole(file, setup.model_dump_json(), sync=False)
    metrics.begin(setup.metrics, [SUPERVISOR, *map(str, range(setup.serving.workers))])
    os.environ |= {metrics.FOLDER: str(setup.metrics), metrics.PLACE: SUPERVISOR}
    counted = metrics.Metrics().restarts
    print(f"listening on {setup.listen.url(sock.getsockname()[1])}", flush=True)
    children = [*workers(setup, file, sock.fileno()), *others]
    asyncio.run(supervise(sock, children, setup.limits.answer_s + 5, lambda name: counted.labels(name).inc()))


def _how(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


if __name__ == "__main__":
    given = Setup.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with listening(given.listen) as listener:
        run(listener, given)
