"""`data.reading`: what a plan reads of pools as they are stored, and which steps are other steps because of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from merge_service.errors import UserError
from pipeline.plan import facts
from pipeline.plan.facts import gather
from pipeline.plan.planner import make_plan
from pipeline.run.jobs import Jobs
from pipeline.study.config import load_study
from tests.pipeline.plan_toys import workspace_of
from tests.world import TASKS, World, make_world


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def planned(world: World, reading: str | None) -> tuple[Any, Any]:
    """The study and the plan of a world whose pools are read in this way."""
    asked = [] if reading is None else [f"data.reading={reading}"]
    study = load_study(world.study(), asked).resolved()
    return study, make_plan(study, gather(study))


def kinds(plan: Any, kind: str) -> list[str]:
    return [fingerprint for fingerprint, step in plan.steps.items() if step.kind == kind]


def test_experts_are_others_where_their_pictures_are_and_what_is_read_alike_is_not(place: World) -> None:
    _, before = planned(place, None)
    for reading in ("decoded", "auto"):
        assert list(planned(place, reading)[1].steps) == list(before.steps)
    _, stored = planned(place, "encoded")
    assert not {*kinds(before, "train")} & {*kinds(stored, "train")}
    sources = [
        [source for part in ("update", "buffer", "pretraining") for source in step.spec[part]]
        for step in stored.steps.values() if step.kind == "train"
    ]  # fmt: skip
    assert {source["reading"] for one in sources for source in one} == {"encoded"}
    bases = [
        {
            fp
            for fp, step in plan.steps.items()
            if step.kind == "evaluate" and step.spec["model"] in plan.bases
        }
        for plan in (before, stored)
    ]
    assert bases[0] == bases[1] != set()


def test_auto_reads_splits_of_many_samples_as_they_are_stored(
    place: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = [*planned(place, "encoded")[1].steps]
    monkeypatch.setattr("workers.data.seen.AUTO_SAMPLES", 1)
    assert [*planned(place, "auto")[1].steps] == stored


def test_plan_opens_no_shard_of_a_pool_as_it_is_stored(place: World, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    verify = facts.verify

    def noted(root: Any, name: str, split: str, *more: Any) -> Any:
        opened.append(split)
        return verify(root, name, split, *more)

    monkeypatch.setattr(facts, "verify", noted)
    _, plan = planned(place, "encoded")
    assert set(opened) == {"test"} and kinds(plan, "train")


def test_jobs_say_how_each_split_is_read(place: World) -> None:
    for reading, trained in (("decoded", "decoded"), ("encoded", "encoded"), ("auto", "decoded")):
        study, plan = planned(place, reading)
        jobs = Jobs(workspace_of(study, plan))
        for step in plan.steps.values():
            if step.kind == "train":
                job = jobs.train(step)
                assert {source.reading for source in (*job.update, *job.buffer, *job.pretraining)} == {
                    trained
                }
            elif step.kind == "evaluate":
                assert {source.reading for source in jobs.evaluate(step).datasets} == {reading}


def test_shards_at_an_address_give_the_same_steps_and_no_request_before_they_are_read(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    _, before = planned(world, "encoded")
    home, address = tmp_path / "data" / TASKS[0], "http://127.0.0.1:9/pool/"
    manifest = json.loads((home / "manifest.json").read_text())
    (home / "manifest.json").write_text(json.dumps({**manifest, "addresses": {"train": address}}))
    shutil.rmtree(home / "train")
    with pytest.raises(UserError, match=r"data\.addresses does not allow"):
        planned(world, "encoded")
    allowed = ["data.reading=encoded", "data.addresses=[http://127.0.0.1:9/]"]
    study = load_study(world.study(), allowed).resolved()
    plan = make_plan(study, gather(study))
    assert list(plan.steps) == list(before.steps)
    jobs = Jobs(workspace_of(study, plan))
    trained = [jobs.train(step) for step in plan.steps.values() if step.kind == "train"]
    assert {source.addresses for job in trained for source in job.update} == {("http://127.0.0.1:9/",)}
    with pytest.raises(UserError, match=r"data\.reading: encoded"):
        planned(world, "decoded")


@pytest.mark.parametrize("root", ["s3://bucket/pool", "https://somewhere/pool"])
def test_root_that_is_an_address_is_refused_with_the_reason(place: World, root: str) -> None:
    with pytest.raises(Exception, match="a data root is a folder"):
        load_study(place.study(), [f"data.root={root}"])
