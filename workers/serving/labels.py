"""Label sets: names and templates that classify pictures, and those among them that are registered under a name.

Registered sets are files of one folder, so that all serving processes of a host have the same ones, and a restart keeps them.
Invariant: a set that `put` returned from is found by every later `get`, in any process.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from merge_service.errors import UserError
from merge_service.files import replace_whole, sync_directory

PLACE = "{c}"
"""Where a name goes in a template."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
"""Of a registered set: a plain file name."""
MOST = 100
"""Registered sets of one service."""
DEFAULT_TEMPLATES = (f"a photo of a {PLACE}.",)


class LabelError(UserError):
    """Labels or templates that classify nothing."""


@dataclass(frozen=True)
class LabelSet:
    """Distinct `names`, and `templates` with {c} in the place of a name. Raises LabelError."""

    names: tuple[str, ...]
    templates: tuple[str, ...] = DEFAULT_TEMPLATES

    def __post_init__(self) -> None:
        if not self.names or not self.templates:
            raise LabelError("at least one label and one template are needed")
        if len(set(self.names)) < len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise LabelError(f"the label {twice!r} is there twice: every label must be another")
        if bad := [template for template in self.templates if PLACE not in template]:
            raise LabelError(f"the template {bad[0]!r} needs {PLACE} where the label goes")

    @cached_property
    def digest(self) -> str:
        """Names and order of labels and templates, as hex."""
        return hashlib.sha256(json.dumps([self.names, self.templates]).encode()).hexdigest()

    @property
    def prompts(self) -> int:
        """Texts that pass through the text tower."""
        return len(self.names) * len(self.templates)


class LabelSets:
    """The registered sets of one service, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[str, tuple[tuple[int, int, int], LabelSet]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, name: str, labels: LabelSet) -> bool:
        """Register a set; True if the name is new. Raises LabelError for a name that is none or one set too many, OSError."""
        path = self._path(name)
        new = not path.exists()
        if new and len(self.names()) >= MOST:
            raise LabelError(f"there are {MOST} label sets, which is the most; remove one first")
        replace_whole(path, json.dumps({"names": labels.names, "templates": labels.templates}))
        return new

    def get(self, name: str) -> LabelSet | None:
        """The set of a name; None if there is none."""
        path = self._path(name)
        try:
            state = path.stat()
            stamp = (state.st_mtime_ns, state.st_size, state.st_ino)
            known = self._read.get(name)
            if known is None or known[0] != stamp:
                found = json.loads(path.read_text(encoding="utf-8"))
                known = (stamp, LabelSet(tuple(found["names"]), tuple(found["templates"])))
                self._read[name] = known
        except OSError:
            self._read.pop(name, None)
            return None
        return known[1]

    def remove(self, name: str) -> bool:
        """Forget a set; False if there is none."""
        path = self._path(name)
        there = path.exists()
        path.unlink(missing_ok=True)
        sync_directory(self._folder)
        return there

    def names(self) -> list[str]:
        """Of all registered sets, in order."""
        return sorted(path.stem for path in self._folder.glob("*.json") if NAME.fullmatch(path.stem))

    def every(self) -> Sequence[LabelSet]:
        """All registered sets."""
        return [found for name in self.names() if (found := self.get(name))]

    def _path(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            raise LabelError(
                f"{name[:80]!r} names no label set: letters, digits, dot, dash and underscore, at most 64"
            )
        return self._folder / f"{name}.json"
