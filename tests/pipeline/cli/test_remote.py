"""The commands that reach a service over HTTP: what they print, and how they end."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.service import toys
from tests.pipeline.service.conftest import set_up, zoo
from tests.pipeline.service.live_toys import reached, worked
from tests.serving_toys import Zoo

__all__ = ["zoo"]
Cli = Callable[..., Any]


@pytest.fixture
def url(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A toy service that runs; its operator's token is in the environment."""
    toys.home(tmp_path / "out")
    setup, _, tokens = set_up(zoo, tmp_path / "state", out=tmp_path / "out")
    monkeypatch.setenv("TEMPORAL_MERGE_TOKEN", tokens["operator"])
    monkeypatch.delenv("TEMPORAL_MERGE_URL", raising=False)
    with reached(setup) as at, worked(tmp_path / "out"):
        yield at.url


def test_expert_is_sent_shown_rolled_back_and_removed(
    url: str, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["--task", "task0", "--license", "MIT", "--wait", "--url", url]
    came = cli("arrive", toys.expert(tmp_path, "task0"), *line, "--json")
    assert came.code == 0, came.err
    name = json.loads(came.out)["id"]
    monkeypatch.setenv("TEMPORAL_MERGE_URL", url)
    fetched = cli("next", "--task", "task1", "--out", tmp_path / "start")
    assert fetched.code == 0 and "--ticket" in fetched.out, fetched.err
    ticket = tmp_path / "start" / "ticket"
    sent = cli("arrive", toys.expert(tmp_path, "task1"), "--task", "task1", "--ticket", ticket, "--wait")
    assert sent.code == 0 and "promoted, t = 2" in sent.out
    assert "t = 2 of 2 is served" in cli("service", "status").out
    assert [one["status"] for one in json.loads(cli("service", "arrivals", "--json").out)] == [
        "superseded", "promoted",
    ]  # fmt: skip
    assert "t = 1 of 2 is served" in cli("service", "rollback", "1", "--reason", "complaints").out
    assert f"{name} (task0" in cli("service", "show", name).out
    refused = cli("service", "release", name, "--reason", "x")
    assert refused.code == 2 and "arrival.state" in refused.err
    gone = cli("service", "remove", name, "--reason", "takedown", "--force")
    assert gone.code == 0 and "removed" in gone.out
    assert cli("service", "log", "--after", "2").out.count("\n") > 5
    text = cli("service", "tokens", "--issue", "submitter", "--owner", "ann", "--per-day", "3").out.strip()
    assert text.startswith("tmk_") and text not in (listed := cli("service", "tokens").out)
    assert "revoked" not in listed
    assert "opens nothing" in cli("service", "tokens", "--revoke", text[4:16]).out
    big = cli("arrive", toys.expert(tmp_path, "task2", size=50.0), "--task", "task2", "--wait")
    assert big.code == 3 and "geometry" in big.out


def test_commands_say_what_they_lack(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TEMPORAL_MERGE_URL", "TEMPORAL_MERGE_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    lacking = cli("service", "status")
    assert lacking.code == 2 and "--out DIR" in lacking.err and "--url URL" in lacking.err
    both = cli("service", "status", "--out", tmp_path, "--url", "http://127.0.0.1:1")
    assert both.code == 2 and "one of them" in both.err
    path = toys.expert(tmp_path, "task0")
    unnamed = cli("arrive", path, "--task", "task0")
    assert unnamed.code == 2 and "TEMPORAL_MERGE_URL" in unnamed.err
    lost = cli("arrive", path, "--task", "task0", "--ticket", tmp_path / "none")
    assert lost.code == 2 and "that `next` has written" in lost.err
    closed = cli("arrive", path, "--task", "task0", "--url", "http://127.0.0.1:1")
    assert closed.code == 2 and "TEMPORAL_MERGE_TOKEN" in closed.err


def test_serve_checks_a_configuration_and_starts_nothing(tmp_path: Path, cli: Cli) -> None:
    file = tmp_path / "service.yaml"
    file.write_text("name: zoo\nmodel: {config: tiny-clip}\nstrategy: offline_merging\ngate: {}\n")
    wrong = cli("serve", file, "--check")
    assert wrong.code == 2 and "service.yaml: gate: unknown key; did you mean gates?" in wrong.err
    tracked = cli("serve", "configs/service.yaml", "--check", "--set", "tracking.log_weights=true")
    assert tracked.code == 2 and "tracking.log_weights: unknown key" in tracked.err
    right = cli("serve", "configs/service.yaml", "--check")
    assert right.code == 0 and "service zoo: init base, deploy all by average" in right.out
