"""One process serves a service, and one works for it: who comes second is refused, or waits, and changes nothing."""

import socket
import threading
from functools import partial
from pathlib import Path

import pytest

from pipeline.cli import service as commands
from pipeline.errors import ConfigError, StoreUnwritable
from pipeline.service import home as homes
from pipeline.service.config import ServiceConfig, config_from
from pipeline.service.home import Busy, Home, serving
from pipeline.service.operations import Operations
from pipeline.service.processes import together
from pipeline.service.processes.service_worker import HEAD, work
from pipeline.service.processes.supervisor import listening
from pipeline.service.shelf import Directory
from tests.pipeline.service import toys
from tests.pipeline.service.outside import until

OTHER = {"limits": {"waiting": 7}}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "ENDING_SECONDS", 0)
    monkeypatch.setattr(together, "listening", partial(listening, patience=0))


def length(out: Path) -> int:
    return Home.open(out).log.state.seq


def test_second_server_is_refused_and_leaves_the_configuration(impatient: None, tmp_path: Path) -> None:
    first, before = toys.home(tmp_path), length(tmp_path)
    with (
        serving(tmp_path, first.config, 0),
        pytest.raises(Busy, match=f"runs the service toy in {tmp_path}"),
    ):
        together.serve(tmp_path, toys.config(**OTHER))
    assert length(tmp_path) == before


def test_server_whose_port_is_taken_leaves_the_configuration(impatient: None, tmp_path: Path) -> None:
    toys.home(tmp_path)
    before = length(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = {"port": taken.getsockname()[1]}
        with pytest.raises(ConfigError, match="cannot be listened on"):
            together.serve(tmp_path, toys.config(listen=listen))
    assert length(tmp_path) == before


def test_configuration_of_a_running_service_is_not_changed_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, given = toys.home(tmp_path), [toys.config(**OTHER)]
    monkeypatch.setattr("pipeline.service.config.read_config", lambda *_: given[0])
    before = length(tmp_path)
    with serving(tmp_path, running.config, 0):
        with pytest.raises(Busy, match="runs with another configuration"):
            commands.work(tmp_path, Path("other.yaml"))
        given[0] = running.config
        commands.work(tmp_path, Path("same.yaml"))
    assert length(tmp_path) == before
    given[0] = toys.config(**OTHER)
    commands.work(tmp_path, Path("other.yaml"))
    assert length(tmp_path) == before + 1


def test_working_process_waits_for_another_and_states_what_that_one_makes(tmp_path: Path) -> None:
    opened, ending = toys.home(tmp_path), threading.Event()
    path = toys.expert(tmp_path, "task0")
    with opened.working():
        waiting = threading.Thread(target=work, args=(tmp_path, ending), daemon=True)
        waiting.start()
        until((opened.place / HEAD).exists)
        Operations(opened).arrive(path, toys.Sender("task0", "tests"))
        state = opened.worker(toys.ToyScorer(opened.store)).run()
        until(lambda: state.served.sha256 in (opened.place / HEAD).read_text())
    ending.set()
    waiting.join(60)
    assert not waiting.is_alive() and state.t == 1


def test_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnwritable, match="choose another --out or make it writable"):
        Directory(tmp_path / "file" / "toy").create("log/1.json", b"{}")
    with pytest.raises(StoreUnwritable), serving(tmp_path / "file", toys.config(), 0):
        pass
    assert homes.SERVE_LOCK not in [one.name for one in tmp_path.iterdir()]


def of_data(**tasks: object) -> ServiceConfig:
    data = {"root": "nowhere", "adaptation": ["letters", "scripts"], "pretraining": [], "held_out": []}
    tree = {"name": "zoo", "model": {"config": "tiny-clip"}, "strategy": "offline_merging", "data": data}
    return config_from({**tree, **tasks}, "zoo.yaml")


def test_tasks_are_those_of_the_list_and_if_open_of_the_data() -> None:
    assert of_data().taken == ("letters", "scripts")
    assert of_data(tasks={"list": ["scripts", "photos"]}).taken == ("scripts", "photos", "letters")
    assert of_data(tasks={"open": False, "list": ["scripts"]}).taken == ("scripts",)
    assert toys.config().taken is None  # without data nobody can say
