"""Deliberately broken lines, and the tests that must fail by each: `make mutants`, or for some of them

    python -m tests.mutants --only store outbox

`mutants.yaml` lists them: a `file`, a `text` that stands in it exactly once, what is put there `instead`, and the `tests` that
catch it. Each is tried in a scratch copy of the tree, one after the other in every copy; nothing of the tree itself changes.
The exit code is 0 if the tests pass as the tree is, and every named test fails by its mutant.

Invariant: a mutant counts as caught only if each test named with it ran and failed; a file that cannot be compiled, a test
that is not found or one that takes longer than its time is an error of the list.
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

import yaml

ROOT = Path(__file__).parent.parent
LIST = Path(__file__).with_suffix(".yaml")
SECONDS = 240.0
"""How long the tests of one mutant may take."""


@dataclass(frozen=True)
class Mutant:
    """A line that is broken. `tests` are ids of pytest without parameters: one failing case of each is enough."""

    file: str
    text: str
    instead: str
    tests: tuple[str, ...]

    @property
    def name(self) -> str:
        """File and first words, for people."""
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


def read(path: Path = LIST) -> list[Mutant]:
    """The list, in order."""
    entries = yaml.safe_load(path.read_text())
    return [Mutant(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]


def problems(mutants: Sequence[Mutant], root: Path = ROOT) -> list[str]:
    """What is wrong with the list itself, without running anything."""
    found = []
    for mutant in mutants:
        try:
            mutant.applied((root / mutant.file).read_text())
        except (OSError, ValueError) as error:
            found.append(str(error))
        for test in mutant.tests:
            path, _, name = test.partition("::")
            if not (root / path).is_file() or f"def {name}(" not in (root / path).read_text():
                found.append(f"{mutant.name}: no test {test}")
    names = [(mutant.file, mutant.text, mutant.instead) for mutant in mutants]
    return found + [f"{file}: listed twice" for file, *rest in names if names.count((file, *rest)) > 1]


class Tree:
    """A scratch copy of a source tree, in which one mutant at a time lives."""

    def __init__(self, source: Path, home: Path) -> None:
        self.root, self._caches = home / "tree", home / "numba"
        skipped = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "data", "runs", "site")
        shutil.copytree(source, self.root, ignore=lambda at, names: skipped(at, names) if Path(at) == source else {n for n in names if n == "__pycache__"})  # fmt: skip

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
    """What became of a mutant: "" if it was caught, else why it was not."""
    try:
        missed = set(mutant.tests) - tree.failing(mutant.tests, mutant)
    except subprocess.TimeoutExpired:
        return f"no end after {SECONDS:g} s"
    except ValueError as error:
        return str(error)
    return f"SURVIVED {', '.join(sorted(missed))}" if missed else ""


def try_all(mutants: Sequence[Mutant], root: Path, copies: int) -> int:
    """Try every mutant, on so many copies of the tree at a time; how many were not caught. Tells each as it ends."""
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

        def unbroken(tests: tuple[str, ...]) -> set[str]:
            tree = free.get()
            try:
                return tree.failing(tests)
            finally:
                free.put(tree)

        with ThreadPoolExecutor(copies) as pool:
            every = sorted({test for mutant in mutants for test in mutant.tests})
            failing = set().union(*pool.map(unbroken, [tuple(every[n::copies]) for n in range(copies) if every[n::copies]]))  # fmt: skip
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
    mutants = [one for one in read() if any(part in f"{one.file} {one.text}" for part in settings.only)]
    wrong = problems(mutants)
    if wrong or not mutants:
        print("\n".join(wrong) or "no such mutant")
        return 2
    return 1 if try_all(mutants, ROOT, settings.copies) else 0


if __name__ == "__main__":
    sys.exit(main())
