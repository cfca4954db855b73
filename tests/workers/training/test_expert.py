"""One expert: its result, resuming with the same bits, and jobs that are refused."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

import workers.training.expert as training
from merge_service.errors import IncompatibleCheckpoint, NonFiniteCheckpoint, UserError
from tests.workers.model_helpers import Toys, sha256, write_config
from workers.jobs import EngineSpec, TrainJob
from workers.models.model import export_base, load
from workers.training.checkpoints import MARKER, OWNER, Checkpoints, Due, Progress, Superseded
from workers.training.engines.protocol import Report
from workers.training.expert import ExpertError, train_expert


class Stop(Exception):
    """Stands for a crash at a named point."""


def stop_at(step: int) -> Callable[[int], None]:
    def hook(done: int) -> None:
        if done == step:
            raise Stop

    return hook


@pytest.fixture(scope="module")
def golden(toys: Toys, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The sha256 of an expert that nobody disturbed."""
    job = toys.job(tmp_path_factory.mktemp("golden") / "expert", replay=True)
    train_expert(job)
    return sha256(job.out)


def test_expert_learns_and_its_weights_open_in_open_clip(toys: Toys, out: Path) -> None:
    job = toys.job(out, steps=25)
    result = train_expert(job)
    assert (result["steps"], result["samples"], result["resumed_from"]) == (25, 25 * 16, None)
    first, last = result["loss"][0], result["loss"][-1]
    assert first[0] == 1 and last[0] == 25 and last[1] < first[1] - 0.3
    assert result["lr"][1] == 1e-3 and result["samples_per_second"] > 0
    assert len(result["system"]["cpu_utilization_percentage"]) == len(result["system"]["time_ms"]) > 0
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{job.out}")
    base = load(toys.base).state_dict()
    squares = [((t.double() - base[name].double()) ** 2).sum() for name, t in model.state_dict().items()]
    assert result["task_vector_norm"] == pytest.approx(math.sqrt(sum(squares)), rel=1e-9)
    progress = json.loads((Path(job.scratch) / "progress.json").read_text())
    assert (progress["step"], progress["steps"]) == (25, 25) and progress["rate"] > 0


def test_drift_is_from_where_training_began_and_the_task_vector_from_the_base(
    toys: Toys, tmp_path: Path
) -> None:
    first, second = toys.job(tmp_path / "first"), toys.job(tmp_path / "second", every=2)
    one = train_expert(first)
    assert one["drift"] == one["task_vector_norm"] > 0
    length = math.sqrt(sum((t.double() ** 2).sum() for t in load(toys.base).state_dict().values()))
    assert one["relative_drift"] == pytest.approx(one["drift"] / length, rel=1e-9)
    job = replace(second, init=first.out, seed=12)
    with pytest.raises(Stop):
        train_expert(job, hooks={"train.after_step": stop_at(5)})
    two = train_expert(job)
    states = [load(Path(at)).state_dict() for at in (first.out, job.out)]
    squares = [((t.double() - states[0][name].double()) ** 2).sum() for name, t in states[1].items()]
    assert two["drift"] == pytest.approx(math.sqrt(sum(squares)), rel=1e-9)
    assert two["drift"] != two["task_vector_norm"]
    whole = train_expert(replace(job, out=toys.job(tmp_path / "third").out, scratch=str(tmp_path / "s")))
    assert two["resumed_from"] == 4 and two["grad_norm"] == whole["grad_norm"]
    assert 0 < two["grad_norm"][2] <= two["grad_norm"][1]


def test_same_job_gives_the_same_bytes_and_another_seed_does_not(toys: Toys, out: Path, golden: str) -> None:
    torch.manual_seed(4711)
    job = toys.job(out, replay=True)
    train_expert(job)
    assert sha256(job.out) == golden
    train_expert(replace(job, seed=12))
    assert sha256(job.out) != golden


@pytest.mark.fault("F1")
@pytest.mark.parametrize(
    ("point", "step", "resumes"),
    [
        ("train.start", 0, None),
        ("train.after_step", 1, None),
        ("train.after_ckpt", 2, 2),
        ("train.after_step", 3, 2),
        ("train.after_step", 6, 4),
        ("train.before_commit", 6, 4),
    ],
)
def test_expert_stopped_anywhere_ends_in_the_same_bytes(
    toys: Toys, out: Path, golden: str, point: str, step: int, resumes: int | None
) -> None:
    job = toys.job(out, every=2, replay=True)
    with pytest.raises(Stop):
        train_expert(job, hooks={point: stop_at(step)})
    result = train_expert(job)
    assert sha256(job.out) == golden and result["resumed_from"] == resumes
    assert [number for number, _ in result["loss"]] == [1, 2, 3, 4, 5, 6]


def damage(checkpoint: Path, how: str) -> None:
    if how == "flipped byte":
        file = checkpoint / "engine.safetensors"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif how == "no marker":
        (checkpoint / MARKER).unlink()
    elif how == "torn marker":
        (checkpoint / MARKER).write_text((checkpoint / MARKER).read_text()[:40])
    elif how == "lost file":
        (checkpoint / "engine.json").unlink()
    else:
        marker = json.loads((checkpoint / MARKER).read_text())
        (checkpoint / MARKER).write_text(json.dumps(marker | {"fingerprint": "another job"}))


@pytest.mark.fault("F15", "F34")
@pytest.mark.parametrize("how", ["flipped byte", "no marker", "torn marker", "lost file", "another job"])
def test_damaged_or_foreign_checkpoint_is_never_used(toys: Toys, out: Path, golden: str, how: str) -> None:
    job = toys.job(out, every=2, replay=True)
    with pytest.raises(Stop):
        train_expert(job, hooks={"train.after_step": stop_at(5)})
    (checkpoint,) = (Path(job.scratch) / "checkpoints").iterdir()
    older = checkpoint.with_name(
        "step-000000002"
    )  # as if the newest had been damaged while the one before still stood
    shutil.copytree(checkpoint, older)
    marker = json.loads((older / MARKER).read_text())
    (older / MARKER).write_text(json.dumps(marker | {"fingerprint": "older job"}))
    damage(checkpoint, how)
    assert train_expert(job)["resumed_from"] is None
    assert sha256(job.out) == golden


@pytest.mark.fault("F34")
def test_only_the_newest_checkpoint_is_kept_and_leftovers_go(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "f")
    checkpoints.claim()
    for step in (10, 20):
        checkpoints.stage(step)
        (checkpoints.staged(step) / "x").write_text("x")
        if step == 10:
            checkpoints.stage(15)
        checkpoints.complete(step, {"curve": [step]})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000020"]
    assert checkpoints.newest() == 20 and checkpoints.judged(20)[1] == {"curve": [20]}
    assert Checkpoints(tmp_path, "g").newest() == 0


def test_progress_is_written_about_once_a_second(tmp_path: Path) -> None:
    now = [0.0]
    progress = Progress(tmp_path, 100, clock=lambda: now[0])
    written = []
    for step in range(1, 31):
        now[0] = step * 0.25
        progress.tell(step, step * 8, 1.0)
        written.append(json.loads((tmp_path / "progress.json").read_text())["step"])
    assert sorted(set(written)) == [1, 5, 9, 13, 17, 21, 25, 29]
    assert json.loads((tmp_path / "progress.json").read_text())["rate"] == 32.0


class Fake:
    """An engine that does nothing, with whatever reports a test wants."""

    def __init__(self, loss: Callable[[int], float], norm: Callable[[int], float] = lambda step: 1.0) -> None:
        self.done, self._loss, self._norm = 0, loss, norm

    def step(self, *_: Any) -> Report:
        self.done += 1
        return Report(torch.tensor([self._loss(self.done), self._norm(self.done)]), 1e-5)

    def save(self, directory: Path) -> Callable[[], None]:
        return lambda: None

    def weights(self) -> dict[str, torch.Tensor]:
        return {}

    def close(self) -> None:
        pass


def with_fake(monkeypatch: pytest.MonkeyPatch, fake: Fake) -> None:
    monkeypatch.setattr(training, "make_engine", lambda *_: fake)
    monkeypatch.setattr(training, "feed", lambda shares, pixels, device, steps, loaders: ((step, ()) for step in steps))  # fmt: skip


def test_loss_curve_of_a_long_expert_has_at_most_two_hundred_points(
    toys: Toys, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_fake(monkeypatch, Fake(float))
    monkeypatch.setattr(training, "_hand_over", lambda *_: {})
    curve = train_expert(toys.job(out, steps=1001))["loss"]
    assert len(curve) <= 200 and curve[0] == [6, 3.5] and curve[-1][0] == 1001


@pytest.mark.fault("F17")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_names_task_t_and_step(
    toys: Toys, out: Path, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    with_fake(monkeypatch, Fake(lambda step: bad if step == 5 else 1.0))
    with pytest.raises(
        ExpertError, match=r"task 'toy' \(t=3\): the loss is (nan|inf) at step 5 of 6, lr 1e-05"
    ) as caught:
        train_expert(toys.job(out))
    assert isinstance(caught.value, UserError) and not list(Path(out / "weights").iterdir())


@pytest.mark.fault("F17")
def test_gradient_that_is_not_finite_stops_the_expert_unless_half_precision_skips_it(
    toys: Toys, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_hand_over", lambda *_: {})
    for precision in ("fp32", "fp16"):
        with_fake(monkeypatch, Fake(lambda _: 1.0, lambda step: float("inf") if step == 2 else 1.0))
        job = toys.job(out, precision=precision)
        if precision == "fp16":
            assert train_expert(job)["steps"] == 6
        else:
            with pytest.raises(ExpertError, match="gradient norm is inf at step 2"):
                train_expert(job)


@pytest.mark.fault("F17")
def test_half_precision_that_skips_every_step_is_stopped(
    toys: Toys, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_fake(monkeypatch, Fake(lambda _: 1.0, lambda _: float("nan")))
    with pytest.raises(ExpertError, match="gradient norm is nan at step 41 of 60"):
        train_expert(toys.job(out, steps=60, precision="fp16"))


@pytest.mark.fault("F17")
def test_expert_with_weights_that_are_not_finite_is_refused(
    toys: Toys, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake(lambda _: 1.0)
    state = load(toys.base).state_dict()
    state["text_projection"][0, 0] = float("nan")
    monkeypatch.setattr(fake, "weights", lambda: state)
    with_fake(monkeypatch, fake)
    with pytest.raises(NonFiniteCheckpoint, match=r"expert of task 'toy' \(t=3\).*text_projection has 1 of"):
        train_expert(toys.job(out))


@pytest.mark.fault("F18")
def test_expert_of_another_architecture_than_the_base_is_refused(
    toys: Toys, out: Path, tmp_path: Path
) -> None:
    other = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    export_base(str(write_config(tmp_path / "cfg", vision_cfg=other)), None, tmp_path / "base")
    with pytest.raises(IncompatibleCheckpoint, match=r"expert of task 'toy'.*visual.transformer.resblocks.1"):
        train_expert(replace(toys.job(out, steps=1), base=str(tmp_path / "base")))


@pytest.mark.fault("F25")
@pytest.mark.parametrize(
    ("changes", "world", "says"),
    [
        ({"steps": 0}, 1, "the budget gives 0 steps"),
        (
            {"engine": EngineSpec(world=3)},
            3,
            "batch_size 16 cannot be shared evenly by 3 workers; 15 or 18 can",
        ),
    ],
)
def test_job_that_cannot_run_is_refused_before_training(
    toys: Toys, out: Path, changes: dict[str, Any], world: int, says: str
) -> None:
    with pytest.raises(ExpertError, match=says):
        train_expert(replace(toys.job(out), **changes), world=world)


def test_hooks_fire_in_order_and_unknown_points_are_our_own_mistake(toys: Toys, out: Path) -> None:
    fired: list[tuple[str, int]] = []
    hooks = {point: (lambda step, point=point: fired.append((point, step))) for point in training.POINTS}
    train_expert(toys.job(out, steps=2, every=1), hooks=hooks)
    assert fired == [
        ("train.start", 0), ("train.after_step", 1), ("train.after_ckpt", 1), ("train.after_step", 2),
        ("train.before_commit", 2),
    ]  # fmt: skip
    with pytest.raises(AssertionError, match="unknown fault points"):
        train_expert(toys.job(out, steps=2), hooks={"train.typo": print})


def test_number_of_threads_is_the_jobs_during_training_and_restored_after(toys: Toys, out: Path) -> None:
    seen = []
    before = torch.get_num_threads()
    job = replace(toys.job(out, steps=1), engine=EngineSpec(threads=2))
    train_expert(job, hooks={"train.start": lambda _: seen.append(torch.get_num_threads())})
    assert seen == [2] and torch.get_num_threads() == before


def test_checkpoint_by_the_clock_comes_about_on_time_at_any_pace(toys: Toys, out: Path) -> None:
    job = replace(toys.job(out), checkpoint_every=3, checkpoint_seconds=10.0)
    looks: list[int] = []
    for pace in (0.1, 1.0, 4.0, 30.0):  # seconds a step
        now = [0.0]
        due = Due(job, 7, lambda ahead: looks.append(ahead) or ahead, clock=lambda now=now: now[0])
        written = []
        for step in range(8, 408):
            now[0] += pace
            written += [now[0]] if due(step) else []
        gaps = [after - before for before, after in zip([0.0, *written], written, strict=False)]
        assert len(gaps) > 3 and all(abs(gap - max(10, pace)) <= pace + 1e-9 for gap in gaps)
    assert len(looks) < 1300, "ranks would have to agree too often"
    steps = Due(replace(job, checkpoint_seconds=0.0), 0, int)
    assert [step for step in range(1, 10) if steps(step)] == [3, 6, 9]


@pytest.mark.fault("F4")
def test_late_process_of_a_job_that_was_ended_meanwhile_leaves_no_trace(tmp_path: Path) -> None:
    """Its driver was killed, another finished the job and removed scratch; it was training or saving all the while."""
    late = Checkpoints(tmp_path, "f")
    late.claim()
    late.stage(2)
    (tmp_path / OWNER).unlink()
    with pytest.raises(Superseded):
        late.complete(2, {})
    with pytest.raises(Superseded):
        late.stage(4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault("F4")
def test_late_process_leaves_what_the_new_owner_of_its_job_is_writing(tmp_path: Path) -> None:
    late, owner = Checkpoints(tmp_path, "f"), Checkpoints(tmp_path, "f")
    late.claim()
    owner.claim()
    owner.stage(2)
    with pytest.raises(Superseded):
        late.stage(2)
    owner.complete(2, {"curve": []})
    assert owner.newest() == 2


@pytest.mark.parametrize(("point", "step"), [("train.after_step", 3), ("train.after_ckpt", 4)])
def test_expert_on_pools_as_they_are_stored_ends_in_the_same_bytes(
    toys: Toys, tmp_path: Path, point: str, step: int
) -> None:
    """400 samples and batches of 16: both stops are in the middle of an epoch."""

    def job(name: str) -> TrainJob:
        asked = toys.job(tmp_path / name, every=2, replay=True)
        sources = {
            part: tuple(replace(source, reading="encoded") for source in getattr(asked, part))
            for part in ("update", "buffer", "pretraining")
        }
        return replace(asked, **sources)

    whole, stopped = job("whole"), job("stopped")
    train_expert(whole)
    with pytest.raises(Stop):
        train_expert(stopped, hooks={point: stop_at(step)})
    assert train_expert(stopped)["resumed_from"] in (2, 4)
    assert sha256(stopped.out) == sha256(whole.out)
