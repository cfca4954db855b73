"""Which library versions made the artifacts of a study, and whether they are all the same.

Other versions may give other bits for the same step, and a fingerprint does not hold them: it names what is to be computed, not by
whom. Invariant: an artifact of other versions is used only with a word about it, or refused (`--strict-versions`).
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
"""How many artifacts each version of a package has made."""


class Made(Protocol):
    """What is asked of a record."""

    @property
    def versions(self) -> dict[str, str]: ...


class OtherVersions(UserError):
    """`--strict-versions`: an artifact that the study would use was made by other library versions."""


@cache
def here() -> Mapping[str, str]:
    """Versions of Python and of the libraries that bear on results, in this process."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def counted(records: Iterable[Made]) -> Found:
    """How many records name which version of each package."""
    answer: dict[str, Counter[str]] = {}
    for record in records:
        for package, found in record.versions.items():
            answer.setdefault(package, Counter())[found] += 1
    return {package: dict(sorted(versions.items())) for package, versions in sorted(answer.items())}


def mixed(found: Found) -> Found:
    """Those packages of which several versions made artifacts."""
    return {package: versions for package, versions in found.items() if len(versions) > 1}


def foreign(found: Found, own: Mapping[str, str]) -> Found:
    """Artifacts that other versions than one's own made; a package that is not installed here cannot differ."""
    others = {
        package: {one: count for one, count in versions.items() if one != own[package]}
        for package, versions in found.items()
        if package in own
    }
    return {package: versions for package, versions in others.items() if versions}


def told(found: Found) -> str:
    """torch 2.5.0 (3 artifacts) and 2.6.0 (20); numpy ..., for people."""
    parts = []
    for package, versions in found.items():
        counts = [
            f"{one} ({count} artifact{'s' if count > 1 else ''})" for one, count in sorted(versions.items())
        ]
        parts.append(f"{package} {' and '.join(counts)}")
    return "; ".join(parts)


def mixed_text(found: Found) -> str:
    """What is said of artifacts that several versions made; empty if there are none."""
    several = mixed(found)
    return f"these artifacts were made by several library versions: {told(several)}" if several else ""


def check(records: Iterable[Made], strict: bool, place: str) -> str:
    """What is to be said of artifacts found in `place` that other versions made; empty if none were.

    Raises OtherVersions instead if `strict`.
    """
    others = foreign(counted(records), here())
    if not others:
        return ""
    installed = ", ".join(f"{package} {here()[package]}" for package in others)
    text = f"artifacts in {place} were made by other library versions than those here ({installed}): {told(others)}"
    if strict:
        raise OtherVersions(
            f"{text}. Install those versions, choose another --out (and storage.store) to make the artifacts anew, or leave out "
            "--strict-versions"
        )
    return f"{text}. They are used as they are; --strict-versions refuses them"
