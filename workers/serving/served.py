"""Which weights are served: what a serving process follows.

A process polls its `Head` and serves what the head says, and nothing else. `HeadFile` keeps that in a small file, replaced as a whole.
Invariant: a reader of the file sees one statement or the next, never parts of both.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from merge_service.files import replace_whole


@dataclass(frozen=True)
class Served:
    """Weights that were promoted: `path` is a safetensors file with this `sha256`, merged at time step `t` after the arrival
    `arrival` ("" for a base); `seq` numbers the statement that they are served."""

    t: int
    arrival: str
    sha256: str
    path: Path
    seq: int

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` reads them."""
        return {**asdict(self), "path": str(self.path)}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Served":
        """Raises KeyError, TypeError or ValueError for anything that `to_json` does not give."""
        t, seq = int(found["t"]), int(found["seq"])
        return cls(t, str(found["arrival"]), str(found["sha256"]), Path(found["path"]), seq)


@dataclass(frozen=True)
class Trial:
    """The candidate `served` answers this share of requests as well; what it says is returned, or with `shadow` only compared. `key` names
    the trial."""

    served: Served
    share: float
    shadow: bool
    key: str

    def takes(self, session: str) -> bool:
        """Whether a request of this session is in the share; always the same for the same session."""
        drawn = int.from_bytes(hashlib.sha256(f"{self.key} {session}".encode()).digest()[:8], "big")
        return drawn < self.share * 2**64

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` reads them."""
        return {**asdict(self), "served": self.served.to_json()}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Trial":
        """Raises KeyError, TypeError or ValueError for anything that `to_json` does not give."""
        served = Served.from_json(found["served"])
        return cls(served, float(found["share"]), bool(found["shadow"]), str(found["key"]))


class Head(Protocol):
    """Says which weights are served. Both methods are called often, so they must be quick, and must not raise."""

    def current(self) -> Served | None:
        """What is to be served now; None before anything was promoted."""

    def kept(self) -> Sequence[Served]:
        """All weights whose files are there to be downloaded, the current ones among them."""


class HeadFile:
    """A head in a JSON file: {"current": ..., "kept": [...], "trial": ...}.

    A file that is missing or cannot be read leaves the last statement in force.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read: _Read = (None, None, (), None)

    def current(self) -> Served | None:
        """As of `Head`."""
        return self._now()[1]

    def kept(self) -> Sequence[Served]:
        """As of `Head`."""
        return self._now()[2]

    def trial(self) -> Trial | None:
        """The candidate that is tried on real requests now."""
        return self._now()[3]

    def write(self, current: Served | None, kept: Sequence[Served] = (), trial: Trial | None = None) -> None:
        """Replace the statement. Raises OSError."""
        body = {
            "current": current and current.to_json(), "kept": [one.to_json() for one in kept],
            "trial": trial and trial.to_json(),
        }  # fmt: skip
        replace_whole(self._path, json.dumps(body))

    def _now(self) -> "_Read":
        """What was read last, read anew if the file is another one; threads may ask at once."""
        try:
            state = self._path.stat()
            stamp = (state.st_mtime_ns, state.st_size, state.st_ino)
            if stamp != self._read[0]:
                found = json.loads(self._path.read_text(encoding="utf-8"))
                current = found["current"] and Served.from_json(found["current"])
                kept = tuple(Served.from_json(one) for one in found.get("kept", ()))
                if current is not None and current not in kept:
                    kept = (*kept, current)
                trial = Trial.from_json(found["trial"]) if found.get("trial") else None
                self._read = (stamp, current, kept, trial)
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return self._read


_Read = tuple[tuple[int, int, int] | None, Served | None, tuple[Served, ...], Trial | None]
"""What tells one file from another, and its statement."""
