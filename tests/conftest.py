"""Fixtures that cost something and are therefore shared by the whole session."""

import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

from tests.world import Cluster, World, command, make_world

# A shell starts what runs in its background deaf to Ctrl-C, and a process hands that on to what it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


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
    """OUT of one run of the tiny study that nobody disturbed: what every other run of it must equal."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    answer = command("run", world.study(), "--out", out, "--address", cluster.address)
    assert answer.returncode == 0, answer.stderr
    return out
