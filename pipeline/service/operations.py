"""What people ask of a service: each is decided on the newest state, appended, and answered once it is durable.

Invariant: an operation that was done before is not done again. What needs work (a merge, an evaluation) is done by the worker, which
finds in the log what is asked of it.
"""

from dataclasses import dataclass
from pathlib import Path

from merge_service.errors import UserError
from merge_service.live import (
    Draft,
    Entry,
    Known,
    Received,
    Refused,
    Removed,
    State,
    purge,
    receive,
    reject,
    release,
    remove,
    roll_back,
)
from pipeline.service.home import Home
from pipeline.study.mistakes import nearest


@dataclass(frozen=True)
class Sender:
    """Who sends an expert, and what is said about it. `init` is base, foreign, or the sha256 of the weights it started from."""

    task: str
    owner: str
    license: str = ""
    note: str = ""
    init: str = "base"
    replaces: str | None = None


class Operations:
    """The operations of an open service; `actor` is who asks, for the log."""

    def __init__(self, home: Home, actor: str = "local") -> None:
        self.home, self.actor = home, actor

    def arrive(self, checkpoint: Path, sender: Sender) -> str:
        """Take an expert in; returns the id of its arrival, which is that of the first where it came before. The bytes and the
        arrival are durable then. Raises UserError for what is no checkpoint, is too large, or is refused.
        """
        self._check_task(sender.task)
        taken = self.home.experts.take(checkpoint, self.home.config.admission.max_bytes)
        data = Received(
            sender.task, taken.sha256, taken.bytes, sender.init, sender.owner, sender.license, sender.note,
            replaces=sender.replaces, init_seq=self._held_since(sender.init),
        )  # fmt: skip
        return self.received(data)

    def received(self, data: Received) -> str:
        """Append an arrival whose bytes are in `incoming`; returns its id, or that of the first. Raises Refused."""
        known: list[str] = []

        def decide(state: State) -> Draft | None:
            found = receive(state, data, self.actor)
            if isinstance(found, Known):
                known.append(found.arrival)
                return None
            if (waiting := state.index.waiting) >= self.home.config.limits.waiting:
                raise Refused("limit.waiting", f"{waiting} arrivals wait already; send it again later")
            return found

        entry = self.home.log.append(decide)
        return known[-1] if entry is None else str(entry.arrival)

    def release(self, arrival: str, reason: str) -> Entry | None:
        """Let an arrival go on in spite of why it was stopped; a held candidate is promoted by this. Raises Refused."""
        return self.home.log.append(lambda state: release(state, arrival, reason, self.actor))

    def reject(self, arrival: str, reason: str) -> Entry | None:
        """Refuse a held arrival. Raises Refused."""
        return self.home.log.append(lambda state: reject(state, arrival, reason, self.actor))

    def roll_back(self, t: int, reason: str, hold: bool = False) -> Entry | None:
        """Serve time step `t`. Raises Refused."""
        return self.home.log.append(lambda state: roll_back(state, t, reason, self.actor, hold))

    def remove(self, arrival: str, data: Removed) -> Entry | None:
        """Take an expert out of all merges, or withdraw it. Raises Refused."""
        strategy = self.home.config.timeline
        return self.home.log.append(lambda state: remove(state, strategy, arrival, data, self.actor))

    def purge(self, arrival: str, reason: str) -> Entry | None:
        """Delete the bytes of a removed expert for ever. Raises Refused."""
        strategy = self.home.config.timeline
        return self.home.log.append(lambda state: purge(state, strategy, arrival, reason, self.actor))

    def _check_task(self, task: str) -> None:
        """Raise UserError for a task that nobody may submit for."""
        tasks = self.home.config.tasks
        if not tasks.open and task not in tasks.list:
            raise UserError(
                f"--task {task}: this service takes {', '.join(tasks.list)}{nearest(task, tasks.list)}"
            )

    def _held_since(self, init: str) -> int | None:
        """The entry since which the weights with this sha256 are what the next expert starts from; None if they never were."""
        state = self.home.log.refresh()
        t = state.index.starts.get(init)
        return None if t is None else state.arrivals[state.sequence[t - 1].arrival].accepted_seq
