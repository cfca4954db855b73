"""What the routes of a live service share in one process: the open service, its uploads and its tokens.

Invariant: an answer is given of the newest entry that is there, and what was appended is durable before it is answered.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from merge_service.checkpoints import WEIGHTS_FILE
from merge_service.errors import UserError
from merge_service.live import State
from pipeline.service.home import Home
from pipeline.service.http.problems import Problem
from pipeline.service.http.schemas import Standing
from pipeline.service.intake.tickets import Tickets
from pipeline.service.intake.uploads import FOLDER, Room, Uploads
from pipeline.service.operations import Operations, Quota
from pipeline.service.settings import Setup
from pipeline.service.tokens import Token, Tokens
from workers.serving.served import Served

MOST_WAIT = 30
"""Seconds that one request may wait for something to happen."""
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Live:
    """An open service; `ending` is set when this process is to end, so that nobody goes on waiting."""

    home: Home
    uploads: Uploads
    tokens: Tokens
    tickets: Tickets
    ending: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def open(cls, setup: Setup, ending: threading.Event) -> "Live":
        """The service of a setup. Raises UserError."""
        if setup.out is None:
            raise UserError("the setup names no service (out)")
        home = Home.open(setup.out)
        tickets = Tickets(setup.ticket_key, home.config.name)
        return cls(home, Uploads(home.place / FOLDER, Room.of(home)), Tokens(setup.tokens), tickets, ending)

    def state(self) -> State:
        """The newest state."""
        return self.home.log.refresh()

    def operations(self, token: Token, if_head: str | None = None) -> Operations:
        """Operations in the name of a token."""
        return Operations(self.home, token.id, if_head)

    def quota(self, token: Token) -> Quota:
        """How much a token may send. One that may use any owner's name is counted itself as well, except the operator's."""
        most = self.home.config.limits.per_owner_per_day
        free = token.may("operator") or token.owners is not None
        own = token.per_day if token.per_day is not None or free else most
        return Quota(most, own, int(time.time() * 1000))

    async def until(self, done: Callable[[State], bool], seconds: float) -> State:
        """The state once it is so, or after these seconds."""
        last = time.monotonic() + seconds
        while True:
            state = await asyncio.to_thread(self.state)
            if done(state) or time.monotonic() >= last or self.ending.is_set():
                return state
            await asyncio.sleep(_POLL_SECONDS)

    def challenger(self) -> Served | None:
        """The candidate that is being judged, if its file is there."""
        state = self.state()
        one = state.challenger
        if one is None or one.candidate is None:
            return None
        record = self.home.store.find(one.candidate.fingerprint)
        if record is None:
            return None
        file = (record.path / WEIGHTS_FILE).absolute()
        return Served(one.candidate.t, one.id, one.candidate.sha256, file, state.seq)

    def standing(self) -> Standing:
        """How the service stands."""
        return Standing.of(self.state())


def check_bounds(token: Token, task: str, owner: str | None = None) -> None:
    """Raise Problem for a task or an owner that the token is not for."""
    if token.tasks is not None and task not in token.tasks:
        raise Problem("task.forbidden", f"the token is for {', '.join(token.tasks)}")
    if owner is not None and token.owners is not None and owner not in token.owners:
        raise Problem("owner.forbidden", f"the token is for {', '.join(token.owners)}")
