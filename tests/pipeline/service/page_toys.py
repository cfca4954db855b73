"""The page of toy services: an application with a door, on loopback, and a service with many arrivals."""

import dataclasses
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from merge_service.live import (
    Admitted,
    Data,
    Draft,
    Evaluated,
    Merged,
    Promoted,
    Quarantined,
    Received,
    Scored,
    State,
    Verdict,
    Version,
    apply,
    entry_of,
)
from pipeline.service.home import Home
from pipeline.service.http.door import Door, Guard
from pipeline.service.http.problems import install
from pipeline.service.log import Log
from pipeline.service.metrics import Metrics
from pipeline.service.page import Page, router
from pipeline.service.settings import LimitsSection, ListenSection
from pipeline.service.shelf import Directory
from pipeline.service.tokens import Tokens

HOSTILE = """<script>document.title='owned'</script><img src=x onerror="document.title='owned'">"""
LONG = "a_task_whose_name_never_ends_" * 5


def application(home: Home, state: Path, tokens: Tokens) -> ASGIApp:
    app = FastAPI()
    install(app)
    app.include_router(router(Page(home, tokens, state)))
    return Door(app, Guard(ListenSection(), LimitsSection(), tokens, Metrics(), {}))


@contextmanager
def listening(app: ASGIApp) -> Iterator[str]:
    """The address of an application that listens on loopback meanwhile."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        (port,) = {one.getsockname()[1] for server in server.servers for one in server.sockets}
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def crowded(home: Home, place: Path, arrivals: int) -> Home:
    """The same service after so many arrivals, of which every third was stopped; names are hostile, or long."""
    state = home.log.state
    for number in range(arrivals):
        name, state = _came(state, number)
        stopped: Data = Quarantined(("solo.no_gain",), "it gains nothing", {"norm": 1.0})
        state = _say(state, stopped, name) if number % 3 == 2 else _accepted(state, name, number)
    return dataclasses.replace(home, log=Log(Directory(place), state))


def _came(state: State, number: int) -> tuple[str, State]:
    task = (LONG, "letters", HOSTILE)[number % 3]
    data = Received(task, f"{number:064x}", 1000, "base", (HOSTILE, "ann", "bob")[number % 3], "MIT", HOSTILE)
    after = _say(state, data, None)
    return next(reversed(dict(after.arrivals))), after


def _accepted(state: State, name: str, number: int) -> State:
    version = Version(state.t + 1, f"f{number}", f"{number:064x}")
    share = number / (number + 20)
    scored = Scored(f"e{number}", {}, 0.5, 0.1 + 0.6 * share, 0.6 - 0.2 * share, 0.25 + 0.2 * share)
    solo = Verdict("solo.letters", "pass", 0.31, 0.2, 0.42, 0.02)
    mean = Verdict("accumulated.mean", "pass", -0.01, -0.03, 0.01, 0.1)
    for data in (
        Admitted(f"x{number}", {"norm": 1.2, "norm.text": 0.4}, (solo,)),
        Merged(version, state.chain),
        Evaluated(scored, (mean,)),
        Promoted(version, scored),
    ):
        state = _say(state, data, name)
    return state


def _say(state: State, data: Data, name: str | None) -> State:
    return apply(state, entry_of(Draft(data, name), state.seq + 1, state.head, 1_790_000_000_000 + state.seq))
