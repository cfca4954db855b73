"""The commands of a live service in a directory: what they print, what they change, and how they end."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from merge_service.live import Entry, parse
from tests.pipeline.service import toys

Cli = Callable[..., Any]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A toy service with one expert."""
    service = toys.home(tmp_path / "zoo")
    toys.arrive(service, toys.expert(tmp_path, "task0"), "task0", license="MIT")
    return tmp_path / "zoo"


def test_experts_arrive_are_shown_rolled_back_removed_and_replayed(
    out: Path, tmp_path: Path, cli: Cli
) -> None:
    path = toys.expert(tmp_path, "task1")
    came = cli("service", "arrive", path, "--task", "task1", "--out", out, "--json")
    assert came.code == 0, came.err
    name = json.loads(came.out)["id"]
    again = cli("service", "arrive", path, "--task", "task1", "--out", out)
    assert again.code == 0 and f"{name} (task1, of local): promoted, t = 2" in again.out
    listed = json.loads(cli("service", "arrivals", "--out", out, "--json").out)
    assert [one["status"] for one in listed] == ["superseded", "promoted"]
    assert "t = 2 of 2 is served" in cli("service", "status", "--out", out).out
    rolled = cli("service", "rollback", "1", "--reason", "complaints", "--hold", "--out", out)
    assert "t = 1 of 2 is served" in rolled.out and "on hold" in rolled.out
    assert json.loads(cli("service", "status", "--out", out, "--json").out)["served"]["t"] == 1
    gone = cli("service", "remove", name, "--reason", "takedown", "--purge", "--out", out)
    assert gone.code == 0 and f"{name} (task1, of local): purged" in gone.out
    assert cli("service", "verify", out).code == 0
    made = cli("service", "replay", out, "--out", tmp_path / "again", "--json")
    assert made.code == 0, made.err
    served = json.loads(cli("service", "status", "--out", out, "--json").out)["served"]
    assert json.loads(made.out)["served"]["sha256"] == served["sha256"]


def test_what_is_served_is_the_file_that_merge_makes_of_the_accepted_experts(
    out: Path, tmp_path: Path, cli: Cli
) -> None:
    experts = [toys.expert(tmp_path, task) for task in ("task0", "task1", "task2")]
    for path, task in zip(experts[1:], ("task1", "task2")):
        assert cli("service", "arrive", path, "--task", task, "--out", out).code == 0
    (base,) = (out / "store/base").glob("*/open_clip_model.safetensors")
    line = ["merge", *experts, "--technique", "average", "--base", base, "--as-study"]
    answer = cli(*line, "--out", tmp_path / "m.safetensors", "--no-compare")
    assert answer.code == 0, answer.err
    served = json.loads(cli("service", "status", "--out", out, "--json").out)["served"]
    assert toys.sha256_of(tmp_path / "m.safetensors") == served["sha256"]
    both = cli(*line, "--out", tmp_path / "n.safetensors", "--id", f"a={experts[0]}")
    assert both.code == 2 and "leave --id out" in both.err


def test_log_as_json_is_the_chain_itself(out: Path, cli: Cli) -> None:
    entries: list[Entry] = [
        parse(line.encode(), "here")
        for line in cli("service", "log", "--out", out, "--json").out.splitlines()
    ]
    assert [one.seq for one in entries] == list(range(1, len(entries) + 1))
    assert entries[-1].kind == "promoted"
    short = cli("service", "log", "--out", out, "--after", "5").out.splitlines()
    assert len(short) == len(entries) - 5 and "promoted" in short[-1]


def test_refused_experts_end_with_three_and_name_the_gate(out: Path, tmp_path: Path, cli: Cli) -> None:
    answer = cli(
        "service", "arrive", toys.expert(tmp_path, "task2", size=50.0), "--task", "task2", "--out", out
    )
    assert answer.code == 3 and "geometry.norm" in answer.out and "must be within" in answer.out
    name = answer.out.split()[0]
    released = cli("service", "release", name, "--reason", "known", "--out", out)
    assert released.code == 0 and "promoted" in released.out  # no data here, so nothing else is asked


def test_mistakes_end_with_two_and_say_what_to_do(out: Path, tmp_path: Path, cli: Cli) -> None:
    for line, *says in [
        (["status", "--out", tmp_path / "none"], "holds no service"),
        (["show", "a-000099", "--out", out], "no arrival a-000099"),
        (["rollback", "7", "--reason", "x", "--out", out], "no t = 7"),
        (["release", "a-000003", "--reason", "x", "--out", out], "promoted"),
        (["arrive", tmp_path / "nothing", "--task", "task1", "--out", out], "nothing"),
        (
            ["remove", "a-000003", "--reason", "x", "--descendants", "burn", "--out", out],
            "keep, remove or retrain",
        ),
        (["replay", out, "--out", out], "is there already"),
    ]:
        answer = cli("service", *line)
        assert answer.code == 2 and all(word in answer.err for word in says), (line, answer)
        assert answer.err.startswith("error: ") and "Traceback" not in answer.err


def test_verify_names_what_was_damaged_and_ends_with_one(out: Path, cli: Cli) -> None:
    state = toys.home(out).log.state
    (expert,) = (out / "store/expert").glob("*/open_clip_model.safetensors")
    content = bytearray(expert.read_bytes())
    content[-1] ^= 1
    expert.write_bytes(content)
    answer = cli("service", "verify", out)
    assert answer.code == 1 and str(expert) in answer.out
    entry = out / "service/toy/log/000000000003.json"
    entry.write_text(entry.read_text().replace("task0", "task9"))
    answer = cli("service", "verify", out)
    assert answer.code == 1 and "000000000003.json" in answer.out and state.seq > 3
