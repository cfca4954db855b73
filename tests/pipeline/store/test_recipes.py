"""Merges kept as recipes: the same bytes on request, whatever process ends in between, and nothing lost."""

import contextlib
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from merge_service.checkpoints import WEIGHTS_FILE, sha256_of
from merge_service.service import Merger
from pipeline.errors import CorruptArtifact
from pipeline.store import recipes as module
from pipeline.store.artifact import Record
from pipeline.store.local import Store
from tests.pipeline.plan_toys import Plan
from tests.pipeline.recipe_toys import AVERAGES, FOLDS, exit_code, filled, job, merges, record_of

Filled = tuple[Store, Plan]


@pytest.fixture
def full(tmp_path: Path) -> Filled:
    return filled(tmp_path / "store", [AVERAGES, FOLDS])


def is_there(record: Record) -> bool:
    return (record.path / WEIGHTS_FILE).exists()


def drop_all(store: Store, plan: Plan) -> list[Record]:
    """Every merge as a recipe; returns the records as they were before."""
    before = merges(store, plan)
    assert [store.recipes.drop(record) for record in before] == [None] * len(before)
    assert not any(map(is_there, before))
    return before


def test_dropped_merges_are_made_again_to_the_byte(full: Filled) -> None:
    store, plan = full
    before = drop_all(store, plan)
    assert all(record.is_recipe for record in merges(store, plan))
    assert all(store.has("merge", record.fingerprint) for record in before) and store.verify() == []
    for record in before:
        directory = store.open_verified(record)  # by the record as it was before it was dropped
        assert directory == record.path
        assert sha256_of(directory / WEIGHTS_FILE) == record.sha256(WEIGHTS_FILE)
    assert [*(store.root / ".stage").iterdir()] == [] and store.verify() == []


def test_weights_that_are_made_again_are_synced_when_they_are_kept_and_not_before(
    full: Filled, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, plan = full
    record = drop_all(store, plan)[0]
    synced: list[str] = []
    monkeypatch.setattr(
        os, "fsync", lambda handle: synced.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
    )
    weights = store.open_verified(record) / WEIGHTS_FILE
    assert synced == []
    store.recipes.keep(record)
    assert synced[0] == str(weights) and str(record.path) in synced[1:]


def test_last_fold_is_made_without_leaving_those_before_it(full: Filled) -> None:
    store, plan = full
    *earlier, last = [record for record in drop_all(store, plan) if record.spec["form"] == "fold"]
    store.open_verified(last)
    assert is_there(last) and not any(map(is_there, earlier))


def test_record_of_a_kept_artifact_says_nothing_of_recipes(full: Filled) -> None:
    store, plan = full
    record = merges(store, plan)[0]
    assert "held" not in (record.path / "record.json").read_text()
    store.recipes.drop(record)
    assert '"held": "recipe"' in (record.path / "record.json").read_text()
    assert replace(record_of(store, record.fingerprint), held="files") == record


def test_made_weights_stay_within_the_bound_and_the_longest_unused_go_first(full: Filled) -> None:
    store, plan = full
    records = drop_all(store, plan)
    small = replace(store, cache_bytes=5 * records[0].bytes // 2)
    for record in records:
        small.open_verified(record)
        assert sum(map(is_there, records)) <= 2 and is_there(record)
    assert [*map(is_there, records)] == [False] * (len(records) - 2) + [True, True]
    small.recipes.touch(records[-2])
    small.open_verified(records[0])
    assert is_there(records[-2]) and not is_there(records[-1])


def test_weights_in_use_are_not_dropped(full: Filled) -> None:
    store, plan = full
    record = merges(store, plan)[0]
    with contextlib.ExitStack() as held:
        store.recipes.opened(record, held)
        assert exit_code("drop", store, record) == 1 and is_there(record)
    assert exit_code("drop", store, record) == 0 and not is_there(record)


def test_step_gets_the_weights_of_a_dropped_input_and_keeps_them_while_it_works(full: Filled) -> None:
    store, plan = full
    drop_all(store, plan)
    merged = {record.fingerprint for record in merges(store, plan)}
    step = next(one for one in plan.steps.values() if one.inputs.get("model") in merged)
    record = record_of(store, step.inputs["model"])

    def work(_: Path) -> dict[str, object]:
        assert sha256_of(record.path / WEIGHTS_FILE) == record.sha256(WEIGHTS_FILE)
        assert store.recipes.drop(record) is not None and is_there(record)
        return {"scores": {}}

    store.make(step, work)
    assert store.recipes.drop(record) is None


@pytest.mark.parametrize("technique", ["iso_c", "opcm"])
def test_technique_on_singular_vectors_is_never_dropped(technique: str, tmp_path: Path) -> None:
    store, plan = filled(tmp_path / "store", [{"init": "base", "deploy": "all", "technique": technique}], 2)
    for record in merges(store, plan):
        assert "singular vectors" in str(store.recipes.drop(record)) and is_there(record)


def test_merge_that_comes_out_otherwise_is_not_dropped(full: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    store, plan = full
    two = [one for one in merges(store, plan) if one.spec["technique"] == "average"][1]
    made = module.Recipes._merge

    def other(self: module.Recipes, one: Record, running: Path | None, out: Path) -> None:
        changed = {**one.spec, "params": {**one.spec["params"], "schedule": "linear"}}
        made(self, replace(one, spec=changed), running, out)

    monkeypatch.setattr(module.Recipes, "_merge", other)
    why = str(store.recipes.drop(two))
    assert (
        "other bytes" in why
        and "numpy" in why
        and is_there(two)
        and not record_of(store, two.fingerprint).is_recipe
    )
    assert any((store.root / ".conflicts").iterdir())


def test_first_merge_of_its_kind_is_rebuilt_before_it_is_dropped_and_others_by_sample(
    full: Filled, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, plan = full
    rebuilt: list[str] = []
    rebuild = module.Recipes.rebuild

    def counted(self: module.Recipes, record: Record, out: Path) -> None:
        rebuilt.append(record.fingerprint)
        rebuild(self, record, out)

    monkeypatch.setattr(module.Recipes, "rebuild", counted)
    folds = [record for record in merges(store, plan) if record.spec["form"] == "fold"]
    monkeypatch.setattr(module, "PROVE_ONE_IN", 2**32)
    for record in folds:
        store.recipes.drop(record)
    assert rebuilt == [folds[0].fingerprint]
    other = replace(folds[-1], versions={**folds[-1].versions, "numpy": "0.1"})
    store.recipes.drop(other)
    assert rebuilt == [folds[0].fingerprint, other.fingerprint]


def test_merge_that_is_tried_is_made_again_at_once_and_then_dropped_without_it(
    full: Filled, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, plan = full
    step = next(one for one in plan.steps.values() if one.kind == "merge")
    shutil.rmtree(record_of(store, step.fingerprint).path)
    record = Merger().run(replace(job(store, step, store.root.parent), held="tried"), step, store)
    assert is_there(record) and not record.is_recipe and store.recipes.proof(step).exists()
    monkeypatch.setattr(module.Recipes, "rebuild", None)
    assert store.recipes.drop(record) is None and not is_there(record)


def test_damaged_input_of_a_recipe_is_named_and_a_new_one_gives_the_same_bytes(full: Filled) -> None:
    store, plan = full
    record = drop_all(store, plan)[-1]
    expert = record_of(store, record.spec["inputs"][-1][1])
    content = (expert.path / WEIGHTS_FILE).read_bytes()
    (expert.path / WEIGHTS_FILE).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert any(str(expert.path) in problem for problem in store.verify())
    with pytest.raises(CorruptArtifact, match="moved to"):
        store.open_verified(record)
    assert any("not in the store" in problem for problem in store.verify())
    with pytest.raises(CorruptArtifact, match="to make its weights, which is not in the store"):
        store.open_verified(record)
    step = plan.steps[expert.fingerprint]

    def again(stage: Path) -> dict[str, object]:
        (stage / WEIGHTS_FILE).write_bytes(content)
        (stage / "open_clip_config.json").write_text("{}")
        return {}

    store.make(step, again)
    assert sha256_of(store.open_verified(record) / WEIGHTS_FILE) == record.sha256(WEIGHTS_FILE)


def test_damaged_copy_of_made_weights_is_made_again(full: Filled) -> None:
    store, plan = full
    record = drop_all(store, plan)[0]
    path = store.open_verified(record) / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-4] + b"oops")
    assert sha256_of(store.open_verified(record) / WEIGHTS_FILE) == record.sha256(WEIGHTS_FILE)


@pytest.mark.parametrize(
    ("act", "where"),
    [("drop", "recipe.before_record"), ("drop", "recipe.after_record"),
     ("open", "recipe.before_place"), ("open", "recipe.after_place")],
)  # fmt: skip
def test_kill_leaves_the_weights_or_their_recipe(act: str, where: str, full: Filled, tmp_path: Path) -> None:
    store, plan = full
    record = next(one for one in merges(store, plan) if one.spec["form"] == "fold")
    if act == "open":
        store.recipes.drop(record)
    fault = {where: {"marker": str(tmp_path / "killed")}}
    assert exit_code(act, store, record, fault) == -signal.SIGKILL
    assert is_there(record) or record_of(store, record.fingerprint).is_recipe
    store.prepare()
    assert store.verify() == [] and [*(store.root / ".stage").iterdir()] == []
    assert sha256_of(store.open_verified(record) / WEIGHTS_FILE) == record.sha256(WEIGHTS_FILE)
    assert exit_code("drop", store, record) == 0
    assert sorted(path.name for path in record.path.iterdir()) == ["open_clip_config.json", "record.json"]


def test_merge_committed_as_a_recipe_is_not_synced_by_anyone_and_survives_a_power_cut(
    full: Filled, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, plan = full
    step = next(step for step in plan.steps.values() if step.kind == "merge" and step.t == 3)
    before = record_of(store, step.fingerprint)
    forced: list[str] = []
    monkeypatch.setattr(
        os, "fsync", lambda handle: forced.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
    )
    shutil.rmtree(before.path)
    assert not Merger().run(job(store, step, store.root.parent), step, store).is_recipe
    assert len([name for name in forced if "safetensors" in name]) == 1
    shutil.rmtree(before.path)
    forced.clear()
    passing = replace(job(store, step, store.root.parent), held="recipe")
    record = Merger().run(passing, step, store)
    assert record.is_recipe and record.files == before.files and is_there(record)
    assert not [name for name in forced if "safetensors" in name]
    assert [name for name in forced if name.endswith("record.json")]
    os.truncate(record.path / WEIGHTS_FILE, 100)
    assert store.open_verified(record) and sha256_of(record.path / WEIGHTS_FILE) == before.sha256(
        WEIGHTS_FILE
    )
    assert store.recipes.drop(record) is None and not is_there(record)
