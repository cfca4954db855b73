"""The parts of a service on Ray that need no cluster; `test_on_ray.py` has the whole."""

import os
import threading
from pathlib import Path

import pytest

from cluster import serve as ray_serve
from cluster.capacity import Node
from cluster.errors import ClusterError
from cluster.session import Session
from merge_service.errors import UserError
from pipeline.errors import ConfigError
from pipeline.service import metrics
from pipeline.service.home import Home, serving
from pipeline.service.processes import on_ray
from pipeline.service.processes.together import opened
from tests.pipeline.service import toys


@pytest.mark.parametrize(
    ("resources", "key"),
    [({"address": "10.0.0.1:6379"}, "resources.address"), ({"cpus": 0.5}, "resources.cpus")],
)
def test_key_of_the_cluster_is_refused_on_one_machine(resources: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: is for resources.home: ray"):
        toys.config(resources=resources)


def test_port_that_the_system_chooses_is_refused_on_ray() -> None:
    with pytest.raises(ConfigError, match=r"listen.port: 0"):
        toys.config(resources={"home": "ray"}, listen={"port": 0})


def test_missing_ray_serve_is_said_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_serve, "NEEDED", ("no_such_module",))
    with pytest.raises(
        ClusterError, match=r"no_such_module is missing.*pip install 'temporal-merge\[serve\]'"
    ):
        ray_serve.check_installed()


@pytest.mark.parametrize(("cpus", "text"), [(2.0, "are 3 CPUs; the cluster has 2"), (3.0, "")])
def test_cluster_without_room_is_refused(cpus: float, text: str) -> None:
    session = Session("auto", (Node("a", "10.0.0.1", cpus, 0.0),))
    config = toys.config(resources={"home": "ray"})
    if not text:
        on_ray._check_room(session, config)
        return
    with pytest.raises(ClusterError, match=text):
        on_ray._check_room(session, config)


def test_processes_that_nobody_numbers_have_places_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    places = []
    for _ in range(3):
        metrics.take_place(tmp_path)
        places.append(metrics.place())
    assert places == ["0", "1", "2"] and os.environ[metrics.FOLDER] == str(tmp_path)


def test_work_that_fails_begins_again_and_ends_when_it_is_ended() -> None:
    tried, well = [], threading.Event()

    def work(ending: threading.Event) -> None:
        tried.append(1)
        if len(tried) == 1:
            raise OSError("no route")
        well.set()
        ending.wait()

    working = ray_serve._Working(work)
    assert well.wait(60) and working.trouble() == "OSError: no route"
    assert working.end() and len(tried) == 2


def test_stamp_is_of_what_replicas_are_made_of_and_nothing_else(tmp_path: Path) -> None:
    toys.home(tmp_path, resources={"home": "ray"})
    config = toys.config(resources={"home": "ray"})
    setup = opened(tmp_path, config)
    stamps = {
        on_ray._application(one, other).stamp
        for one, other in [
            (setup, config),
            (setup, toys.config(resources={"home": "ray"}, batch=2)),
            (setup.model_copy(update={"state": tmp_path}), config),
            (setup, toys.config(resources={"home": "ray", "cpus": 2})),
        ]
    }
    assert len(stamps) == 3


@pytest.mark.parametrize("out", ["s3://bucket/zoo", "gs://bucket/zoo"])
def test_address_in_the_place_of_a_directory_is_refused(out: str) -> None:
    with pytest.raises(UserError, match="is no directory"):
        Home.open(Path(out), toys.config())
    with pytest.raises(UserError, match="is no directory"), serving(Path(out), toys.config(), 0.0):
        raise AssertionError
