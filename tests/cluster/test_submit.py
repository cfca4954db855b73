"""What is sent with a study, under which names, and which addresses and paths are refused before anything is sent."""

import hashlib
import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster import submission
from cluster.code import PACKAGES
from cluster.session import ClusterError
from cluster.submission import Cluster, Job, _Seen, check_dashboard
from merge_service.errors import UserError
from pipeline.errors import ConfigError
from pipeline.run.submit import Along, _exit_code, _why, key_of, relative_files, shipment, submit_study
from pipeline.study.config import load_study
from tests.servers import free_port
from tests.world import World

MODULE = """
import temporal_merge as tm

@tm.technique("halved_here", formula="scale · mean / 2")
def halved_here(xp, params, blocks):
    return sum(blocks) / len(blocks) / 2
"""


@pytest.fixture
def seat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the client, with a model in it."""
    seat = tmp_path / "seat"
    (seat / "models" / "mine").mkdir(parents=True)
    (seat / "models" / "mine" / "open_clip_config.json").write_text("{}")
    monkeypatch.chdir(seat)
    return seat


@pytest.mark.parametrize(
    "url",
    [
        "10.1.2.3:8265",
        "auto",
        "ray://head:10001",
        "http://",
        "http://head:port",
        "http://head/jobs",
        "http://head?x=1",
        "",
    ],
)
def test_what_is_no_dashboard_is_refused(url: str) -> None:
    with pytest.raises(ClusterError, match="http://HEAD:8265") as caught:
        check_dashboard(url)
    assert caught.value.exit_code == 2


@pytest.mark.fault("F27")
def test_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(ClusterError) as caught:
        check_dashboard("http://me:hunter2@head:8265")
    assert "hunter2" not in str(caught.value)


@pytest.mark.fault("F27")
def test_remote_dashboard_without_token_authentication_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ClusterError, match="runs code as you"):
        check_dashboard("http://127.0.0.1:8265")
    with pytest.raises(ClusterError, match="set RAY_AUTH_MODE=token here"):
        check_dashboard("http://10.1.2.3:8265")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    check_dashboard("http://10.1.2.3:8265")


def test_silent_address_is_refused_at_once() -> None:
    with pytest.raises(ClusterError, match="nothing answers there"):
        Cluster(f"http://127.0.0.1:{free_port()}")


def test_server_that_is_no_dashboard_is_named(web_server: str) -> None:
    with pytest.raises(ClusterError, match="no Ray dashboard"):
        Cluster(web_server)


def test_address_of_the_command_line_wins_over_the_environment(
    web_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ClusterError, match="no Ray dashboard"):
        Cluster(web_server)


@pytest.mark.parametrize("out", [None, Path("runs/x")])
def test_out_that_is_a_place_on_one_node_is_refused(world: World, out: Path | None) -> None:
    with pytest.raises(UserError, match="storage that all nodes") as caught:
        submit_study(world.study(), [], out, "http://127.0.0.1:1")
    assert "--out /shared/runs/tiny" in str(caught.value)


def test_data_on_this_machine_only_is_refused_with_every_key(world: World, seat: Path) -> None:
    study = load_study(world.study(), ["data.root=data/mini", "data.cache=cache"])
    with pytest.raises(ConfigError) as caught:
        list(relative_files(study))
    assert "--set data.root=/shared/mini" in str(caught.value) and "data.cache: cache" in str(caught.value)


def test_suite_without_a_root_is_refused(world: World) -> None:
    study = load_study(world.study(data={"suite": "mini"}))
    with pytest.raises(ConfigError, match=r"data\.root: data/mini is a place on this machine"):
        list(relative_files(study))


def test_model_named_by_relative_path_goes_along_and_an_absolute_one_does_not(
    world: World, seat: Path
) -> None:
    relative = load_study(world.study(model={"config": "tiny", "pretrained": "local-dir:models/mine"}))
    assert list(relative_files(relative)) == [Path("models/mine")]
    assert (
        list(
            relative_files(load_study(world.study(model={"config": "x", "pretrained": str(seat / "models")})))
        )
        == []
    )
    assert (
        list(relative_files(load_study(world.study(model={"config": "x", "pretrained": "hf-hub:me/mine"}))))
        == []
    )


def test_files_of_the_fomo_grid_go_along(world: World, seat: Path) -> None:
    (seat / "suite.yaml").write_text("{}")
    (seat / "stream.yaml").write_text("{}")
    data = {"suite": "suite.yaml", "root": "/data", "pretraining": ["grey"], "held_out": ["grey"]}
    study = load_study(world.study(data=data, stream={"file": "stream.yaml"}))
    assert set(relative_files(study)) == {Path("suite.yaml"), Path("stream.yaml")}


def test_path_out_of_the_directory_is_refused(
    world: World, seat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(seat / "models")
    study = load_study(world.study(model={"config": "x", "pretrained": "../models/mine"}))
    with pytest.raises(ConfigError, match="lies outside this directory"):
        list(relative_files(study))


def test_model_too_large_to_be_sent_is_refused(
    world: World, seat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.run.submit.MAX_BYTES", 1)
    study = load_study(world.study(model={"config": "x", "pretrained": "models/mine"}))
    with pytest.raises(
        ConfigError,
        match=r"model\.pretrained: with models/mine 1 files .* which is too much \(at most 2000 files",
    ):
        list(relative_files(study))


def test_more_files_than_are_sent_are_refused_with_their_number(
    world: World, seat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.run.submit.MAX_FILES", 2)
    for number in range(2):
        (seat / "models" / "mine" / f"{number}.json").write_text("{}")
    study = load_study(world.study(model={"config": "x", "pretrained": "models/mine"}))
    with pytest.raises(ConfigError, match=r"with models/mine 3 files \(0\.0 MB\) would be sent"):
        list(relative_files(study))


def _file(place: Path, secret: Path) -> str:
    (place / "model.safetensors").symlink_to(secret / "key")
    return "a link to .*/secret/key, outside of what the study names"


def _folder(place: Path, secret: Path) -> str:
    (place / "more").symlink_to(secret)
    return "a link to .*/secret, outside of what the study names"


def _chain(place: Path, secret: Path) -> str:
    (place / "one").symlink_to("two")
    (place / "two").symlink_to(f"../../../{secret.name}/key")
    return "models/mine/one: a link to .*/secret/key"


def _loop(place: Path, secret: Path) -> str:
    (place / "again").symlink_to(".")
    return "a link to a directory, which is not sent"


def _dangling(place: Path, secret: Path) -> str:
    (place / "gone").symlink_to("nowhere")
    return "gone: neither a file nor a directory"


def _circle(place: Path, secret: Path) -> str:
    (place / "one").symlink_to("two")
    (place / "two").symlink_to("one")
    return "one: neither a file nor a directory"


def _pipe(place: Path, secret: Path) -> str:
    os.mkfifo(place / "pipe")
    return "pipe: neither a file nor a directory"


def _itself(place: Path, secret: Path) -> str:
    shutil.rmtree(place)
    place.symlink_to(secret)
    return "models/mine is a link to .*/secret, outside this directory"


@pytest.mark.parametrize("make", [_file, _folder, _chain, _loop, _circle, _dangling, _pipe, _itself])
def test_link_out_of_a_model_and_what_is_no_file_are_refused_by_name(
    make: Callable[[Path, Path], str], world: World, seat: Path
) -> None:
    secret = seat.parent / "secret"
    secret.mkdir(exist_ok=True)
    (secret / "key").write_text("hunter2")
    said = make(seat / "models" / "mine", secret)
    study = load_study(world.study(model={"config": "x", "pretrained": "models/mine"}))
    with pytest.raises(ConfigError, match=said):
        list(relative_files(study))


def test_link_within_a_model_goes_along_as_a_file_and_hidden_files_stay(world: World, seat: Path) -> None:
    mine = seat / "models" / "mine"
    (mine / "a.json").symlink_to("open_clip_config.json")
    (mine / ".gitignore").write_text("*")
    (mine / ".git").mkdir()
    (mine / ".git" / "objects").write_text("")
    with shipment(world.study(), [Path("models/mine")]) as room:
        sent = room / "models" / "mine"
        assert {path.name for path in sent.rglob("*")} == {"a.json", "open_clip_config.json"}
        assert not (sent / "a.json").is_symlink() and (sent / "a.json").read_text() == "{}"


def test_model_in_a_directory_of_the_name_of_a_package_is_refused(world: World, seat: Path) -> None:
    shutil.copytree(seat / "models", seat / "workers")
    study = load_study(world.study(model={"config": "x", "pretrained": "workers/mine"}))
    with pytest.raises(ConfigError, match="name of a package of temporal-merge"):
        list(relative_files(study))


def test_shipment_holds_source_study_and_files_and_nothing_else(world: World, seat: Path) -> None:
    study = world.study()
    with shipment(study, [Path("models/mine")]) as room:
        names = {str(path.relative_to(room)) for path in room.rglob("*") if path.is_file()}
        assert (room / study.name).read_bytes() == study.read_bytes()
    assert {
        "pipeline/cli/app.py",
        "workers/training/expert.py",
        "merge_service/service/actors.py",
        "cluster/session.py",
    } <= names
    assert {"models/mine/open_clip_config.json", study.name} <= names
    assert {name.split("/")[0] for name in names} == {*PACKAGES, "temporal_merge.py", "models", study.name}
    assert not any("__pycache__" in name or name.endswith(".pyc") for name in names) and not room.exists()


def test_module_goes_along_from_anywhere_and_another_one_is_another_version_of_the_study(
    world: World, seat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lies beside the study, so that the job names it by its name alone and every worker imports it."""
    elsewhere = seat.parent / "halved_here.py"
    elsewhere.write_text(MODULE)
    asked: list[tuple[str, dict[str, str], str]] = []

    class Dashboard:
        def __init__(self, url: str) -> None:
            pass

        def submit_or_attach(
            self, key: str, command: str, room: Path, metadata: dict[str, str]
        ) -> tuple[Job, bool]:
            asked.append((command, metadata, (room / elsewhere.name).read_text()))
            return Job(f"{key}.1", "pending", False, None, "", metadata), False

    monkeypatch.setattr(submission, "Cluster", Dashboard)
    for text in (MODULE, MODULE + "\n"):
        elsewhere.write_text(text)
        submit_study(
            world.study(),
            [],
            Path("/shared/out"),
            "http://127.0.0.1:8265",
            along=Along([Path("../halved_here.py")], ["--deliver", "http://127.0.0.1:8420"]),
        )
    (command, first, sent), (_, second, _) = asked
    assert " --deliver http://127.0.0.1:8420 " in command
    assert " --module halved_here.py " in command and sent == MODULE
    assert first["study_sha256"] != second["study_sha256"]


def test_copy_of_a_module_in_a_shipment_is_found_by_its_name_alone(seat: Path) -> None:
    """As the head's driver does it, in the shipment; a worker then imports the module, from the same place."""
    (seat / "halved_here.py").write_text(MODULE)
    worker = "import sys; from merge_service.techniques.own import Origin, load; load('halved_here', Origin('halved_here', sys.argv[1], ''))"
    with shipment(modules=[seat / "halved_here.py"]) as room:
        asked = ("-m", "pipeline.cli", "techniques", "halved_here", "--module", "halved_here.py")
        told = subprocess.run([sys.executable, *asked], cwd=room, capture_output=True, text=True)
        digest = hashlib.sha256(MODULE.encode()).hexdigest()
        loaded = subprocess.run(
            [sys.executable, "-c", worker, digest], cwd=room, capture_output=True, text=True
        )
    assert told.returncode == 0 and f"sha256 {digest}" in told.stdout, told.stderr
    assert loaded.returncode == 0, loaded.stderr


def test_key_tells_studies_and_places_apart_and_nothing_else() -> None:
    keys = {key_of(name, Path(out)) for name in ("a", "b") for out in ("/x", "/y")}
    assert len(keys) == 4 and key_of("a", Path("/x")) in keys


def test_log_told_again_after_a_broken_connection_is_passed_on_once() -> None:
    passed: list[str] = []
    seen = _Seen(passed.append)
    for told in (["one\ntw"], ["one\n", "two\nth"], [], ["one\ntwo\nthree\n"]):
        seen.rewind()
        for text in told:
            seen.take(text)
    assert "".join(passed) == "one\ntwo\nthree\n"


@pytest.mark.parametrize(
    ("state", "code", "expected"),
    [
        ("succeeded", 0, 0),
        ("failed", 2, 2),
        ("failed", 1, 1),
        ("failed", -9, 1),
        ("failed", None, 1),
        ("stopped", None, 1),
    ],
)
def test_exit_code_is_that_of_the_run(state: str, code: int | None, expected: int) -> None:
    assert _exit_code(Job("x.1", state, True, code, "", {})) == expected


@pytest.mark.parametrize(
    ("code", "message"),
    [(-9, ""), (137, ""), (None, "The actor died: the node was running low on memory.")],
)
def test_job_whose_driver_was_killed_says_what_to_do_about_memory(code: int | None, message: str) -> None:
    said = _why(Job("x.1", "failed", True, code, message, {}))
    assert "memory runs out" in said and "resources.experts.memory" in said and "submit again" in said


@pytest.fixture
def web_server() -> Iterator[str]:
    """A server that is not a dashboard."""

    class Quiet(http.server.BaseHTTPRequestHandler):
        log_message: Callable[..., None] = lambda *_: None

        def do_GET(self) -> None:
            self.send_error(404)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
