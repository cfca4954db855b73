"""A service in MLflow's registry: one version for each accepted arrival, aliases as the log says, once, whatever ends in between."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from merge_service.faults import VARIABLE
from merge_service.live import Removed, State, apply, fold
from pipeline.errors import ConfigError, TrackingError
from pipeline.service.home import Home
from pipeline.service.operations import Operations
from pipeline.service.processes.registry_worker import deliver
from pipeline.service.processes.together import workers
from pipeline.service.registry.delivery import CURSOR, Registry
from pipeline.service.registry.rows import CHALLENGER, CHAMPION, Registered, aliases, key_of
from pipeline.tracking.mlflow.local import LOCAL_DB, local_uri
from pipeline.tracking.mlflow.sink import MlflowSink, Sent
from pipeline.tracking.outbox import FILE, Entry, Outbox, Row
from pipeline.tracking.rows.rows import Rows
from tests.pipeline.service import toys

TASKS = toys.TASKS


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """Three experts come, what is served is rolled back to the first, the second is removed, and a fourth comes."""
    room = tmp_path_factory.mktemp("story")
    service = toys.home(room / "zoo")
    for task in TASKS[:3]:
        toys.arrive(service, toys.expert(room, task), task)
    Operations(service).roll_back(1, "complaints", False)
    toys.work(service)
    second = service.log.state.sequence[1].arrival
    Operations(service).remove(second, Removed("asked", force=True))
    toys.work(service)
    toys.arrive(service, toys.expert(room, TASKS[3]), TASKS[3])
    return service


def rows_of(service: Home) -> Iterator[tuple[State, list[Row]]]:
    """The state after every entry that has rows, with these."""
    state, entries = State(), list(service.log.entries())
    registered = Registered("toy", entries[0].sha256, service.config.timeline)
    for entry in entries:
        after = apply(state, entry)
        if found := registered.of(state, entry, after):
            yield after, found
        state = after


def told(rows: Sequence[Row]) -> tuple[dict[str, Any], dict[str, str]]:
    """What a registry holds that receives these rows: the tags of versions by key, and aliases."""
    versions, pointers = dict[str, Any](), dict[str, str]()
    for row in rows:
        body = row.payload
        if body["op"] == "register":
            assert body["model"] not in versions
            versions[body["model"]] = body["tags"]
        elif body["op"] == "alias" and body["model"] is None:
            pointers.pop(body["alias"], None)  # one that was never delivered may go
        elif body["op"] == "alias":
            assert body["model"] in versions, "an alias comes after its version"
            pointers[body["alias"]] = body["model"]
    return versions, pointers


def test_registry_is_what_the_state_says_after_every_entry(story: Home) -> None:
    every: list[Row] = []
    for state, rows in rows_of(story):
        every += rows
        versions, pointers = told(every)
        assert pointers == aliases(state)
        known = [one for one in state.sequence if one.version.sha256]
        assert all(versions[key_of(one)]["sha256"] == one.version.sha256 for one in known)
        if state.served.arrival is not None:
            assert versions[pointers[CHAMPION]]["sha256"] == state.served.sha256
    assert state == fold(story.log.entries())


def test_versions_say_where_they_come_from_and_what_the_gates_found(story: Home) -> None:
    every = [row for _, rows in rows_of(story) for row in rows]
    versions, pointers = told(every)
    accepted = [entry.arrival for entry in story.log.entries() if entry.kind == "promoted"]
    brought = [tags["arrival"] for tags in versions.values()]
    # Each accepted arrival has its version; the third has another one for the bytes without the second.
    assert sorted(set(brought)) == sorted(set(accepted)) and len(brought) == 5
    last = versions[pointers["t-3"]]
    arrival = story.log.state.sequence[2]
    assert (last["arrival"], last["t"], last["task"], last["owner"]) == (
        arrival.arrival,
        "3",
        TASKS[3],
        "tests",
    )
    assert last["sha256"] == arrival.version.sha256 and last["lineage.init"] == "base"
    assert last["gate/drift"].startswith("pass ") and last["gate/drift"].endswith("margin 0.5")
    scores = [row.payload["metrics"] for row in every if row.payload["op"] == "log"]
    assert [name for name, *_ in scores[0]] == ["ka", "zs", "gm"]


def test_challenger_is_the_newest_that_is_not_served_and_the_base_has_no_alias(story: Home) -> None:
    seen = [aliases(state) for state, _ in rows_of(story)]
    rolled = next(one for one in seen if CHALLENGER in one)
    assert rolled[CHAMPION] == rolled["t-1"] and rolled[CHALLENGER] == rolled["t-3"]
    assert aliases(State()) == {} and CHALLENGER not in seen[-1]


class Down:
    """A tracker that does not answer."""

    def deliver(self, entries: Sequence[Entry]) -> Iterator[Sent]:
        raise TrackingError("nobody is there")

    def forget(self) -> None: ...


def test_tracker_that_is_down_costs_nothing_and_nothing_is_lost(story: Home) -> None:
    registry = Registry(story.place, story.log, story.config, Down())
    registry.tracker.start()
    assert registry.follow() == story.log.state.seq
    left = registry.close(0.1)
    again = Registry(story.place, story.log, story.config, Down())
    again.follow()
    newest = {row.key: row.payload for _, rows in rows_of(story) for row in rows}
    assert left == len(newest) == again.outbox.pending()
    assert all(again.outbox.get(key) == json.loads(json.dumps(body)) for key, body in newest.items())
    again.close(0.1)
    (story.place / FILE).unlink()


def test_kill_between_rows_and_cursor_adds_nothing(story: Home) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.service.registry.delivery import Registry\n"
        "from tests.pipeline.service import toys\n"
        "home = toys.home(Path(sys.argv[1])); Registry(home.place, home.log, home.config).follow()\n"
    )
    fault = {"registry.before_cursor": {"do": "kill", "at": 3, "marker": str(story.out / "killed")}}
    environment = {**os.environ, VARIABLE: json.dumps(fault)}
    ended = subprocess.run([sys.executable, "-c", code, str(story.out)], env=environment)
    assert ended.returncode == -signal.SIGKILL
    registry = Registry(story.place, story.log, story.config, Down())
    before = registry.outbox.pending()
    assert before and int(registry.outbox.meta(CURSOR) or 0) < story.log.state.seq
    registry.follow()
    newest = {row.key for _, rows in rows_of(story) for row in rows}
    assert registry.outbox.pending() == len(newest) > before
    versions, pointers = told([Row(e.key, e.payload, 0) for e in registry.outbox.undelivered("x", 999)])
    assert pointers == aliases(story.log.state) and len(versions) == 5
    registry.close(0.1)
    (story.place / FILE).unlink()


def test_versions_and_aliases_reach_mlflow_once(
    story: Home, tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)  # where MLflow puts artifacts of a store that names no other place
    shutil.copyfile(empty_store, tmp_path / LOCAL_DB)
    uri = local_uri(tmp_path)
    asked = Home.open(story.out, toys.config(tracking={"uri": uri}), now=lambda: 0)
    deliver_all(asked)
    (story.place / FILE).unlink()
    again = Registry(story.place, story.log, asked.config)  # with an outbox that was lost
    again.tracker.start()
    again.follow()
    assert again.close(30) == 0, again.tracker.last_error
    client = MlflowClient(uri, uri)
    model = client.get_registered_model("toy")
    found = {str(one.version): one.tags for one in client.search_model_versions("name='toy'")}
    assert len(found) == 5
    meant = aliases(story.log.state)
    assert model.aliases.keys() == meant.keys() == {"t-1", "t-2", "t-3", CHAMPION}
    for alias, version in model.aliases.items():
        assert f"{found[str(version)]['arrival']}/{found[str(version)]['sha256'][:16]}" == meant[alias]
    assert found[str(model.aliases[CHAMPION])]["sha256"] == story.log.state.served.sha256
    client.delete_registered_model("toy")
    gone = MlflowSink(tmp_path, uri, "temporal-merge")
    row = Rows("x").alias(None, 1, "toy", CHAMPION)
    (sent,) = gone.deliver([Entry(1, row.key, {**row.payload}, 1)])
    assert sent.refused is None, "an alias of a model that somebody deleted is gone"


def deliver_all(service: Home) -> None:
    """What the process of the registry does, until everything is delivered."""
    ending, entries = threading.Event(), [row for _, rows in rows_of(service) for row in rows]
    process = threading.Thread(target=deliver, args=(service.out, ending))
    process.start()
    outbox = Outbox(service.place / FILE)
    while process.is_alive() and (outbox.get(entries[-1].key) is None or outbox.pending()):
        time.sleep(0.1)
    outbox.close()
    ending.set()
    process.join()


def test_tracker_of_the_configuration_gets_a_process_and_an_unusable_one_is_refused(tmp_path: Path) -> None:
    assert [one.name for one in workers(tmp_path, toys.config())] == ["service"]
    asked = toys.config(tracking={"uri": "http://127.0.0.1:5000", "model": "zoo-models"})
    assert [one.name for one in workers(tmp_path, asked)] == ["service", "registry"]
    for wrong, says in (({"uri": "http://ann:secret@host"}, "uri"), ({"log_weights": True}, "unknown key")):
        with pytest.raises(ConfigError, match=says):
            toys.config(tracking=wrong)
