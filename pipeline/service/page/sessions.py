"""Sessions of the page: a token is exchanged for a cookie that ends after eight hours, or with the token.

A cookie is `<token id>.<end>.<random>.<mac>`. Nothing is kept of it: the mac is made with a key that all serving processes of a service
read from one file. So a session is valid in each of them, and is worth nothing once its token is revoked.
Invariant: a form acts only with the mac of its own session (CSRF); a cookie that was altered opens nothing.
"""

import hashlib
import hmac
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.service.tokens import Token, Tokens, key_in

COOKIE = "tm_session"
SECONDS = 8 * 3600


@dataclass(frozen=True)
class Session:
    """A session: its token, and what its forms carry."""

    token: Token
    csrf: str


class Sessions:
    """The sessions of one service. `file` keeps the key, readable by its owner only. Raises OSError."""

    def __init__(self, tokens: Tokens, file: Path) -> None:
        self._tokens, self._key = tokens, key_in(file)

    def begin(self, presented: str, now: float | None = None) -> str:
        """The cookie of a new session for a token. Raises TokenRefused."""
        began = time.time() if now is None else now
        token = self._tokens.find(presented, began)
        body = f"{token.id}.{int(began) + SECONDS}.{secrets.token_hex(16)}"
        return f"{body}.{self._mac('session', body)}"

    def find(self, cookie: str, now: float | None = None) -> Session | None:
        """The session of a cookie; None if it is not one of ours, has ended, or its token is worth nothing any more."""
        at = time.time() if now is None else now
        body, _, mac = cookie.rpartition(".")
        if not hmac.compare_digest(mac.encode(), self._mac("session", body).encode()):
            return None
        number, end, _ = body.split(".")
        token = next((one for one in self._tokens.every() if one.id == number), None)
        if token is None or token.revoked is not None or at >= int(end):
            return None
        if token.expires is not None and at >= token.expires:
            return None
        return Session(token, self._mac("form", cookie))

    def _mac(self, what: str, text: str) -> str:
        return hmac.new(self._key, f"{what}\0{text}".encode(), hashlib.sha256).hexdigest()
