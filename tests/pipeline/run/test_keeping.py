"""A run's merges become recipes as soon as no step needs them, and no sooner."""

import contextlib
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from merge_service.checkpoints import WEIGHTS_FILE
from pipeline.errors import StorageFull
from pipeline.plan.keeping import AT_ONCE, disk, kept_merges
from pipeline.plan.steps import Plan, Step
from pipeline.run.keeping import Keeping, check_room, finish_keeping
from pipeline.store.artifact import Record
from pipeline.store.local import Store
from pipeline.store.recipes import IN_USE, Recipes
from pipeline.workspace.registrations import register
from tests.pipeline.recipe_toys import AVERAGES, FOLDS, filled, merges, record_of


def workspace(store: Store, plan: Plan, keep: str = "none", anchors: int = 0) -> Any:
    storage = SimpleNamespace(keep=keep, anchors=anchors)
    return SimpleNamespace(
        store=store, plan=plan, out=store.root.parent, study=SimpleNamespace(storage=storage, name="toy"),
        kept=kept_merges(plan, storage),
    )  # fmt: skip


@pytest.fixture
def full(tmp_path: Path) -> tuple[Store, Plan]:
    return filled(tmp_path / "store", [AVERAGES, FOLDS])


def readers(plan: Plan, fingerprint: str) -> list[Step]:
    return [step for step in plan.steps.values() if fingerprint in step.inputs.values()]


def test_merge_is_dropped_when_its_last_reader_is_done(full: tuple[Store, Plan]) -> None:
    store, plan = full
    first = next(record for record in merges(store, plan) if record.spec["form"] == "fold")
    waits = readers(plan, first.fingerprint)
    assert {step.kind for step in waits} == {"merge", "evaluate"}
    with Keeping(workspace(store, plan), ()) as keeping:
        keeping.finished(plan.steps[first.fingerprint])
        keeping.finished(waits[0])
    assert not record_of(store, first.fingerprint).is_recipe
    with Keeping(workspace(store, plan), {first.fingerprint, waits[0].fingerprint}) as keeping:
        keeping.finished(waits[1])
    assert record_of(store, first.fingerprint).is_recipe and not (first.path / WEIGHTS_FILE).exists()
    assert keeping.is_recipe(first.fingerprint) and keeping.notes == {}


def test_merge_that_a_fold_reads_when_it_is_dropped_goes_at_the_end(full: tuple[Store, Plan]) -> None:
    store, plan = full
    with Keeping(workspace(store, plan), plan.steps):
        pass
    first = next(record for record in merges(store, plan) if record.spec["form"] == "fold")
    assert store.recipes.missing(first)
    with contextlib.ExitStack() as held:
        store.recipes.opened(first, held)
        with Keeping(workspace(store, plan), plan.steps) as keeping:
            pass
        assert not store.recipes.missing(first) and keeping.notes == {}
        assert finish_keeping(workspace(store, plan), {}) == [
            f"{plan.steps[first.fingerprint].label} stays as a file: {IN_USE}"
        ]
    assert finish_keeping(workspace(store, plan), {}) == []
    assert store.recipes.missing(first)


def test_run_that_goes_on_drops_what_the_one_before_had_no_time_for(full: tuple[Store, Plan]) -> None:
    store, plan = full
    with Keeping(workspace(store, plan, "final"), plan.steps):
        pass
    held = [record for record in merges(store, plan) if not record.is_recipe]
    assert [plan.steps[record.fingerprint].t for record in held] == [4, 4]


def test_keeping_all_looks_at_nothing(full: tuple[Store, Plan]) -> None:
    store, plan = full
    with Keeping(workspace(store, plan, "all"), plan.steps) as keeping:
        assert not keeping.must_wait(plan.steps.values())
    assert not any(record.is_recipe for record in merges(store, plan))


def test_no_more_than_a_few_merges_wait_to_be_scored(full: tuple[Store, Plan]) -> None:
    store, plan = full
    scored = [step for step in plan.steps.values() if step.kind == "merge" and step.spec["form"] == "merge"]
    with Keeping(workspace(store, plan), ()) as keeping:
        for step in scored[: AT_ONCE - 1]:
            keeping.finished(step)
            assert not keeping.must_wait([])
        assert set(keeping.must_wait([scored[AT_ONCE - 1]])) >= {step.fingerprint for step in scored}
        keeping.finished(readers(plan, scored[0].fingerprint)[0])
        assert not keeping.must_wait([scored[AT_ONCE - 1]])


def test_on_a_small_disk_one_merge_waits_and_none_starts_while_one_is_dropped(
    full: tuple[Store, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, plan = full
    passing = {step.fingerprint for step in plan.steps.values() if step.kind == "merge"}
    first = next(one for one in plan.steps.values() if one.kind == "merge" and one.spec["form"] == "merge")
    begun, end = threading.Event(), threading.Event()

    def drop(record: Record) -> None:
        begun.set()
        assert end.wait(60)

    monkeypatch.setattr(Store, "free_bytes", lambda store: 0)
    monkeypatch.setattr(Recipes, "drop", lambda recipes, record: drop(record))
    with Keeping(workspace(store, plan), ()) as keeping:
        assert not keeping.must_wait([])
        assert first.fingerprint in keeping.must_wait([first])
        keeping.finished(first)
        keeping.finished(readers(plan, first.fingerprint)[0])
        assert begun.wait(60) and set(keeping.must_wait([])) == passing
        end.set()
    assert not keeping.must_wait([])


def test_room_that_the_steps_ahead_need_shrinks_by_what_is_done(full: tuple[Store, Plan]) -> None:
    store, plan = full
    for keep in ("none", "all"):
        room = disk(plan, plan.steps, kept_merges(plan, SimpleNamespace(keep=keep, anchors=0)))
        with Keeping(workspace(store, plan, keep), ()) as keeping:
            assert keeping.reserve() == room.least
            for step in plan.steps.values():
                keeping.finished(step)
            assert keeping.reserve() == room.least - room.kept
    assert room.least == room.kept


def test_merge_that_another_study_keeps_or_may_read_stays(full: tuple[Store, Plan], tmp_path: Path) -> None:
    store, plan = full
    other = tmp_path / "other"
    other.mkdir()
    (other / "plan.json").write_text("{}")
    register(store, plan, other, running=False)
    with Keeping(workspace(store, plan), plan.steps):
        pass
    assert not any(record.is_recipe for record in merges(store, plan))
    register(store, plan, other, running=False, kept=frozenset())
    with Keeping(workspace(store, plan), plan.steps):
        pass
    assert all(record.is_recipe for record in merges(store, plan))


def test_keeping_all_after_none_makes_files_again(full: tuple[Store, Plan]) -> None:
    store, plan = full
    before = merges(store, plan)
    with Keeping(workspace(store, plan), plan.steps):
        pass
    assert finish_keeping(workspace(store, plan, "all"), {}) == []
    assert merges(store, plan) == before and all((one.path / WEIGHTS_FILE).exists() for one in before)


def test_best_keeps_what_the_best_trajectory_serves_at_its_end(full: tuple[Store, Plan]) -> None:
    store, plan = full
    last = [one.points[-1] for one in plan.trajectories]
    rows = [
        {"id": one.id, "group": one.group, "split": "test", "steps": [{"t": 4, "task": "d4", "gm": gm}]}
        for one, gm in zip(plan.trajectories, (0.2, 0.3))
    ]
    answer = {"trajectories": rows}
    finish_keeping(workspace(store, plan, "best"), answer)
    held = [record.fingerprint for record in merges(store, plan) if not record.is_recipe]
    assert held == [last[1].merge]


def test_merge_that_is_only_scored_is_a_recipe_from_the_start_once_such_a_merge_was_made_again(
    full: tuple[Store, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, plan = full
    monkeypatch.setattr("pipeline.store.recipes.PROVE_ONE_IN", 10**9)
    averages = [step for step in plan.steps.values() if step.kind == "merge" and step.spec["form"] == "merge"]
    fold = next(step for step in plan.steps.values() if step.kind == "merge" and step.spec["form"] == "fold")
    keeping = Keeping(workspace(store, plan), ())
    assert [keeping.held(step) for step in averages] == ["tried"] + ["files"] * (len(averages) - 1)
    assert keeping.held(averages[0]) == "tried", "what is tried once more is asked again"
    assert store.recipes.drop(record_of(store, averages[0].fingerprint)) is None
    assert store.recipes.drop(record_of(store, fold.fingerprint)) is None
    assert [keeping.held(step) for step in averages] == ["recipe"] * len(averages)
    assert keeping.held(fold) == "files", "a fold is read by the next one"
    assert Keeping(workspace(store, plan, "all"), ()).held(averages[0]) == "files"


@pytest.mark.parametrize(
    ("free", "resume", "named"),
    [(99, 100, r"checkpoint_every.*100 bytes are needed, 99 are free"), (149, 100, "150 bytes are needed"), (150, 100, None), (50, 0, None)],
)  # fmt: skip
def test_room_is_for_the_study_and_the_checkpoints_of_an_expert(
    free: int, resume: int, named: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "store").mkdir()
    store = Store(tmp_path / "store")
    place: Any = SimpleNamespace(
        store=store, out=tmp_path, scratch=tmp_path / "scratch", disk_by_choice=lambda: {"all": 7},
        study=SimpleNamespace(name="toy"),
    )  # fmt: skip
    for module in ("pipeline.run.keeping", "pipeline.store.local"):
        monkeypatch.setattr(f"{module}.free_bytes", lambda _: free)
    summary: Any = {"disk_least_bytes": 50, "resume_bytes": resume}
    with pytest.raises(StorageFull, match=named) if named else contextlib.nullcontext():
        check_room(place, summary)
