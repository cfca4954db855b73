"""Start tickets: what a service says about the weights that training starts from, in a text that only it can make.

A ticket is an HMAC over service, entry of the log, task, weights and expiry. An expert that comes back with one has a known start, and
a known staleness: how many experts were accepted since. A ticket is used once; the log keeps its digest.

Invariant: a text that this service did not make, or made for another task, is refused, and says nothing about an expert.
"""

import base64
import hashlib
import hmac
import json
import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from merge_service.live import Refused
from pipeline.service.tokens import key_in

DAYS = 30
"""How long a ticket is good for."""
MOST = 2000
"""Characters of a ticket."""
_PREFIX = "tms_"


@dataclass(frozen=True)
class Ticket:
    """What a ticket says: the service, the entry `seq` after which the weights with sha256 `init` were the start, for which task, until
    when (seconds since 1970), and a number of its own."""

    service: str
    seq: int
    task: str
    init: str
    expires: int
    number: str


class Tickets:
    """The tickets of one service; the key is in a file that only its owner can read."""

    def __init__(self, file: Path, service: str) -> None:
        self._file, self._service = file, service

    def issue(self, seq: int, task: str, init: str) -> tuple[str, Ticket]:
        """A new ticket, and its text. Raises OSError."""
        expires = int(time.time()) + DAYS * 24 * 3600
        ticket = Ticket(self._service, seq, task, init, expires, secrets.token_hex(8))
        body = json.dumps(asdict(ticket), separators=(",", ":")).encode()
        return f"{_PREFIX}{_text(body)}.{_text(self._sign(body))}", ticket

    def read(self, text: str, task: str, now: float | None = None) -> Ticket:
        """What a ticket says. Raises Refused."""
        body, _, signed = text.removeprefix(_PREFIX).partition(".")
        try:
            data, mac = _bytes(body), _bytes(signed)
        except ValueError:
            data, mac = b"", b""
        if not text.startswith(_PREFIX) or not hmac.compare_digest(mac, self._sign(data)):
            raise Refused("ticket.invalid", "the ticket is not one that this service gave")
        ticket = Ticket(**json.loads(data))
        if ticket.service != self._service:
            raise Refused("ticket.invalid", f"the ticket is of the service {ticket.service}")
        if ticket.task != task:
            raise Refused("ticket.task", f"the ticket is for the task {ticket.task}, not {task}")
        if (time.time() if now is None else now) >= ticket.expires:
            raise Refused("ticket.expired", f"the ticket was good for {DAYS} days")
        return ticket

    def _sign(self, body: bytes) -> bytes:
        return hmac.new(key_in(self._file), body, hashlib.sha256).digest()


def digest_of(text: str) -> str:
    """What the log keeps of a ticket."""
    return hashlib.sha256(text.encode()).hexdigest()


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _bytes(text: str) -> bytes:
    """Raises ValueError for all but the one text of these bytes, so that a ticket has no second form that was not used yet."""
    data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if _text(data) != text:
        raise ValueError("another text of the same bytes")
    return data
