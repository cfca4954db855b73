"""The kept numbers of a piece: scores as in results.json, and measures of its experts from their weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from merge_service.checkpoints import WEIGHTS_FILE
from merge_service.errors import UserError
from merge_service.service import Merger
from pipeline.claims.programs import Program
from pipeline.claims.when_ema import pieces
from pipeline.claims.when_ema.design import Design, Piece
from pipeline.claims.when_ema.numbers import Numbers, has, read_numbers, write
from pipeline.claims.when_ema.pieces import Places, carry_out, make_bases
from pipeline.claims.when_ema.recording import points_of
from pipeline.run.carriers import CARRIERS
from pipeline.run.jobs import Jobs
from pipeline.store.artifact import hash_file
from pipeline.study.config import load_study
from pipeline.workspace.opening import open_plan, open_store
from pipeline.workspace.workspace import Workspace
from tests.pipeline.claims.when_ema.toys import World as Truth
from tests.pipeline.claims.when_ema.toys import numbers
from tests.world import TASKS, World, make_world
from workers.actors import Worker
from workers.models.export import export_base

GRID = {
    "strategies": [
        "zero_shot", {"init": "latest", "deploy": "latest"},
        {"init": ["latest", "ema"], "deploy": "ema", "technique": "average", "params": {"weight": 0.8}},
    ],
    "recipe.lr": [1e-4, 1e-3],
    "evaluation.split": ["val", "test"],
}  # fmt: skip
PIECE = Piece("share_00", 0, "s", (), core=True)


def finished(out: Path, world: World, complete: bool = True) -> None:
    """A run's study and results: KA is t, GM on test .1 more than on val."""
    study = load_study(world.study(grid=GRID))
    trajectories = [
        {
            "id": cell.id, "split": cell.split,
            "steps": [{"t": t, "ka": t, "zs": 0.5, "zs_replayed": None, "zs_never_replayed": 0.4, "gm": t + 0.1 * (cell.split == "test")} for t in range(3)],
        }
        for cell in study.cells
    ]  # fmt: skip
    out.mkdir(parents=True)
    (out / "study.yaml").write_text(study.resolved_yaml())
    (out / "results.json").write_text(json.dumps({"complete": complete, "trajectories": trajectories}))


def test_points_hold_both_splits_of_every_trajectory_side_by_side(world: World, tmp_path: Path) -> None:
    finished(tmp_path / "run", world)
    rows = points_of(tmp_path / "run")
    assert len(rows) == 3 * (1 + 3 * 2)
    arms = rows[["init", "deploy", "weight", "lr"]].drop_duplicates()
    assert len(arms) == 7 and arms["weight"].isna().sum() == 3 and arms["lr"].isna().sum() == 1
    assert (rows["gm_test"] - rows["gm_val"]).to_numpy() == pytest.approx(0.1)
    assert rows["zs_replayed_test"].isna().all() and (rows["zs_never_replayed_val"] == 0.4).all()
    finished(tmp_path / "half", world, complete=False)
    with pytest.raises(UserError, match="is not finished"):
        points_of(tmp_path / "half")


def with_val(home: Path) -> World:
    """A world whose datasets have a val split: a copy of test."""
    home.mkdir()
    made = make_world(home)
    for dataset in (home / "data").iterdir():
        shutil.copytree(dataset / "test", dataset / "val")
        manifest = json.loads((dataset / "manifest.json").read_text())
        manifest["splits"]["val"] = manifest["splits"]["test"]
        (dataset / "manifest.json").write_text(json.dumps(manifest))
    return made


def run_here(program: Program) -> None:
    """`pipeline.cli run` in this process, step after step, without Ray."""
    words = program.words
    assert words[:3] == ("-m", "pipeline.cli", "run") and words[4] == "--out"
    workspace = Workspace.open(Path(words[3]), list(words[7::2]), Path(words[5]))
    workspace.prepare()
    jobs, merger, worker = Jobs(workspace), Merger(), Worker(0, 1, 1, "cpu")
    for step in workspace.plan.steps.values():
        (merger if step.kind == "merge" else worker).run(
            CARRIERS[step.kind].job(jobs, step), step, workspace.store
        )  # type: ignore[arg-type]
    workspace.write_results()


def test_piece_is_run_recorded_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = with_val(tmp_path / "world")
    data = {
        "root": str(made.home / "data"),
        "adaptation": list(TASKS),
        "pretraining": ["grey"],
        "held_out": ["grey"],
    }
    stream, budget = {"order": "random", "chunks": 2}, {"steps_per_task": 2}
    study = made.study(grid=GRID, data=data, stream=stream, budget=budget)
    design, places = (
        Design((PIECE,), 100, {}, study),
        Places(tmp_path / "work", tmp_path / "kept", keep_runs=True),
    )
    piece = replace(
        PIECE,
        model=str(made.home / "model.json"),
        settings=("recipe.mixture={pretraining: 0.25, update: 0.5, buffer: 0.25}",),
    )
    export_base(str(made.home / "model.json"), None, places.base(piece), seed=5)
    monkeypatch.setattr(pieces, "run_programs", run_here)
    carry_out(piece, design, places)
    found = read_numbers(places.kept)
    assert len(found.points) == 3 * 7 and found.points["gm_val"].equals(found.points["gm_test"])
    assert found.made[["share", "tasks", "steps_per_task", "replicate"]].iloc[0].tolist() == [0.5, 2, 2, 0]
    assert found.made["base_sha256"].item() == hash_file(places.base(piece) / WEIGHTS_FILE)
    _check_experts(found, places.run(piece))
    carry_out(piece, design, replace(places, kept=tmp_path / "again", keep_runs=False))
    assert not places.run(piece).exists() and has(tmp_path / "again", piece)


def _check_experts(found: Numbers, out: Path) -> None:
    """Compare each number of the experts of one chain with their files."""
    rows = found.experts[found.experts["lr"] == 1e-3].set_index(["init", "t"]).sort_index()
    assert set(rows.index) == {("latest", 1), ("latest", 2), ("ema", 1), ("ema", 2)}
    plan, store = open_plan(out), open_store(out)
    chains = [one for one in plan.trajectories if one.init == one.deploy == "latest" and one.split == "test"]
    chain = next(one for one in chains if one.axes["recipe.lr"] == 1e-3)

    def weights(kind: str, fingerprint: str) -> np.ndarray:
        record = store.record(kind, fingerprint)
        assert record is not None
        tensors = load_file(record.path / WEIGHTS_FILE)
        return np.concatenate([tensors[name].astype(np.float64).reshape(-1) for name in sorted(tensors)])

    base = weights("base", chain.base)
    first, second = (weights("train", str(point.train)) for point in chain.points[1:3])
    one, two = first - base, second - first
    row = rows.loc[("latest", 2)]
    assert row["drift"] == row["distance"] == pytest.approx(np.linalg.norm(two), abs=1e-6)
    assert row["relative_drift"] == pytest.approx(row["drift"] / np.linalg.norm(first), abs=1e-6)
    assert row["task_vector_norm"] == pytest.approx(np.linalg.norm(second - base), abs=1e-6)
    assert row["cosine"] == pytest.approx(one @ two / np.linalg.norm(one) / np.linalg.norm(two), abs=1e-6)
    assert np.isnan(rows.loc[("latest", 1), "distance"])
    assert rows.loc[("ema", 2), "drift"] != rows.loc[("ema", 2), "distance"]
    assert rows.loc["latest"][["old_start", "old_middle", "new_end"]].notna().all().all()
    assert rows.loc["ema"]["old_start"].isna().all() and (rows["grad_highest"] >= rows["grad_last"]).all()


def test_base_is_made_once_and_must_be_that_of_the_finished_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    design, places = Design((PIECE,), 100, {}), Places(tmp_path / "work", tmp_path / "kept")
    called: list[tuple[str, ...]] = []

    def make(*programs: Program) -> None:
        for words in (program.words for program in programs):
            called.append(words)
            out = Path(words[words.index("--out") + 1])
            out.mkdir(parents=True)
            (out / WEIGHTS_FILE).write_bytes(b"weights")

    monkeypatch.setattr(pieces, "run_programs", make)
    for _ in range(2):
        make_bases([PIECE, replace(PIECE, name="share_10")], design, places)
    assert len(called) == 1 and called[0][-2:] == ("--seed", "100")
    others = [replace(PIECE, replicate=replicate) for replicate in (0, 1, 2, 3)]
    make_bases(others, design, places)
    assert len(called) == 1  # the first has its base, so nothing is made yet
    make_bases(others[1:], design, places)
    assert [words[-1] for words in called] == ["100", "101", "102"]  # two in the time of one
    kept = numbers(Truth(replicates=1), names=("share_00",))
    sha256 = hash_file(places.base(PIECE) / WEIGHTS_FILE)
    write(
        places.kept,
        PIECE,
        {"points": kept.points, "experts": kept.experts, "made": kept.made.assign(base_sha256=sha256)},
    )
    make_bases([PIECE], design, places)
    write(
        places.kept,
        replace(PIECE, name="share_"),
        {"points": kept.points, "experts": kept.experts, "made": kept.made},
    )
    with pytest.raises(UserError, match="the finished pieces of replicate 0 began at b0"):
        make_bases([PIECE], design, places)
