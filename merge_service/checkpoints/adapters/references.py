"""What the path of an input means: a checkpoint, an adapter, or BASE+ADAPTER.

A name that holds a + counts as one path if it exists; else it is cut at the last + that leaves two paths which exist.

Invariant: nothing but names and the existence of files decides, and a base that was named is never replaced by another.
"""

from dataclasses import dataclass
from pathlib import Path

from merge_service.checkpoints.folders.kinds import ADAPTER, ADAPTER_CONFIG, read_json, standard_file
from merge_service.errors import CheckpointError
from merge_service.files.ranges import origin

SIGN = "+"


@dataclass(frozen=True)
class Reference:
    """An adapter, and the base that the user named for it (None: none)."""

    adapter: Path
    base: Path | None = None

    @classmethod
    def of(cls, path: Path | str) -> "Reference | None":
        """The adapter that a path means; None for an ordinary checkpoint. Raises `CheckpointError` if one side of a + is missing."""
        whole = Path(path)
        if whole.exists():
            return cls(whole) if is_adapter(whole) else None
        text = str(whole)
        cuts = [at for at, sign in enumerate(text) if sign == SIGN and 0 < at < len(text) - 1]
        for at in reversed(cuts):
            base, adapter = Path(text[:at]), Path(text[at + 1 :])
            if adapter.exists() and (base.exists() or cls.of(base) is not None):
                return cls(adapter, base)
        if cuts:
            base, adapter = Path(text[: cuts[-1]]), Path(text[cuts[-1] + 1 :])
            lacking = base if adapter.exists() else adapter
            raise CheckpointError(f"{text} means BASE{SIGN}ADAPTER, and {lacking} does not exist")
        return None

    @property
    def text(self) -> Path:
        """The path that means the same from any directory."""
        adapter = _place(self.adapter)
        return adapter if self.base is None else Path(f"{absolute(self.base)}{SIGN}{adapter}")

    @property
    def stated(self) -> str | None:
        """What the adapter's configuration calls its base."""
        found = (read_json(folder_of(self.adapter) / ADAPTER_CONFIG) or {}).get("base_model_name_or_path")
        return found if isinstance(found, str) and found else None

    @property
    def own_base(self) -> Path | None:
        """The base that the configuration names, if it is a path on this machine."""
        stated = self.stated
        if stated is None:
            return None
        for place in (Path(stated), folder_of(self.adapter) / stated):
            if place.exists() and not is_adapter(place):
                return place
        return None


def is_adapter(path: Path) -> bool:
    """Whether a path that exists is an adapter's directory, or its file of weights."""
    if path.is_dir():
        held = standard_file(path)
        return (path / ADAPTER_CONFIG).is_file() and (held is None or held.name.startswith(ADAPTER))
    return path.name.startswith(f"{ADAPTER}.") and (path.parent / ADAPTER_CONFIG).is_file()


def folder_of(path: Path) -> Path:
    """The directory of a model or an adapter."""
    return path if path.is_dir() else path.parent


def absolute(path: Path | str) -> Path:
    """The absolute path of an input, whichever of its forms it has."""
    found = Reference.of(path)
    return _place(Path(path)) if found is None else found.text


def _place(path: Path) -> Path:
    """The absolute path, or what stands for it if it is remote."""
    there = origin(path)
    return path.absolute() if there is None else Path(there)


def parts_of(path: Path | str) -> list[Path]:
    """The paths behind an input: itself, or the base of an adapter (named, or its own) and the adapter, in this order."""
    found = Reference.of(path)
    if found is None:
        return [Path(path)]
    base = found.base or found.own_base
    return [*(parts_of(base) if base else ()), found.adapter]
