"""Expensive fixtures, shared by the whole session."""

import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Containers often set it. Hundreds of processes would then compile this project, each for itself.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

pytest.register_assert_rewrite("tests.faults.harness", "tests.world")

from pipeline.cli.app import _main  # noqa: E402
from pipeline.tracking.mlflow.local import LOCAL_DB, make_local_store  # noqa: E402
from tests.lanes import pytest_xdist_make_scheduler  # noqa: E402, F401  (a hook of pytest)
from tests.matrix import (  # noqa: E402, F401  (hooks of pytest)
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_runtest_logreport,
    pytest_sessionfinish,
)
from tests.world import Cluster, World, command, end_started, make_world  # noqa: E402

# A shell starts what runs in its background deaf to Ctrl-C, and a process hands that on to what it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
if (
    signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
):  # started by nohup: what it starts here hears hang-ups again
    signal.signal(signal.SIGHUP, lambda *_: None)


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    end_started()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    warm = Cluster(tmp_path_factory.mktemp("ray"))
    yield warm
    warm.stop()


@pytest.fixture(scope="session")
def undisturbed(world: World, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of one undisturbed run of the tiny study; every other run of it must give the same result."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    answer = command("run", world.study(), "--out", out, "--address", cluster.address)
    assert answer.returncode == 0, answer.stderr
    return out


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty tracking store, for tests to copy, because creating one takes seconds."""
    home = tmp_path_factory.mktemp("mlflow")
    make_local_store(home)
    return home / LOCAL_DB


class Answer(NamedTuple):
    """The output of a command, and its exit code."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """`temporal-merge ...` in this process; real processes are tested once for each kind of command."""

    def call(*arguments: Any) -> Answer:
        monkeypatch.setattr(sys, "argv", ["temporal-merge", *map(str, arguments)])
        capsys.readouterr()
        code = _main()
        return Answer(code, *capsys.readouterr())

    return call
