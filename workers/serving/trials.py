"""The counts that serving processes keep of trials of candidates on real requests.

A process keeps its counts in a file of its own, and whoever decides adds them up. A process that is started anew has a new file.
Invariant: counts are read for one trial only, so those of an earlier one never decide about a later one.
"""

import contextlib
import json
from dataclasses import asdict
from pathlib import Path

from merge_service.files import replace_whole
from merge_service.live import Observed

FOLDER = "trials"
"""Where counts are, in the place of a service."""


class Trials:
    """The counts of a service's trials, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, process: str, key: str, observed: Observed) -> None:
        """Keep what a process has counted of a trial. Raises OSError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        replace_whole(self._folder / f"{process}.json", json.dumps({"key": key, **asdict(observed)}))

    def read(self, key: str) -> Observed:
        """What all processes have counted of a trial."""
        found = Observed()
        for path in self._folder.glob("*.json"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                body = json.loads(path.read_text(encoding="utf-8"))
                if body.pop("key") == key:
                    found += Observed(**body)
        return found

    def clear(self) -> None:
        """Forget all counts."""
        for path in self._folder.glob("*.json"):
            path.unlink(missing_ok=True)
