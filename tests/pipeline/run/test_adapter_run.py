"""A study whose experts are adapters: small artifacts, weights made when they are wanted, merges those of files. Actors without Ray."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest

from merge_service.checkpoints import ADAPTER_FOLDER, WEIGHTS_FILE, Checkpoint, sha256_of
from merge_service.merge import merge
from pipeline.errors import ConfigError, CorruptArtifact
from pipeline.kinds.specs import MergeSpec, TrainSpec
from pipeline.plan.steps import Step
from pipeline.store.artifact import Record
from pipeline.store.local import Store
from pipeline.store.open import store_at
from pipeline.study.config import load_study
from pipeline.tracking.rows.lineage import Lineage
from pipeline.workspace.export import export
from pipeline.workspace.packing import pack
from pipeline.workspace.workspace import Workspace
from tests.pipeline.recipe_toys import record_of
from tests.pipeline.run.test_measured_run import carried_out
from tests.world import ROOT, World

RECIPE: dict[str, Any] = {
    "lr": 1e-2, "batch_size": 12, "precision": "fp32", "mixture": {"pretraining": 0.33, "update": 0.34, "buffer": 0.33},
}  # fmt: skip
LORA = {"rank": 2, "targets": ["attn", "c_fc"]}


@pytest.fixture(scope="module")
def ran(
    world: World, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Workspace, dict[str, Record]]]:
    place = tmp_path_factory.mktemp("adapters")
    strategies = [
        {"init": "base", "deploy": "all", "technique": "ties", "params": {"density": 0.5}},
        "continual_finetuning",
        "best_in_time",
    ]
    file = world.study(
        name="adapters",
        recipe=RECIPE | {"adapter": LORA},
        budget={"steps_per_task": 2},
        grid={"strategies": strategies},
    )
    workspace = Workspace.open(file, out=place / "out")
    yield workspace, carried_out(workspace, scored=True)
    shutil.rmtree(place, ignore_errors=True)


def experts(found: tuple[Workspace, dict[str, Record]]) -> list[tuple[Step, Record]]:
    return [(found[0].plan.steps[fp], one) for fp, one in found[1].items() if one.kind == TrainSpec.kind]


def test_every_expert_is_an_adapter_on_the_weights_that_it_started_from(
    ran: tuple[Workspace, dict[str, Record]],
) -> None:
    workspace, _ = ran
    inits = set()
    for step, record in experts(ran):
        assert record.held == "adapter" and record.droppable == (WEIGHTS_FILE,)
        assert {
            f"{ADAPTER_FOLDER}/adapter_config.json",
            f"{ADAPTER_FOLDER}/adapter_model.safetensors",
        } <= record.files.keys()
        start = workspace.weights(step.spec["init"]) / WEIGHTS_FILE
        inits.add(workspace.plan.weights_step(step.spec["init"]).kind)
        with Checkpoint.open(start) as before, Checkpoint.open(record.path / WEIGHTS_FILE) as after:
            moved = [n for n in before.tensors if not np.array_equal(before.read(n), after.read(n))]
        assert {name.split(".")[-2] for name in moved} == {"attn", "c_fc"}
    assert inits == {"base", "train", "merge"}
    assert workspace.store.verify() == [] and workspace.store.recipes.problems() == []


def test_merges_are_those_of_the_whole_weights_and_open_in_plain_open_clip(
    ran: tuple[Workspace, dict[str, Record]], tmp_path: Path
) -> None:
    workspace, records = ran
    step = [
        one for one in workspace.plan.steps.values() if one.kind == "merge" and one.spec["form"] == "merge"
    ][-1]
    spec = MergeSpec.of(step.spec)
    files = [workspace.weights(fp) / WEIGHTS_FILE for _, fp in spec.members]
    base = workspace.weights(spec.base) / WEIGHTS_FILE
    merge(
        spec.technique,
        spec.params,
        base,
        files,
        tmp_path / WEIGHTS_FILE,
        ids=[name for name, _ in spec.members],
    )
    merged = records[step.fingerprint].path
    with Checkpoint.open(merged) as one, Checkpoint.open(tmp_path / WEIGHTS_FILE) as other:
        assert all(np.array_equal(one.read(name), other.read(name)) for name in one.tensors)
    open_clip.create_model_and_transforms(f"local-dir:{merged}")
    answer = workspace.write_results()
    assert len(answer["trajectories"]) == 3  # type: ignore[arg-type]


def test_weights_that_are_gone_are_made_again_with_the_same_bytes(
    ran: tuple[Workspace, dict[str, Record]], tmp_path: Path
) -> None:
    workspace, _ = ran
    for _, record in experts(ran):
        (record.path / WEIGHTS_FILE).unlink()
    assert workspace.store.verify() == []
    served = {one.points[-1].deployed: one.id for one in workspace.plan.trajectories}
    name, record = next(
        (served[step.fingerprint], one) for step, one in experts(ran) if step.fingerprint in served
    )
    assert sha256_of(workspace.store.open_verified(record)) == record.sha256(WEIGHTS_FILE)
    (record.path / WEIGHTS_FILE).unlink()
    written = export(workspace.out, name, None, tmp_path / "served")
    assert written["made"] and sha256_of(tmp_path / "served") == record.sha256(WEIGHTS_FILE)
    open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'served'}")
    assert pack(workspace.out)["linked"] == 0
    assert not any((one.path / WEIGHTS_FILE).exists() for _, one in experts(ran))
    again = Workspace.open(workspace.out / "study.yaml", out=workspace.out)
    assert again.summary()["disk_bytes"] == 0 and again.plan.study == workspace.plan.study


def test_cache_bounds_the_weights_that_are_made(ran: tuple[Workspace, dict[str, Record]]) -> None:
    workspace, _ = ran
    small = Store(workspace.store.root, cache_bytes=1)
    for _, record in experts(ran):
        small.open_verified(record)
    left = [one.path for _, one in experts(ran) if (one.path / WEIGHTS_FILE).exists()]
    assert left == [experts(ran)[-1][1].path]


def test_damaged_adapter_is_set_aside_so_that_the_expert_is_trained_again(
    ran: tuple[Workspace, dict[str, Record]],
) -> None:
    store = ran[0].store
    _, record = experts(ran)[0]
    file = record.path / ADAPTER_FOLDER / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    (record.path / WEIGHTS_FILE).unlink(missing_ok=True)
    assert any("its adapter is damaged" in one for one in store.recipes.problems())
    with pytest.raises(CorruptArtifact, match="run again to recompute it"):
        store.open_verified(record)
    assert not store.has(record.kind, record.fingerprint)


def test_settings_of_an_adapter_are_part_of_the_steps_identity(world: World) -> None:
    def trained(**adapter: Any) -> set[str]:
        recipe = RECIPE | ({"adapter": adapter} if adapter else {})
        plan = Workspace.open(
            world.study(name="one", recipe=recipe, grid={"strategies": ["offline_merging"]})
        ).plan
        return {fp for fp, step in plan.steps.items() if step.kind == "train"}

    found = [
        trained(),
        trained(rank=2),
        trained(rank=4),
        trained(rank=2, alpha=4),
        trained(rank=2, targets="attn"),
    ]
    assert len(set[str]().union(*found)) == sum(map(len, found))
    axis = world.study(
        name="axis",
        grid={
            "strategies": ["offline_merging", "zero_shot"],
            "recipe.adapter": [None, {"rank": 2}, {"rank": 4}],
        },
    )
    assert len(Workspace.open(axis).plan.trajectories) == 4


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"resources": {"experts": {"zero_stage": 2}}},
            "recipe.adapter: is trained by one process of plain torch",
        ),
        ({"recipe": RECIPE | {"adapter": {"rnak": 4}}}, "did you mean recipe.adapter.rank"),
        ({"recipe": RECIPE | {"adapter": {"kind": "dora"}}}, "dora"),
        ({"recipe": RECIPE | {"adapter": {}, "ema": 0.9}}, "ema and adapter exclude each other"),
    ],
)
def test_what_an_adapter_cannot_be_is_refused_by_the_key(
    world: World, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        Workspace.open(world.study(name="wrong", **({"recipe": RECIPE | {"adapter": LORA}} | changes)))


def test_a_store_at_a_url_keeps_whole_weights_too(
    ran: tuple[Workspace, dict[str, Record]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEMPORAL_MERGE_MIRROR", str(tmp_path))
    workspace, _ = ran
    step, record = experts(ran)[1]
    store = store_at(f"memory://{tmp_path.name}-{id(ran)}", tmp_path)
    store.prepare()
    for fingerprint in step.inputs.values():
        needed = record_of(workspace.store, fingerprint)
        copied(store, workspace.plan.weights_step(fingerprint), workspace.store.open_verified(needed))
    kept = copied(store, step, workspace.store.open_verified(record))
    assert (kept.held, kept.files) == ("files", record.files) and store.verify() == []


def copied(store: Store, step: Step, source: Path) -> Record:
    """The files of an artifact as that of a step."""

    def work(stage: Path) -> dict[str, object]:
        shutil.copytree(source, stage, dirs_exist_ok=True, ignore=lambda *_: {"record.json"})
        return {}

    return store.make(step, work, held="adapter" if step.kind == TrainSpec.kind else "files")


def test_the_study_of_the_documentation_plans(tmp_path: Path) -> None:
    found = load_study(ROOT / "configs" / "lora.yaml")
    assert all(cell.recipe.adapter is not None for cell in found.cells if "zero" not in cell.id)


def test_lineage_of_merged_models_names_the_adapters_and_the_base(
    ran: tuple[Workspace, dict[str, Record]],
) -> None:
    workspace, records = ran
    bases = {fp: workspace.store.record(base.kind, fp) for fp, base in workspace.plan.bases.items()}
    lineage = Lineage(workspace.plan.steps, records, bases)
    adapters = {
        one.fingerprint: one.files[f"{ADAPTER_FOLDER}/adapter_model.safetensors"]["sha256"]
        for _, one in experts(ran)
    }
    merges = [one for one in records.values() if one.kind == MergeSpec.kind]
    (base,) = bases.values()
    for merged in merges:
        named = lineage.manifest(merged)["lineage"]
        assert named["base_sha256"] == base.sha256(WEIGHTS_FILE)
        assert named["experts"] and all(
            e["adapter_sha256"] == adapters[e["fingerprint"]] for e in named["experts"]
        )
        shown = [e["adapter_sha256"][:12] for e in named["experts"]]
        assert lineage.tags(merged)["lineage.adapters"].split() == shown
        assert "adapter" not in lineage.tags(merged)
    for _, expert in experts(ran):
        assert lineage.tags(expert)["adapter"] == adapters[expert.fingerprint]
        assert adapters[expert.fingerprint] in lineage.note(expert)
    assert merges
