"""An expert that was trained from the base is accepted for any training method; one that cannot have been is refused."""

from pathlib import Path

import numpy as np
import pytest

from merge_service.checkpoints import Checkpoint, sha256_of
from merge_service.checkpoints.relation import ratios
from merge_service.errors import UnrelatedCheckpoint
from merge_service.merge import advance, fold, merge
from merge_service.merging import Rules
from tests.merge_service import toys

Tensors = dict[str, np.ndarray]


def model(rng: np.random.Generator, layers: int = 4, width: int = 16) -> Tensors:
    made = {"zero": np.zeros((width, width), np.float32), "scale": toys.vector(1.0)}
    for i in range(layers):
        made[f"blocks.{i}.attn.weight"] = rng.normal(size=(width, width)).astype(np.float32)
        made[f"blocks.{i}.up.weight"] = rng.normal(size=(4 * width, width)).astype(np.float32)
        made[f"blocks.{i}.down.weight"] = rng.normal(size=(width, 4 * width)).astype(np.float32)
    return made


def tuned(rng: np.random.Generator, base: Tensors, far: float = 0.05) -> Tensors:
    return {n: (v + far * rng.normal(size=v.shape)).astype(np.float32) for n, v in base.items()}


def permuted(rng: np.random.Generator, base: Tensors) -> Tensors:
    """The same function, with the hidden units of every MLP in another order."""
    made = dict(base)
    for name in [name for name in base if name.endswith("up.weight")]:
        order = rng.permutation(len(base[name]))
        made[name], down = base[name][order], name.replace("up", "down")
        made[down] = base[down][:, order]
    return made


@pytest.fixture
def kin(tmp_path: Path) -> dict[str, Path]:
    rng = np.random.default_rng(0)
    base = model(rng)
    made = {
        "base": base,
        "tuned": tuned(rng, base),
        "other": tuned(rng, base, 0.1),
        "stranger": model(rng),
        "permuted": permuted(rng, tuned(rng, base)),
        "farther": tuned(rng, base, 0.45),
    }
    return {name: toys.save(tmp_path / f"{name}.safetensors", one) for name, one in made.items()}


@pytest.mark.parametrize("who", ["stranger", "permuted"])
@pytest.mark.parametrize("technique", ["average", "task_arithmetic", "opcm"])
def test_expert_of_another_base_is_refused_unless_it_is_meant(
    who: str, technique: str, kin: dict[str, Path], tmp_path: Path
) -> None:
    experts, out = [kin["tuned"], kin[who]], tmp_path / "m.safetensors"
    with pytest.raises(
        UnrelatedCheckpoint, match=rf"{who}\.safetensors.*was not trained from the base.*base\.safet"
    ) as caught:
        merge(technique, {}, kin["base"], experts, out)
    assert "--any-base" in str(caught.value) and "0.5" in str(caught.value) and not out.exists()
    merge(technique, {}, kin["base"], experts, out, rules=Rules(any_base=True))


def test_fine_tuned_experts_are_taken_and_strangers_measured(kin: dict[str, Path], tmp_path: Path) -> None:
    merge("ties", {}, kin["base"], [kin["tuned"], kin["other"], kin["farther"]], tmp_path / "m.safetensors")
    with Checkpoint.open(kin["base"]) as base, Checkpoint.open(kin["stranger"]) as stranger:
        found = ratios(base, stranger)
    assert len(found) == 12 and np.median(found) == pytest.approx(2**0.5, rel=0.1)


def test_without_a_base_experts_are_held_against_the_first(kin: dict[str, Path], tmp_path: Path) -> None:
    merge("average", {}, None, [kin["tuned"], kin["other"]], tmp_path / "m.safetensors")
    with pytest.raises(UnrelatedCheckpoint, match="the base of the first expert"):
        merge("average", {}, None, [kin["tuned"], kin["stranger"]], tmp_path / "m.safetensors")


def test_stream_and_fold_refuse_a_stranger_and_a_fold_takes_the_running_model_of_merges(
    kin: dict[str, Path], tmp_path: Path
) -> None:
    base, out = kin["base"], tmp_path / "m.safetensors"
    given = {"expert_id": "s", "state_in": None, "state_out": tmp_path / "s.safetensors"}
    with pytest.raises(UnrelatedCheckpoint, match=r"^s \("):
        advance("ties", {}, base, kin["stranger"], out, **given)  # type: ignore[arg-type]
    for running, new in (("stranger", "tuned"), ("tuned", "stranger")):
        with pytest.raises(UnrelatedCheckpoint):
            fold("average", {}, base, kin[running], kin[new], out)
    far = tmp_path / "far.safetensors"
    fold("task_arithmetic", {"scale": 30.0}, base, kin["tuned"], kin["other"], far)
    fold("average", {}, base, far, kin["other"], out)


def test_matrices_that_are_next_to_zero_in_the_base_do_not_count(
    kin: dict[str, Path], tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    base, expert = toys.load(kin["base"]), toys.load(kin["tuned"])
    for i in range(8):  # adapters and zero convolutions, saved after their first steps
        base[f"adapters.{i}.up"] = (1e-4 * rng.normal(size=(8, 16))).astype(np.float32)
        expert[f"adapters.{i}.up"] = rng.normal(size=(8, 16)).astype(np.float32)
    begun, trained = (
        toys.save(tmp_path / f"{n}.safetensors", one) for n, one in (("b", base), ("e", expert))
    )
    merge("task_arithmetic", {}, begun, [trained], tmp_path / "m.safetensors")
    faint = toys.save(tmp_path / "f.safetensors", {n: v * np.float32(1e-9) for n, v in base.items()})
    with pytest.raises(UnrelatedCheckpoint):  # next to zero throughout is another model
        merge("task_arithmetic", {}, faint, [trained], tmp_path / "m.safetensors")


def test_a_merge_step_of_a_study_refuses_a_stranger_unless_its_job_takes_any(
    kin: dict[str, Path], tmp_path: Path
) -> None:
    from merge_service.checkpoints import WEIGHTS_FILE
    from merge_service.merging import Member, MergeJob
    from merge_service.service import Merger

    def member(name: str, who: str) -> Member:
        folder = tmp_path / f"{who}-directory"
        folder.mkdir(exist_ok=True)
        (folder / WEIGHTS_FILE).write_bytes(kin[who].read_bytes())
        (folder / "open_clip_config.json").write_text("{}")
        return Member(name, folder, sha256_of(folder))

    base, merger = member("base", "base"), Merger()
    for form, members in {
        "merge": (member("t1", "tuned"), member("t2", "permuted")),
        "fold": (member("running-1", "tuned"), member("t2", "stranger")),
    }.items():
        for taken in (False, True, False):
            job = MergeJob(
                "t2",
                "average",
                {},
                form,
                base,
                members,
                1,
                str(tmp_path / "s"),
                str(tmp_path / "l"),
                None,
                taken,
            )
            if taken:
                merger.merge(job, tmp_path / form)
            else:
                with pytest.raises(UnrelatedCheckpoint, match=r"^t2 \("):
                    merger.merge(job, tmp_path / form)
