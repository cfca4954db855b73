"""The library versions that made the artifacts of a study, and whether they agree.

Other versions may give other bits for the same step. A fingerprint does not include them, because it names what is
computed, not what computes it.
Invariant: an artifact of other versions is used only with a warning, or refused (`--strict-versions`).
"""

import contextlib
import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol

from merge_service.errors import UserError

PACKAGES = ("temporal-merge", "torch", "open_clip_torch", "deepspeed", "numpy", "safetensors")
Found = dict[str, dict[str, int]]
"""The number of artifacts by package and version."""


class Made(Protocol):
    """The part of a record that is read here."""

    @property
    def versions(self) -> dict[str, str]: ...


class OtherVersions(UserError):
    """`--strict-versions`: other library versions made an artifact that the study would use."""


@cache
def here() -> Mapping[str, str]:
    """Versions of Python and of the libraries that affect results, in this process."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def counted(records: Iterable[Made]) -> Found:
    """How many records name each version of each package."""
    answer: dict[str, Counter[str]] = {}
    for record in records:
        for package, found in record.versions.items():
            answer.setdefault(package, Counter())[found] += 1
    return {package: dict(sorted(versions.items())) for package, versions in sorted(answer.items())}


def mixed(found: Found) -> Found:
    """The packages of which several versions made artifacts."""
    return {package: versions for package, versions in found.items() if len(versions) > 1}


def foreign(found: Found, own: Mapping[str, str]) -> Found:
    """Artifacts made by other versions than `own`; a package that is not installed here cannot differ."""
    others = {
        package: {one: count for one, count in versions.items() if one != own[package]}
        for package, versions in found.items()
        if package in own
    }
    return {package: versions for package, versions in others.items() if versions}


def as_text(found: Found) -> str:
    """The counts as text: torch 2.5.0 (3 artifacts) and 2.6.0 (20); numpy ..."""
    parts = []
    for package, versions in found.items():
        counts = [
            f"{one} ({count} artifact{'s' if count > 1 else ''})" for one, count in sorted(versions.items())
        ]
        parts.append(f"{package} {' and '.join(counts)}")
    return "; ".join(parts)


def mixed_text(found: Found) -> str:
    """The warning about artifacts that several versions made; empty if there are none."""
    several = mixed(found)
    return f"these artifacts were made by several library versions: {as_text(several)}" if several else ""


def check(records: Iterable[Made], strict: bool, place: str) -> str:
    """The warning about artifacts in `place` that other versions made; empty if there are none.

    Raises OtherVersions instead if `strict`.
    """
    others = foreign(counted(records), here())
    if not others:
        return ""
    installed = ", ".join(f"{package} {here()[package]}" for package in others)
    text = f"artifacts in {place} were made by other library versions than those here ({installed}): {as_text(others)}"
    if strict:
        raise OtherVersions(
            f"{text}. Install those versions, choose another --out (and storage.store) to recompute the artifacts, or leave out "
            "--strict-versions"
        )
    return f"{text}. They are used as they are; --strict-versions refuses them"
