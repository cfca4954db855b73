"""Who may do what: tokens of three roles, of which only digests are kept.

A token is `tmk_<id>_<43 characters>`: 256 random bits. Its sha256 is compared in constant time, so neither the file nor the time of an
answer gives it away; 256 bits need no slow hash. Processes read the file anew when it changed, so a revoked token ends at once.
The keys that tickets and sessions are signed with are files of the same kind (`key_in`).
Invariant: a token itself is written nowhere but in the file of the first one, which only its owner can read.
"""

import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from merge_service.files import make_directory, prepared, replace_whole, sync_directory
from pipeline.errors import ConfigError

Role = Literal["reader", "submitter", "operator"]
ROLES: tuple[Role, ...] = ("reader", "submitter", "operator")
"""Each may do what those before it may."""
FORM = re.compile(r"tmk_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
DAY = 24 * 3600
_KEY_BYTES = 32
_NOBODY = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True)
class Token:
    """What is kept of a token: no secret. Times are seconds since 1970; None means without a bound."""

    id: str
    sha256: str
    role: Role
    created: float
    expires: float | None = None
    revoked: float | None = None
    tasks: tuple[str, ...] | None = None
    owners: tuple[str, ...] | None = None
    per_day: int | None = None
    note: str = ""

    def may(self, role: Role) -> bool:
        """Whether this token's role includes another."""
        return ROLES.index(self.role) >= ROLES.index(role)

    @property
    def sees_all(self) -> bool:
        """Whether it sees figures of gates and the log: one that is bound to owners is a stranger's, who could fit an expert to them."""
        return self.may("operator") or self.owners is None

    @property
    def is_operator(self) -> bool:
        """Whether it opens what an operator may, now."""
        open_ = self.revoked is None and (self.expires is None or time.time() < self.expires)
        return open_ and self.may("operator")


class TokenRefused(Exception):
    """A token that opens nothing; `code` is token.missing, .unknown, .expired or .revoked."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


class Tokens:
    """The tokens in one file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._known: dict[str, Token] = {}

    def find(self, presented: str, now: float | None = None) -> Token:
        """The token that was presented. Raises TokenRefused."""
        form = FORM.fullmatch(presented)
        token = self._every().get(form[1]) if form else None
        same = hmac.compare_digest(token.sha256 if token else _NOBODY, _digest(presented))
        if token is None or not same:
            raise TokenRefused("token.unknown")
        if token.revoked is not None:
            raise TokenRefused("token.revoked")
        if token.expires is not None and (time.time() if now is None else now) >= token.expires:
            raise TokenRefused("token.expired")
        return token

    def issue(
        self, role: Role, days: float | None = 90, note: str = "", bounds: Mapping[str, Any] | None = None
    ) -> tuple[str, Token]:
        """A new token, which is returned once and not kept, and what is kept. `bounds`: tasks, owners, per_day. Raises OSError."""
        text, token = drafted(role, days, note, bounds)
        self.add(token)
        return text, token

    def revoke(self, number: str) -> bool:
        """End a token by its id; False if there is none. Raises OSError."""
        with self._changing() as known:
            if number not in known:
                return False
            if known[number].revoked is None:
                known[number] = replace(known[number], revoked=time.time())
        return True

    def every(self) -> list[Token]:
        """All tokens ever issued, the oldest first."""
        return sorted(self._every().values(), key=lambda token: token.created)

    def first(self, file: Path) -> bool:
        """Issue an operator token for a service that has no token, and write it to `file`, which only its owner reads.

        False if there are tokens. Raises ConfigError if the file is there already, OSError.
        """
        if self._every():
            return False
        make_directory(file.parent)
        try:
            handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        except FileExistsError:
            raise ConfigError(
                f"{file} holds a token of another service: {self._path} is not there. Remove the file to get a new first token"
            ) from None
        text, token = drafted("operator", 365, "first")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        sync_directory(file.parent)
        self.add(token)  # last, so that no token counts that nobody could read
        return True

    def add(self, token: Token) -> None:
        """Let a token count. Raises OSError."""
        with self._changing() as known:
            known[token.id] = token

    def _every(self) -> dict[str, Token]:
        try:
            state = self._path.stat()
            stamp = (state.st_mtime_ns, state.st_size, state.st_ino)
            if stamp != self._stamp:
                self._known, self._stamp = self._read(), stamp
        except FileNotFoundError:
            self._known, self._stamp = {}, None
        return self._known

    def _read(self) -> dict[str, Token]:
        if not self._path.exists():
            return {}
        found = json.loads(self._path.read_text(encoding="utf-8"))
        return {one["id"]: _token(one) for one in found}

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Token]]:
        """The tokens, which are written back; one process at a time."""
        make_directory(self._path.parent)
        with self._path.with_name(f".{self._path.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            known = self._read()
            yield known
            text = json.dumps([asdict(token) for token in known.values()], indent=1)
            replace_whole(self._path, text, mode=0o600)


def drafted(
    role: Role, days: float | None = 90, note: str = "", bounds: Mapping[str, Any] | None = None
) -> tuple[str, Token]:
    """The text of a new token, and what is to be kept of it. `bounds`: tasks, owners, per_day."""
    number, now = secrets.token_hex(6), time.time()
    text = f"tmk_{number}_{secrets.token_urlsafe(32)}"
    return text, Token(
        number,
        _digest(text),
        role,
        now,
        None if days is None else now + days * DAY,
        note=note,
        **dict(bounds or {}),
    )


def key_in(file: Path) -> bytes:
    """The secret key in a file that only its owner reads; it is made where it is missing, and of several writers the first counts."""
    if not file.exists():
        make_directory(file.parent)
        with prepared(file, secrets.token_bytes(_KEY_BYTES), mode=0o600) as made, suppress(FileExistsError):
            os.link(made, file)
        sync_directory(file.parent)
    return file.read_bytes()


def _token(found: dict[str, Any]) -> Token:
    several = {key: tuple(found[key]) for key in ("tasks", "owners") if found.get(key) is not None}
    return Token(**{**found, **several})


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
