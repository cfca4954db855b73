"""Garbage collection: what nothing refers to is removed; what a registered study refers to or a running one makes stays."""

import json
import os
import shutil
import socket
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from pipeline.plan.file import encode
from pipeline.plan.steps import Plan
from pipeline.store.local import Store
from pipeline.store.open import store_at
from pipeline.store.remote import MIRROR
from pipeline.store.upkeep import upkeep
from pipeline.workspace.lock import driver_lock, write_driver
from pipeline.workspace.registrations import register, registrations, retire
from tests.pipeline.plan_toys import facts, make_plan, study
from tests.pipeline.results.test_results import carry_out
from tests.pipeline.s3_server import s3_server


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with s3_server(tmp_path_factory.mktemp("s3")) as address:
        yield address


@pytest.fixture(params=["local", "s3"])
def where(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(MIRROR, str(tmp_path / "mirror"))
    if request.param == "local":
        return str(tmp_path / "shared")
    request.getfixturevalue("s3")
    return f"s3://bucket/{uuid.uuid4().hex}"


def finished(out: Path, where: str, strategies: list[Any]) -> tuple[Plan, Store]:
    """A finished run in `out` with the store at `where`, as the driver leaves it."""
    plan, store = make_plan(study(strategies, tasks=2), facts(2)), store_at(where, out)
    out.mkdir(exist_ok=True)
    store.prepare()
    register(store, plan, out)
    (out / "plan.json").write_text(json.dumps(encode(plan)))
    (out / "study.yaml").write_text(json.dumps({"storage": {"store": where}}))
    carry_out(plan, store)
    retire(store, plan, out)
    return plan, store


def test_dry_run_says_what_goes_and_changes_nothing_and_the_next_does_it(
    where: str, tmp_path: Path, cli: Any
) -> None:
    before, store = finished(tmp_path / "out", where, ["best_in_time", "offline_merging"])
    plan, _ = finished(tmp_path / "out", where, ["best_in_time"])
    doomed = {fp[:16] for fp in before.steps} - {fp[:16] for fp in plan.steps}
    assert doomed
    said = json.loads(cli("gc", tmp_path / "out", "--dry-run", "--json").out)
    assert {entry["digits"] for entry in said["removed"]} == doomed and said["bytes"] > 0
    assert all(store.has(step.kind, fp) for fp, step in before.steps.items())
    assert "would be removed" in cli("gc", tmp_path / "out", "--dry-run").out
    assert json.loads(cli("gc", tmp_path / "out", "--json").out)["removed"] == said["removed"]
    assert {fp for fp, step in before.steps.items() if not store.has(step.kind, fp)} == {
        fp for fp in before.steps if fp[:16] in doomed
    }
    assert store.verify() == []
    assert json.loads(cli("gc", tmp_path / "out", "--json").out)["removed"] == []
    assert carry_out(before, store) == len(doomed)


def test_what_another_study_refers_to_stays_until_it_is_forgotten_by_name(
    where: str, tmp_path: Path, cli: Any
) -> None:
    other, store = finished(tmp_path / "other", where, ["offline_merging"])
    plan, _ = finished(tmp_path / "out", where, ["best_in_time"])
    assert json.loads(cli("gc", tmp_path / "out", "--json").out)["removed"] == []
    name = next(one.name for one in registrations(upkeep(store)) if one.out == str(tmp_path / "other"))
    refused = cli("gc", tmp_path / "out", "--forget", name)
    assert refused.code == 2 and "still there" in refused.err
    shutil.rmtree(tmp_path / "other")
    said = cli("gc", tmp_path / "out")
    assert f"--forget {name}" in said.out and all(store.has(s.kind, fp) for fp, s in other.steps.items())
    assert cli("gc", tmp_path / "out", "--forget", "nobody").code == 2
    removed = json.loads(cli("gc", tmp_path / "out", "--forget", name, "--json").out)["removed"]
    assert {entry["digits"] for entry in removed} == {fp[:16] for fp in other.steps} - {
        fp[:16] for fp in plan.steps
    }
    assert all(store.has(step.kind, fp) for fp, step in plan.steps.items())


def test_what_was_made_since_a_running_study_registered_stays(where: str, tmp_path: Path, cli: Any) -> None:
    stray, store = finished(tmp_path / "gone", where, ["offline_merging"])
    time.sleep(0.01)
    finished(tmp_path / "out", where, ["best_in_time"])
    keeper = upkeep(store)
    for one in registrations(keeper):
        if one.out == str(tmp_path / "gone"):
            keeper.drop_note(one.name)
    other = tmp_path / "other"
    with driver_lock(other):
        register(store, make_plan(study(["zero_shot"], tasks=2), facts(2)), other)
        fresh = make_plan(study(["multitask"], tasks=2), facts(2))
        time.sleep(0.01)
        carry_out(fresh, store)
        cli("gc", tmp_path / "out")
        assert all(store.has(step.kind, fp) for fp, step in fresh.steps.items())
        assert not all(store.has(step.kind, fp) for fp, step in stray.steps.items())
    cli("gc", tmp_path / "out")
    assert not all(store.has(step.kind, fp) for fp, step in fresh.steps.items())


def test_gc_refuses_while_a_driver_works_there_and_leaves_what_it_said(tmp_path: Path, cli: Any) -> None:
    out = tmp_path / "out"
    finished(out, str(tmp_path / "store"), ["zero_shot"])
    with driver_lock(out):
        refused = cli("gc", out)
        assert refused.code == 2 and "being worked on" in refused.err
    write_driver(out, {"ended": True, "failed": {"step": "x", "error": "y"}})
    before = (out / "driver.json").read_text()
    assert cli("gc", out).code == 0
    assert json.loads((out / "driver.json").read_text()) == json.loads(before)


def test_scratch_of_finished_steps_goes_and_what_was_set_aside_only_when_asked(
    tmp_path: Path, cli: Any
) -> None:
    out = tmp_path / "out"
    plan, store = finished(out, str(tmp_path / "store"), ["best_in_time"])
    step = next(step for step in plan.steps.values() if step.kind == "train")
    for name in (step.fingerprint, "states-x", "limits"):
        (out / "scratch" / name).mkdir(parents=True)
    (store.root / ".corrupt" / "x").mkdir(parents=True)
    (store.root / ".corrupt" / "x" / "f").write_bytes(b"123")
    said = json.loads(cli("gc", out, "--json").out)
    assert said["set_aside"] == {".corrupt/x": 3} and (store.root / ".corrupt" / "x").exists()
    assert not list((out / "scratch").iterdir()) and len(said["scratch"]) == 3
    cli("gc", out, "--set-aside")
    assert not (store.root / ".corrupt" / "x").exists()
    assert store.verify() == []


@pytest.mark.fault("F32")
def test_registration_from_another_host_counts_as_running_for_a_week_unless_it_retired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, store = finished(tmp_path / "out", str(tmp_path / "store"), ["zero_shot"])
    register(store, plan, tmp_path / "out")
    here = socket.gethostname()
    monkeypatch.setattr(socket, "gethostname", lambda: "other-host")
    (one,) = registrations(upkeep(store))
    assert one.host == here and one.may_run and not one.is_gone
    monkeypatch.setattr(time, "time", lambda: one.time_ms / 1000 + 8 * 24 * 3600)
    assert not one.may_run


def test_running_study_of_the_same_path_on_another_host_keeps_what_it_makes(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any
) -> None:
    out = tmp_path / "out"
    _, store = finished(out, where, ["zero_shot"])
    here = socket.gethostname()
    monkeypatch.setattr(socket, "gethostname", lambda: "other-host")
    register(store, make_plan(study(["zero_shot"], tasks=2), facts(2)), out)
    monkeypatch.setattr(socket, "gethostname", lambda: here)
    time.sleep(0.01)
    fresh = make_plan(study(["multitask"], tasks=2), facts(2))
    carry_out(fresh, store)
    said = cli("gc", out)
    assert all(store.has(step.kind, fp) for fp, step in fresh.steps.items())
    assert "may be running" in said.out
    name = next(one.name for one in registrations(upkeep(store)) if one.host == "other-host")
    refused = cli("gc", out, "--forget", name)
    assert refused.code == 2 and "may be running" in refused.err and "other-host" in refused.err
    (out / "driver.json").write_text(json.dumps({"pid": 1, "host": "other-host"}))
    cli("gc", out)
    assert not all(store.has(step.kind, fp) for fp, step in fresh.steps.items()), (
        "it is the same OUT, whose lock gc holds"
    )


def test_bytes_are_those_that_become_free_and_not_those_that_mlflow_holds(tmp_path: Path, cli: Any) -> None:
    out = tmp_path / "out"
    before, store = finished(out, str(tmp_path / "store"), ["best_in_time", "offline_merging"])
    plan, _ = finished(out, str(tmp_path / "store"), ["best_in_time"])
    gone = next(step for fp, step in before.steps.items() if fp not in plan.steps and step.kind == "merge")
    files = [
        path
        for path in store.path("merge", gone.fingerprint, gone.slug).iterdir()
        if path.name != "record.json"
    ]
    whole = json.loads(cli("gc", out, "--dry-run", "--json").out)
    for path in files:
        os.link(path, tmp_path / f"held-{path.name}")
    held = sum(path.stat().st_size for path in files)
    said = json.loads(cli("gc", out, "--dry-run", "--json").out)
    assert held > 0 and said["linked"] == held and said["bytes"] == whole["bytes"] - held
    assert "other names hold them" in cli("gc", out).out
