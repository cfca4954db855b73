"""Laws of learning (S11, S12 of the specification): gradients by differences, interruptions, starts, folds, and mistakes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import temporal_merge as tm
from merge_service.errors import UserError
from merge_service.statistics import Statistics
from tests.merge_service.statistics import golden
from tests.workers.learning import golden_runs
from workers.learning.learn import Run
from workers.learning.learn import learn as learned
from workers.learning.trimmed import trimmed
from workers.learning.wanted import METHODS, Wanted

CASE = golden.case("adamerging-learn")
BASE = golden.FOLDER / CASE["base"]
EXPERTS = golden.files(CASE, "experts")
ARRAYS = [load_file(file) for file in golden.files(CASE, "inputs")]
FEW = {"steps": 4, "batch_size": 2}


def found(method: str, params: dict, out: Path | None = None, **more):
    case = {**CASE, **more.pop("case", {})}
    return learned(
        Wanted.of(method, {**FEW, **params}), golden_runs.where(case, out, **more), golden_runs.inputs(case)
    )


def same(one, other) -> None:
    assert set(one) == set(other)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_is_the_difference_quotient(method: str) -> None:
    """Along one random direction, at values off the start."""
    wanted = Wanted.of(method, {"towers": "image"})
    with golden_runs.begun(CASE, wanted) as run:
        rng = np.random.default_rng(3)
        blend, direction = run.blend.values, {}
        for name, value in blend.items():
            value += torch.from_numpy(rng.normal(0, 0.1, value.shape)).to(value)
            direction[name] = torch.from_numpy(rng.normal(0, 1, value.shape)).to(value)
        turn = run.objective.turns(0)[0]
        run.blend.fill(0)
        slope = sum(
            float((one.double() * direction[name].double()).sum())
            for name, one in of_blend(run, turn).items()
        )
        step, sides = 2e-3, []
        for sign in (1, -2):
            for name, value in blend.items():
                value += sign * step * direction[name]
            run.blend.fill(0)
            sides.append(run.gradients(0, turn)[0])
    assert slope == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=2e-2, abs=2e-4)


def of_blend(run: Run, turn: list[int]) -> dict[str, torch.Tensor]:
    return {name: one for name, one in run.gradients(0, turn)[1].items() if name in run.blend.values}


@pytest.mark.parametrize("method", METHODS)
def test_learning_goes_on_to_the_bit_after_an_interruption(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, plain = found(method, {}, tmp_path / "whole.safetensors"), Run.step
    out = tmp_path / "cut.safetensors"

    def stop(self: Run, step: int) -> float:
        if step == 3:
            raise KeyboardInterrupt
        return plain(self, step)

    monkeypatch.setattr(Run, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        found(method, {}, out, every=2)
    assert not out.exists() and (tmp_path / "cut.learning.safetensors").exists()
    monkeypatch.undo()
    with pytest.raises(UserError, match="another learning"):
        found(method, {"seed": 1}, out)
    again = found(method, {}, out, every=2)
    same(again, whole)
    assert again.losses == whole.losses and out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir() if "learning" in path.name] == []


@pytest.mark.parametrize("method", METHODS)
def test_no_temperature_and_no_other_tower_has_coefficients(method: str) -> None:
    got = found(method, {"steps": 1})
    assert not any("logit_scale" in name for name in got)
    assert all(name.startswith(("visual.", "head:")) for name in got)


def test_both_towers_have_coefficients_where_they_are_learned() -> None:
    got = found("adamerging", {"towers": "both", "steps": 2})
    assert "token_embedding.weight" in got and "logit_scale" not in got
    assert any(got["token_embedding.weight"] != 0.3)


@pytest.mark.parametrize("params", [{}, {"granularity": "model"}], ids=str)
def test_no_steps_are_task_arithmetic_at_the_start(params: dict, tmp_path: Path) -> None:
    file, out = tmp_path / "c.safetensors", tmp_path / "a.safetensors"
    found("adamerging", {"steps": 0, **params}, file)
    tm.merge("adamerging", EXPERTS, BASE, out, any_base=True, coefficients=file)
    tm.merge(
        "task_arithmetic",
        EXPERTS,
        BASE,
        tmp_path / "b.safetensors",
        any_base=True,
        scale=0.3,
        logit_scale="base",
    )
    got, plain = load_file(out), load_file(tmp_path / "b.safetensors")
    for name in got:
        np.testing.assert_allclose(got[name], plain[name], rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("adamerging", {}),
        ("adamerging", {"granularity": "model"}),
        ("adamerging", {"trim": True, "density": 0.5}),
        ("adamerging", {"granularity": "model", "towers": "both"}),
        ("supermerge", {}),
        ("supermerge", {"granularity": "model", "start": [0.1, 0.5, -0.2]}),
        ("dam", {}),
        ("dam", {"start": 0.5}),
        ("tinting", {"granularity": "model"}),
    ],
    ids=str,
)
def test_model_that_learning_ends_with_is_the_merge(method: str, params: dict, tmp_path: Path) -> None:
    """Towers that are not learned too: what the classes were embedded by is what is merged."""
    file, out = tmp_path / "c.safetensors", tmp_path / "out.safetensors"
    got = found(method, {"steps": 2, "learning_rate": 0.1, **params}, file)
    tm.merge(METHODS[method].technique, EXPERTS, BASE, out, any_base=True, coefficients=file)
    made = load_file(out)
    with golden_runs.begun(CASE, Wanted.of(method, params)) as run:
        for name, value in run.blend.values.items():
            value.copy_(torch.from_numpy(got[name]))
        run.blend.fill(0)
        for name in made.keys() - {"logit_scale"}:
            right = run.members.parameter(name).detach().numpy()
            np.testing.assert_allclose(made[name], right, rtol=1e-5, atol=1e-6, err_msg=name)


def test_trimmed_experts_add_up_to_the_trimmed_merge(tmp_path: Path) -> None:
    file, out = tmp_path / "c.safetensors", tmp_path / "out.safetensors"
    wanted = Wanted.of("adamerging", {"trim": True, "density": 0.3, **FEW})
    got = learned(wanted, golden_runs.where(CASE, file), golden_runs.inputs(CASE))
    tm.merge("adamerging", EXPERTS, BASE, out, any_base=True, coefficients=file)
    made, base = load_file(out), load_file(BASE)
    with trimmed(wanted, BASE, EXPERTS) as files:
        parts = [load_file(one) for one in files]
    assert np.mean(parts[0]["visual.proj"] != base["visual.proj"]) < 0.9
    for name, factors in got.items():
        right = base[name] + sum(c * (one[name] - base[name]) for c, one in zip(factors, parts))
        np.testing.assert_allclose(made[name], right, rtol=1e-5, atol=1e-6, err_msg=name)


def test_loss_decreases_on_fixed_batches() -> None:
    got = found("adamerging", {"steps": 6, "batch_size": 16, "learning_rate": 1e-2})
    assert list(got.losses) == sorted(got.losses, reverse=True)


def test_expert_equal_to_the_base_leaves_the_gradients_of_others() -> None:
    with golden_runs.begun(CASE, Wanted.of("adamerging", {})) as run:
        three = run.gradients(0, [0, 1, 2])[1]
    more = {"experts": [*CASE["experts"], CASE["base"]]}
    with golden_runs.begun({**CASE, **more}, Wanted.of("adamerging", {})) as run:
        four = run.gradients(0, [0, 1, 2])[1]
    for name in three:
        np.testing.assert_array_equal(four[name][:3], three[name])
        assert four[name][3] == 0


def test_warm_start_gives_known_experts_their_coefficients(tmp_path: Path) -> None:
    first, file = found("adamerging", {}, tmp_path / "c.safetensors"), tmp_path / "c.safetensors"
    case = {"experts": [CASE["experts"][2], *CASE["experts"][:2][::-1]]}
    two = {"experts": CASE["experts"][1:]}
    other = found("adamerging", {"steps": 0}, warm_start=file, case=case)
    for name in other:
        np.testing.assert_allclose(other[name], first[name].astype(np.float32)[[2, 1, 0]], rtol=1e-6)
    fewer = found("adamerging", {"steps": 0}, tmp_path / "two.safetensors", case=two)
    grown = found("adamerging", {"steps": 0, "start": 0.1}, warm_start=tmp_path / "two.safetensors")
    assert all(np.allclose(grown[name], [0.1, 0.3, 0.3]) for name in fewer)
    with pytest.raises(UserError, match="none of these experts"):
        found("adamerging", {}, warm_start=file, case={"experts": [CASE["base"]]})


def test_fold_keeps_the_running_model_without_old_data(tmp_path: Path) -> None:
    """With images of the new task alone the old part does not move; with others' it may."""
    two = {"experts": CASE["experts"][:2], "inputs": CASE["inputs"][:1]}
    got = found("adamerging", {"fold": True}, tmp_path / "c.safetensors", case=two)
    assert all(one[0] == 1 and one[1] != 0.3 for one in got.values())
    both = found("adamerging", {"fold": True, "clamp": False}, case={**two, "inputs": CASE["inputs"][:2]})
    assert any(one[0] != 1 for one in both.values())
    with Statistics(tmp_path / "c.safetensors") as file:
        assert file.about.parameters["start"] == [1.0, 0.3]
    with pytest.raises(UserError, match="fold has two models"):
        found("adamerging", {"fold": True})


def test_tasks_weigh_by_their_classes() -> None:
    plain, weighed = (
        found("adamerging", {"steps": 1, "weigh": one}).losses[0] for one in ("equal", "classes")
    )
    assert weighed == pytest.approx(plain / np.log(3), rel=1e-6)


def test_prompts_are_embedded_by_the_merged_text_tower(tmp_path: Path) -> None:
    arrays = [{key: one[key] for key in ("images", "tokens")} for one in ARRAYS]
    got = tm.learn("adamerging", EXPERTS, arrays, base=BASE, model=golden_runs.config(CASE), steps=1)
    assert len(got.losses) == 1 and got.about.experts and got.out is None


def test_file_says_what_it_was_learned_with(tmp_path: Path) -> None:
    out = tmp_path / "c.safetensors"
    got = tm.learn(
        "adamerging",
        EXPERTS,
        ARRAYS,
        base=BASE,
        out=out,
        model=golden_runs.config(CASE),
        adapted_on="test",
        **FEW,
    )
    with Statistics(out) as file:
        about = file.about
    assert (
        about.technique == "adamerging"
        and about.losses == got.losses
        and about.parameters["adapted_on"] == "test"
    )
    assert about.parameters["learning"]["steps"] == 4 and len(about.experts) == 3
    report = tm.merge(
        "adamerging", EXPERTS, BASE, tmp_path / "m.safetensors", any_base=True, coefficients=out
    )
    assert report.params["adapted_on"] == "test" and any("test-time" in note for note in report.notes)
    with pytest.raises(UserError, match=r"trim = True, and .* was learned with False"):
        tm.merge("adamerging", EXPERTS, BASE, tmp_path / "m", any_base=True, coefficients=out, trim=True)


@pytest.mark.parametrize(
    ("method", "params", "words"),
    [
        ("adamergin", {}, "did you mean adamerging"),
        ("adamerging", {"step": 3}, "did you mean steps"),
        ("supermerge", {"clamp": True}, "has no parameter 'clamp'"),
        ("supermerge", {"adapted_on": "test"}, "learns from labels"),
        ("supermerge", {"start": 1.0}, "between -1 and 1"),
        ("adamerging", {"start": [0.3, 0.3]}, "2 entries for 3 experts"),
        ("adamerging", {"frozen": 3}, "leaves nothing to learn"),
        ("adamerging", {"steps": -1}, "steps = -1 is not a whole number"),
        ("adamerging", {"learning_rate": 0}, "above 0"),
        ("concrete", {"start": [0.1, 0.2, 0.3]}, "one number"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(method: str, params: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        found(method, params)


@pytest.mark.parametrize(
    ("method", "change", "words"),
    [
        ("adamerging", {"images": None}, r"task number 2: adamerging needs .'images'."),
        ("adamerging", {"head": None, "tokens": None}, r"needs .'tokens'. or .'head'."),
        ("supermerge", {"labels": None}, r"needs .'labels'."),
        ("supermerge", {"labels": np.array([0, 1, 2, 7])}, "not all among its 3 classes"),
        ("adamerging", {"head": np.zeros((3, 5), np.float32)}, "5 columns and the model embeds in 6"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(method: str, change: dict, words: str) -> None:
    arrays = [ARRAYS[0], {**ARRAYS[1], **change}, ARRAYS[2]]
    with pytest.raises(UserError, match=words):
        tm.learn(method, EXPERTS, arrays, base=BASE, model=golden_runs.config(CASE), **FEW)


def test_checkpoint_after_no_steps_is_refused() -> None:
    with pytest.raises(UserError, match="every = 0 is no number of steps"):
        tm.learn("adamerging", EXPERTS, ARRAYS, base=BASE, model=golden_runs.config(CASE), every=0)


def test_every_expert_needs_its_own_task_where_it_teaches() -> None:
    with pytest.raises(UserError, match="2 tasks for 3 experts"):
        tm.learn("dam", EXPERTS, ARRAYS[:2], base=BASE, model=golden_runs.config(CASE))


def test_expert_of_another_model_is_refused(tmp_path: Path) -> None:
    save_file({"visual.proj": np.zeros((2, 2), np.float32)}, tmp_path / "e.safetensors")
    with pytest.raises(UserError, match=r"e.safetensors: .* is missing"):
        tm.learn(
            "adamerging", [tmp_path / "e.safetensors"], ARRAYS, base=BASE, model=golden_runs.config(CASE)
        )
