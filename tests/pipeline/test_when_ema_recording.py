"""What is kept of a piece: its scores as results.json has them, and of its experts what their weights say."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from merge_service.checkpoints import WEIGHTS_FILE
from merge_service.errors import UserError
from pipeline.artifact import hash_file
from pipeline.claims.when_ema import pieces
from pipeline.claims.when_ema.design import Design, Piece
from pipeline.claims.when_ema.numbers import write
from pipeline.claims.when_ema.pieces import Places, make_bases
from pipeline.claims.when_ema.recording import Experts, points_of
from pipeline.config import load_study
from pipeline.status import open_plan, open_store
from tests.pipeline.when_ema_toys import World as Truth
from tests.pipeline.when_ema_toys import numbers
from tests.world import World

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


@pytest.mark.ray
def test_experts_are_measured_from_where_they_began_and_from_the_one_before(undisturbed: Path) -> None:
    experts = Experts(undisturbed)
    rows = experts.frame().set_index(["init", "t"]).sort_index()
    assert set(rows.index.get_level_values("init")) == {"base", "latest", "ema"} and len(rows) == 9
    plan, store = open_plan(undisturbed), open_store(undisturbed)
    (chain,) = (one for one in plan.trajectories if one.init == one.deploy == "latest")

    def weights(kind: str, fingerprint: str) -> np.ndarray:
        record = store.record(kind, fingerprint)
        assert record is not None
        tensors = load_file(record.path / WEIGHTS_FILE)
        return np.concatenate([tensors[name].astype(np.float64).reshape(-1) for name in sorted(tensors)])

    base = weights("base", chain.base)
    first, second = (weights("train", str(point.train)) for point in chain.points[1:3])
    row = rows.loc[("latest", 2)]
    assert row["drift"] == row["distance"] == pytest.approx(np.linalg.norm(second - first))
    assert row["task_vector_norm"] == pytest.approx(np.linalg.norm(second - base))
    assert row["relative_drift"] == pytest.approx(row["drift"] / np.linalg.norm(first))
    one, two = first - base, second - first
    assert row["cosine"] == pytest.approx(one @ two / np.linalg.norm(one) / np.linalg.norm(two))
    assert np.isnan(rows.loc[("latest", 1), "distance"])
    assert rows.loc["ema"]["drift"].iloc[1] != rows.loc["ema"]["distance"].iloc[1]
    assert rows.loc["latest"][["old_start", "old_middle", "new_end"]].notna().all().all()
    assert rows.loc["ema"]["old_start"].isna().all() and (rows["grad_highest"] >= rows["grad_last"]).all()


def test_base_is_made_once_and_must_be_that_of_the_finished_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    design, places = Design((PIECE,), 100, {}), Places(tmp_path / "work", tmp_path / "kept")
    called: list[list[str]] = []

    def make(words: list[str], _: str) -> None:
        called.append(words)
        out = Path(words[words.index("--out") + 1])
        out.mkdir(parents=True)
        (out / WEIGHTS_FILE).write_bytes(b"weights")

    monkeypatch.setattr(pieces, "_call", make)
    for _ in range(2):
        make_bases([PIECE, replace(PIECE, name="share_10")], design, places)
    assert len(called) == 1 and called[0][-2:] == ["--seed", "100"]
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


def test_command_that_fails_is_told_with_what_to_do() -> None:
    with pytest.raises(UserError, match="it ended with exit code 3; give the same command again"):
        pieces._call(["-c", "raise SystemExit(3)"], "it")
