"""Parts of files on web servers: kept connections, and one rule of what is asked again.

Inputs of a merge on a hub and shards of data at an address are read through here. Proxies and certificates are those of the environment.

Invariant: no more of an answer is read than was asked for, and a credential of a request goes to no other host than its own.
"""

import logging
import os
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import httpx2

TRIES, PAUSE, LONGEST = 5, 0.3, 300.0
"""Times that a request is made; seconds before the second, doubled from then on, and the most that a server may ask for, which is the window
of the hub's limits."""
TIMEOUT = 60.0
_LONG = 5.0
_log = logging.getLogger(__name__)
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_PLACED = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_RESET = re.compile(r"\bt=(\d+)")
Found = TypeVar("Found")


class Passing(Exception):
    """A failure that may pass. `status` is that of the answer, if there was one; `wait` are the seconds that the server asks for."""

    def __init__(self, said: str, status: int | None = None, wait: float = 0.0) -> None:
        super().__init__(said)
        self.status, self.wait = status, wait


@dataclass(frozen=True)
class Answer:
    """An answer of a server that is not too busy: the file, a redirect or a refusal, with its status."""

    status: int
    data: bytes
    placed: str | None
    """Its Content-Range."""

    def size_of_whole(self, start: int, stop: int) -> int | None:
        """The size of the file, if the answer is bytes start..stop of it, or those of them that it has; otherwise None."""
        found = _PLACED.fullmatch(self.placed or "")
        if self.status != 206 or found is None or int(found[1]) != start:
            return None
        size = int(found[3])
        return size if len(self.data) == min(stop, size) - start else None


def tried(once: Callable[[], Found]) -> Found:
    """What `once` returns, which is called up to TRIES times. Raises the last `Passing`."""
    for attempt in range(TRIES - 1):
        try:
            return once()
        except Passing as error:
            if (asked := min(error.wait, LONGEST)) > _LONG:
                _log.warning("%s: waiting for %.0f s, as the server asks", error, asked)
            time.sleep(max(PAUSE * 2**attempt * (1 + random.random()), asked))
    return once()


def get(url: str, headers: Mapping[str, str], most: int, follow: bool) -> Answer:
    """The answer at a URL, asked for once, with up to `most` bytes of its body. `follow` says whether redirects are followed.

    Raises `Passing` where nobody answers, the connection ends, or the server is busy.
    """
    import httpx2

    data = bytearray()
    try:
        with _client(os.getpid()).stream(
            "GET", url, headers={"Accept-Encoding": "identity", **headers}, follow_redirects=follow
        ) as answer:
            if answer.status_code in _PASSING:
                raise Passing(f"status {answer.status_code}", answer.status_code, _asked(answer.headers))
            for piece in answer.iter_raw():
                data += piece
                if len(data) > most:
                    break
            return Answer(answer.status_code, bytes(data[:most]), answer.headers.get("content-range"))
    except (httpx2.RequestError, httpx2.InvalidURL) as error:
        cut = f" after {len(data)} bytes" if data else ""
        raise Passing(f"{type(error).__name__}{cut}: {error}") from None


def get_range(url: str, start: int, stop: int, headers: Mapping[str, str], follow: bool) -> Answer:
    """As `get`, for bytes start..stop of a file, with stop > start."""
    return get(url, {"Range": f"bytes={start}-{stop - 1}", **headers}, stop - start, follow)


def _asked(headers: Mapping[str, str]) -> float:
    """The seconds that a busy server asks for, by Retry-After or by `t` of RateLimit, as the hub does."""
    later, limit = headers.get("retry-after", ""), _RESET.search(headers.get("ratelimit", ""))
    return float(later) if later.isdigit() else float(limit[1]) if limit else 0.0


@cache
def _client(process: int) -> "httpx2.Client":
    """The connections of a process; those of the process that forked it are not its own."""
    import httpx2

    return httpx2.Client(timeout=TIMEOUT, headers={"User-Agent": "temporal-merge"})
