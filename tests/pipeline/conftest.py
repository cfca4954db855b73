"""What the tests of the command line share."""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from pipeline.cli import _main


class Answer(NamedTuple):
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """`temporal-merge ...` without paying for a process: for all that one real process of the kind has proved."""

    def call(*arguments: Any) -> Answer:
        monkeypatch.setattr(sys, "argv", ["temporal-merge", *map(str, arguments)])
        capsys.readouterr()
        code = _main()
        return Answer(code, *capsys.readouterr())

    return call
