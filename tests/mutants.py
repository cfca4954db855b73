"""Deliberately broken lines, and the test that must fail by each: `make mutants`, or for some of them

    python -m tests.mutants --only store outbox

`mutant_list.py` lists them. Each is tried in a scratch copy of the tree, one after the other in every copy; nothing of the tree
itself changes. The exit code is 0 if all tests named there pass as the tree is, and each fails by its mutant.

Invariant: a mutant counts as caught only if its test ran and failed; a text that is not there exactly once, a file that is
not Python any more and a test that does not exist are errors of the list.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from tests.mutant_list import BROKEN
from tests.world import ROOT

SECONDS = 240.0
"""How long the tests of one mutant may take."""


@dataclass(frozen=True)
class Mutant:
    """A `text` that stands in a file exactly once, what is put there `instead`, and the id (without parameters) of a test
    of which at least one case must then fail."""

    file: str
    text: str
    instead: str
    test: str

    @property
    def name(self) -> str:
        """File and first words, as text."""
        return f"{self.file}: {' '.join(self.text.split())[:70]}"

    def applied(self, source: str) -> str:
        """The file's text, broken. Raises ValueError where the list is wrong about it."""
        if source.count(self.text) != 1:
            raise ValueError(f"{self.name}: the text is there {source.count(self.text)} times, not once")
        broken = source.replace(self.text, self.instead)
        if broken == source:
            raise ValueError(f"{self.name}: nothing changes")
        try:
            compile(broken, self.file, "exec")
        except SyntaxError as error:
            raise ValueError(f"{self.name}: not Python any more ({error})") from error
        return broken


MUTANTS = [Mutant(file, *entry) for file, entries in BROKEN.items() for entry in entries]


def problems(mutants: Sequence[Mutant], root: Path) -> list[str]:
    """What is wrong with the list itself, without running anything."""
    found = []
    for mutant in mutants:
        try:
            mutant.applied((root / mutant.file).read_text())
        except (OSError, ValueError) as error:
            found.append(str(error))
        path, _, name = mutant.test.partition("::")
        if not (root / path).is_file() or f"def {name}(" not in (root / path).read_text():
            found.append(f"{mutant.name}: no test {mutant.test}")
    return found


class Tree:
    """A scratch copy of a source tree, for one mutant at a time."""

    def __init__(self, source: Path, home: Path) -> None:
        self.root, self._caches = home / "tree", home / "numba"
        top = shutil.ignore_patterns(
            ".*", "__pycache__", "*.egg-info", "data", "runs", "site", "build", "dist"
        )
        below = shutil.ignore_patterns("__pycache__")
        shutil.copytree(
            source, self.root, ignore=lambda at, names: (top if Path(at) == source else below)(at, names)
        )

    def failing(self, tests: Sequence[str], mutant: Mutant | None = None) -> set[str]:
        """Which of these tests fail, parameters left out. Raises TimeoutExpired, ValueError."""
        target = self.root / mutant.file if mutant else None
        before = target.read_text() if target else ""
        if target and mutant:
            target.write_text(mutant.applied(before))
        try:
            answer = self._pytest(tests)
        finally:
            if target:
                target.write_text(before)
        if answer.returncode not in (0, 1):
            raise ValueError(
                f"pytest ended with {answer.returncode}: {answer.stdout[-1500:]}{answer.stderr[-500:]}"
            )
        return set(re.findall(r"^(?:FAILED|ERROR) ([^\s\[]+::[^\s\[]+)", answer.stdout, re.MULTILINE))

    def _pytest(self, tests: Sequence[str]) -> subprocess.CompletedProcess[str]:
        ours = {
            "PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1", "NUMBA_CACHE_DIR": str(self._caches),
            "OMP_NUM_THREADS": "1", "COLUMNS": "400",
        }  # fmt: skip
        argv = [*(sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider"), *tests]
        return subprocess.run(
            argv, cwd=self.root, env=os.environ | ours, capture_output=True, text=True, timeout=SECONDS
        )


def judge(tree: Tree, mutant: Mutant) -> str:
    """The outcome of a mutant: "" if it was caught, else why it was not."""
    try:
        caught = mutant.test in tree.failing([mutant.test], mutant)
    except subprocess.TimeoutExpired:
        return f"no end after {SECONDS:g} s"
    except ValueError as error:
        return str(error)
    return "" if caught else f"SURVIVED {mutant.test}"


def try_all(mutants: Sequence[Mutant], root: Path, copies: int) -> int:
    """Try every mutant, on that many copies of the tree at a time; returns how many were not caught. Reports each as it ends."""
    began, survived = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as home:
        free: SimpleQueue[Tree] = SimpleQueue()
        for number in range(copies):
            free.put(Tree(root, Path(home) / str(number)))

        def one(mutant: Mutant) -> tuple[Mutant, str, float]:
            tree, since = free.get(), time.monotonic()
            try:
                return mutant, judge(tree, mutant), time.monotonic() - since
            finally:
                free.put(tree)

        def unbroken(tests: Sequence[str]) -> set[str]:
            tree = free.get()
            try:
                return tree.failing(tests)
            finally:
                free.put(tree)

        with ThreadPoolExecutor(copies) as pool:
            every = sorted({mutant.test for mutant in mutants})
            parts = [every[number::copies] for number in range(min(copies, len(every)))]
            failing = set[str]().union(*pool.map(unbroken, parts))
            if failing:
                print(f"fail as the tree is: {', '.join(sorted(failing))}")
                return len(mutants)
            print(f"{len(every)} tests pass as the tree is ({time.monotonic() - began:.0f} s)", flush=True)
            for mutant, wrong, seconds in pool.map(one, mutants):
                survived += bool(wrong)
                print(f"{seconds:5.1f} s  {mutant.name}: {wrong or 'caught'}", flush=True)
    took = time.monotonic() - began
    print(f"{len(mutants) - survived} of {len(mutants)} mutants caught, in {took / 60:.1f} minutes")
    return survived


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", default=[""], help="those in whose file or text one of these stands"
    )
    parser.add_argument(
        "--copies", type=int, default=2, help="of the tree, each busy with a mutant of its own"
    )
    settings = parser.parse_args()
    mutants = [one for one in MUTANTS if any(part in f"{one.file} {one.text}" for part in settings.only)]
    wrong = problems(mutants, ROOT)
    if wrong or not mutants:
        print("\n".join(wrong) or "no such mutant")
        return 2
    return 1 if try_all(mutants, ROOT, settings.copies) else 0


if __name__ == "__main__":
    sys.exit(main())
