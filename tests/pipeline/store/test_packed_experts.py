"""Experts that are kept as differences from their base: nothing else differs, and a damaged one is made anew."""

import contextlib
from pathlib import Path

import pytest

from merge_service.checkpoints import WEIGHTS_FILE, sha256_of
from pipeline.errors import CorruptArtifact
from pipeline.plan.steps import Plan
from pipeline.store.artifact import PACKED, Record
from pipeline.store.local import Store
from pipeline.store.recipes import IN_USE
from tests.pipeline.recipe_toys import AVERAGES, filled, merges, record_of

Filled = tuple[Store, Plan]


@pytest.fixture
def full(tmp_path: Path) -> Filled:
    return filled(tmp_path / "store", [AVERAGES])


def experts(store: Store, plan: Plan) -> list[Record]:
    return [record_of(store, fp) for fp, step in plan.steps.items() if step.kind == "train"]


def pack_all(store: Store, plan: Plan) -> list[Record]:
    """Every expert packed; returns the records as they were before."""
    before = experts(store, plan)
    for record in before:
        assert store.recipes.pack(record, record_of(store, plan.steps[record.fingerprint].base)) is None
        assert not (record.path / WEIGHTS_FILE).exists()
    return before


def packed_file(record: Record) -> Path:
    (found,) = record.path.glob(f"{PACKED}*")
    return found


def test_packed_experts_open_with_their_sha256_and_merge_to_the_same_bytes(full: Filled) -> None:
    store, plan = full
    last = merges(store, plan)[-1]
    before = pack_all(store, plan)
    assert [one.held for one in experts(store, plan)] == ["packed"] * len(before)
    assert store.verify() == [] and store.recipes.problems() == []
    assert store.recipes.drop(last) is None
    assert sha256_of(store.open_verified(last) / WEIGHTS_FILE) == last.sha256(WEIGHTS_FILE)
    for record in before:
        assert sha256_of(store.open_verified(record) / WEIGHTS_FILE) == record.sha256(WEIGHTS_FILE)
        assert store.recipes.pack(record, record_of(store, plan.steps[record.fingerprint].base)) is None
        assert not (record.path / WEIGHTS_FILE).exists()


def test_packing_is_undone_without_a_trace(full: Filled) -> None:
    store, plan = full
    text = [(one.path / "record.json").read_text() for one in experts(store, plan)]
    for record in pack_all(store, plan):
        store.recipes.keep(record_of(store, record.fingerprint))
        assert (record.path / WEIGHTS_FILE).exists() and not [*record.path.glob(f"{PACKED}*")]
    assert text == [(one.path / "record.json").read_text() for one in experts(store, plan)]
    assert store.verify() == []


def test_expert_in_use_stays(full: Filled) -> None:
    store, plan = full
    one = experts(store, plan)[0]
    with contextlib.ExitStack() as held:
        store.recipes.opened(one, held)
        assert store.recipes.pack(one, record_of(store, plan.steps[one.fingerprint].base)) == IN_USE
    assert (one.path / WEIGHTS_FILE).exists() and record_of(store, one.fingerprint).held == "files"
    assert store.verify() == [f"{packed_file(one)} is not in the artifact's record"]


@pytest.mark.parametrize("harm", ["gone", "flipped", "cut"])
def test_damaged_packed_file_is_named_and_set_aside_so_that_the_expert_is_trained_again(
    harm: str, full: Filled
) -> None:
    store, plan = full
    one = pack_all(store, plan)[0]
    packed = packed_file(one)
    data = packed.read_bytes()
    if harm == "gone":
        packed.unlink()
        assert any("packed file is gone" in problem for problem in store.verify())
    else:
        packed.write_bytes(data[:-9] if harm == "cut" else data[:-9] + bytes([data[-9] ^ 255]) + data[-8:])
        problems = store.recipes.problems()
        assert any(str(one.path) in problem for problem in problems), problems
    with pytest.raises(CorruptArtifact, match="moved to"):
        store.open_verified(record_of(store, one.fingerprint))
    assert not store.has("train", one.fingerprint)
