"""Laws of measurements (S1 to S4 of the specification), forms of inputs, and mistakes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import temporal_merge as tm
from merge_service.statistics import Statistics, beside, pooled
from tests.merge_service.statistics import golden
from tests.workers.evidence.test_golden_statistics import weights_directory

CASE = golden.case("statistics-gram")
TASK = load_file(golden.FOLDER / CASE["inputs"])
IMAGES, TOKENS, LABELS, HEAD = (TASK[name] for name in ("images", "tokens", "labels", "head"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return weights_directory(CASE, tmp_path, CASE["model"])


def close(one, other, rtol: float = 1e-5, atol: float = 1e-9) -> None:
    assert set(one) == set(other)
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize(
    ("kind", "params"), [("gram", {}), ("fisher", {"labels": "expectation"}), ("kfac", {"labels": "given"})]
)
def test_two_halves_of_the_data_are_pooled_to_the_whole(
    kind: str, params: dict, model: Path, tmp_path: Path
) -> None:
    inputs = {"head": HEAD}
    for name, rows in (("a", slice(0, 1)), ("b", slice(1, 4)), ("all", slice(0, 4))):
        part = {**inputs, "images": IMAGES[rows], "labels": LABELS[rows]}
        tm.measure(kind, model, part, out=tmp_path / name, **params)
    pooled([tmp_path / "a", tmp_path / "b"], tmp_path / "both")
    close(load_file(tmp_path / "both"), load_file(tmp_path / "all"), rtol=2e-4)


def test_more_rows_than_one_pass_holds_change_nothing(model: Path) -> None:
    many = tm.measure("gram", model, {"images": np.concatenate([IMAGES] * 20)})
    close(many, tm.measure("gram", model, {"images": IMAGES}), atol=1e-6)


def test_gram_is_symmetric_positive_and_its_trace_is_the_mean_squared_norm(model: Path) -> None:
    found = tm.measure("gram", model, {"images": IMAGES, "tokens": TOKENS})
    for name, gram in found.items():
        if gram.ndim == 2:
            np.testing.assert_array_equal(gram, gram.T, err_msg=name)
            assert np.linalg.eigvalsh(gram).min() > -1e-5 * np.trace(gram), name
    patches = IMAGES.reshape(4, 3, 2, 4, 2, 4)
    np.testing.assert_allclose(np.trace(found["visual.conv1.weight"]), (patches**2).sum() / 16, rtol=1e-5)


def test_padding_does_not_count(model: Path) -> None:
    short = TOKENS[1:2, :3]
    assert short.argmax() == 2
    close(tm.measure("gram", model, {"tokens": short}), tm.measure("gram", model, {"tokens": TOKENS[1:2]}))


def test_fisher_of_one_class_is_zero_and_never_negative(model: Path) -> None:
    one = tm.measure("fisher", model, {"images": IMAGES, "head": HEAD[:1]}, labels="expectation")
    assert all(not value.any() for value in one.values())
    some = tm.measure("fisher", model, {"images": IMAGES, "tokens": TOKENS})
    assert all((value >= 0).all() for value in some.values()) and some["logit_scale"] > 0


def test_sampled_labels_follow_the_seed_and_come_near_the_expectation(model: Path) -> None:
    inputs = {"images": np.concatenate([IMAGES] * 50), "head": HEAD}
    first, again, other = (tm.measure("fisher", model, inputs, seed=seed) for seed in (0, 0, 1))
    name = "visual.proj"
    np.testing.assert_array_equal(first[name], again[name])
    assert (first[name] != other[name]).any()
    exact = tm.measure("fisher", model, inputs, labels="expectation")[name]
    np.testing.assert_allclose(first[name].sum(), exact.sum(), rtol=0.3)


def test_gradient_is_the_mean_size_over_examples(model: Path) -> None:
    inputs = {"images": IMAGES, "labels": LABELS, "head": HEAD}
    single = [
        tm.measure(
            "gradient", model, {"images": IMAGES[i : i + 1], "labels": LABELS[i : i + 1], "head": HEAD}
        )
        for i in range(4)
    ]
    found = tm.measure("gradient", model, inputs)
    np.testing.assert_allclose(
        found["visual.proj"], np.mean([one["visual.proj"] for one in single], axis=0), rtol=1e-5
    )


def test_pictures_are_normalised_as_the_configuration_says(model: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    mean, std = (
        np.array(v) for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    floats = ((pictures / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
    close(
        tm.measure("gram", model, {"images": pictures}),
        tm.measure("gram", model, {"images": floats}),
        rtol=1e-4,
    )


def test_bf16_comes_near_and_torch_inputs_are_taken(model: Path) -> None:
    inputs = {"images": torch.from_numpy(IMAGES), "tokens": torch.from_numpy(TOKENS)}
    exact, coarse = (tm.measure("gram", model, inputs, precision=how) for how in ("fp32", "bf16"))
    for name in exact:
        assert np.abs(coarse[name] - exact[name]).max() <= 0.05 * np.abs(exact[name]).max(), name


def test_a_file_is_recognised_by_the_merge_and_found_beside_it(tmp_path: Path) -> None:
    experts = [weights_directory(CASE, tmp_path, f"nano.expert{number}.safetensors") for number in (1, 2)]
    for expert in experts:
        tm.measure("gram", expert, {"images": IMAGES, "tokens": TOKENS}, out=beside(expert, "gram"))
    base, out = golden.FOLDER / "nano.base.safetensors", tmp_path / "merged.safetensors"
    report = tm.merge("regmean", experts, base, out, any_base=True, off_diagonal=0.95)
    assert not any("statistics" in note and "do not say" in note for note in report.notes)
    states = [load_file(expert / "open_clip_model.safetensors") for expert in experts]
    files = [beside(expert, "gram") for expert in experts]
    merged = tm.merge("regmean", states, load_file(base), statistics=files, any_base=True, off_diagonal=0.95)
    for name, value in load_file(out).items():
        np.testing.assert_array_equal(merged[name], value, err_msg=name)
    with pytest.raises(tm.UserError, match="other weights"):
        tm.merge("regmean", experts, base, out, any_base=True, statistics=files[::-1])


def test_weights_that_give_nan_are_refused(model: Path) -> None:
    file = model / "open_clip_model.safetensors"
    weights = load_file(file)
    weights["visual.proj"][0, 0] = np.nan
    save_file(weights, file)
    with pytest.raises(tm.UserError, match="NaN"):
        tm.measure("fisher", model, {"images": IMAGES, "head": HEAD})


@pytest.mark.parametrize(
    ("kind", "inputs", "params", "words"),
    [
        ("grams", {"images": IMAGES}, {}, "did you mean gram"),
        ("gram", {"image": IMAGES}, {}, "did you mean images"),
        ("gram", {}, {}, "needs inputs"),
        ("gram", {"images": IMAGES[..., :4]}, {}, "8 x 4 and the model takes 8 x 8"),
        ("gram", {"images": IMAGES.transpose(0, 2, 3, 1)}, {}, r"floats \[N, 3, H, W\]"),
        ("gram", {"tokens": TOKENS + 4}, {}, "the model has 0 to 11"),
        ("fisher", {"images": IMAGES}, {}, "needs inputs.'head'."),
        ("fisher", {"images": IMAGES, "head": HEAD[:, :4]}, {}, "4 columns and the model embeds in 6"),
        ("fisher", {"images": IMAGES, "head": HEAD}, {"labels": "given"}, "needs inputs.'labels'."),
        ("fisher", {"images": IMAGES, "head": HEAD}, {"labels": "all"}, "labels = 'all' is none of"),
        ("fisher", {"images": IMAGES, "head": HEAD}, {"label": "given"}, "did you mean labels"),
        ("gradient", {"images": IMAGES, "head": HEAD, "labels": LABELS + 2}, {}, "there are 3 classes"),
        ("gram", {"images": IMAGES}, {"examples": 0}, "examples = 0"),
        ("gram", {"images": IMAGES}, {"seed": "a"}, "seed = 'a' is not a whole number"),
        ("gram", {"images": IMAGES[:0]}, {}, "images.*not empty"),
        ("gram", {"images": IMAGES, "tokens": TOKENS[:0]}, {}, "tokens.*not empty"),
        ("gram", {"images": IMAGES}, {"labels": "given"}, "gram has no parameter 'labels'"),
        ("fisher", {"images": IMAGES, "head": HEAD}, {"scope": "all"}, "fisher has no parameter 'scope'"),
        (
            "gradient",
            {"images": IMAGES, "head": HEAD, "labels": LABELS},
            {"labels": "sample"},
            "takes the true labels",
        ),
    ],
)
def test_mistakes_are_named(kind, inputs, params, words, model: Path) -> None:
    with pytest.raises(tm.UserError, match=words):
        tm.measure(kind, model, inputs, **params)


@pytest.mark.parametrize("whole", [True, False])
def test_the_checkpoint_is_never_written_over(whole: bool, model: Path) -> None:
    file = model / "open_clip_model.safetensors"
    before = file.read_bytes()
    with pytest.raises(tm.UserError, match="one of the inputs and would be lost"):
        tm.measure("gram", model if whole else file, {"images": IMAGES}, out=file)
    assert file.read_bytes() == before


def test_statistics_are_files_one_for_each_expert(model: Path, tmp_path: Path) -> None:
    found = tm.measure("gram", model, {"images": IMAGES}, out=tmp_path / "one.safetensors")
    for given in (found, tmp_path / "one.safetensors", [found]):
        with pytest.raises(tm.UserError, match="statistics is a list of files"):
            tm.merge("regmean", [model], model, tmp_path / "out", statistics=given)
    with pytest.raises(tm.UserError, match="would be lost"):
        tm.merge(
            "regmean", [model], model, tmp_path / "one.safetensors", statistics=[tmp_path / "one.safetensors"]
        )


def test_examples_are_drawn_by_seed(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "g.safetensors"
    found = tm.measure("gram", model, {"images": IMAGES}, examples=2, seed=3, out=out)
    assert found.about.examples == 2 and found.rows["visual.proj"] == 2
    with Statistics(out) as file:
        assert file.about == found.about and file.about.parameters["seed"] == 3


def test_scope_blocks_keeps_the_matrices_of_blocks(model: Path) -> None:
    found = tm.measure("gram", model, {"images": IMAGES}, scope="blocks")
    whole = tm.measure("gram", model, {"images": IMAGES})
    assert len(found) == len(found.rows) == 8 and all(
        ".resblocks." in name and one.ndim == 2 for name, one in found.items()
    )
    close(found, {name: whole[name] for name in found})
