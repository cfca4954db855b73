"""Cosine and sign conflict of task vectors, against the definitions on whole arrays."""

from pathlib import Path

import numpy as np
import pytest

from merge_service.errors import CheckpointError, IncompatibleCheckpoint
from merge_service.similarity import similarity
from tests.merge_service.toys import load, save, towers


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A base and three experts; `same` moved like `one`, `against` in the opposite direction."""
    rng = np.random.default_rng(0)
    base = towers(rng)
    steps = {
        name: rng.normal(size=value.shape).astype(value.dtype)
        for name, value in base.items()
        if value.dtype.kind == "f"
    }
    models = {"base": base}
    for name, factor in (("one", 1.0), ("same", 2.0), ("against", -1.0)):
        models[name] = {
            key: (value + factor * steps[key]).astype(value.dtype) if key in steps else value
            for key, value in base.items()
        }
    models["other"] = towers(np.random.default_rng(1))
    models["other"] |= {key: value for key, value in base.items() if value.dtype.kind != "f"}
    return {name: save(tmp_path / f"{name}.safetensors", model) for name, model in models.items()}


def experts(files: dict[str, Path], *names: str) -> dict[str, Path]:
    return {name: files[name] for name in names}


def vectors(files: dict[str, Path], names: list[str], prefix: str = "") -> np.ndarray:
    base = load(files["base"])
    keys = [key for key, value in base.items() if value.dtype.kind == "f" and key.startswith(prefix)]
    return np.array(
        [np.concatenate([(load(files[n])[k].astype(float) - base[k]).ravel() for k in keys]) for n in names]
    )


def test_expert_that_went_the_same_way_has_cosine_one_and_the_opposite_minus_one(files: dict) -> None:
    found = similarity(files["base"], experts(files, "one", "same", "against"))
    assert np.allclose(found.cosine(), [[1, 1, -1], [1, 1, -1], [-1, -1, 1]], atol=1e-5)
    assert np.allclose(found.conflict(), [[0, 0, 1], [0, 0, 1], [1, 1, 0]])
    assert {(clash.one, clash.other) for clash in found.clashes()} == {
        ("one", "against"),
        ("same", "against"),
    }


@pytest.mark.parametrize(
    ("tower", "layer", "prefix"),
    [(None, None, ""), ("image", None, "visual."), ("image", 0, "visual.transformer.resblocks.0.")],
)
def test_part_of_a_model_agrees_with_whole_arrays(files: dict, tower: str, layer: int, prefix: str) -> None:
    names = ["one", "other", "against"]
    found = similarity(files["base"], experts(files, *names))
    deltas = vectors(files, names, prefix)
    norms = np.linalg.norm(deltas, axis=1)
    assert np.allclose(found.cosine(tower, layer), deltas @ deltas.T / np.outer(norms, norms), atol=1e-12)
    strong = np.concatenate([moved(files, names, part) for part in ("image", "text")], axis=1)
    strong = strong[
        :, [name.startswith(prefix) for part in ("image", "text") for name in elements(files, part)]
    ]
    for i in range(len(names)):
        for j in range(len(names)):
            both = (strong[i] != 0) & (strong[j] != 0)
            share = np.mean(strong[i][both] != strong[j][both])
            assert found.conflict(tower, layer)[i, j] == pytest.approx(share)


def elements(files: dict[str, Path], part: str) -> list[str]:
    """The name of the tensor of every element of a tower."""
    base = load(files["base"])
    image = {key: value for key, value in base.items() if value.dtype.kind == "f" and key.startswith("visual.") == (part == "image")}  # fmt: skip
    return [key for key, value in image.items() for _ in range(value.size)]


def moved(files: dict[str, Path], names: list[str], part: str) -> np.ndarray:
    """Signs of a tower's task vectors where they are longer than their root mean square, else 0."""
    base, keys = load(files["base"]), dict.fromkeys(elements(files, part))
    taus = np.array(
        [np.concatenate([(load(files[n])[k].astype(float) - base[k]).ravel() for k in keys]) for n in names]
    )
    least = np.sqrt(np.mean(taus**2, axis=1, keepdims=True))
    return np.where(np.abs(taus) > least, np.sign(taus), 0)


def test_weights_that_only_decayed_do_not_count_as_agreement(tmp_path: Path) -> None:
    base = save(tmp_path / "base.safetensors", {"w": np.ones(100, np.float32)})
    decayed = np.full(100, 0.99, np.float32)
    one, other = decayed.copy(), decayed.copy()
    one[:2], other[:2] = 2.0, (2.0, 0.0)
    files = {
        "one": save(tmp_path / "one.safetensors", {"w": one}),
        "other": save(tmp_path / "other.safetensors", {"w": other}),
    }
    assert similarity(base, files).conflict()[0, 1] == 0.5


def test_expert_that_did_not_move_has_no_cosine(files: dict) -> None:
    found = similarity(files["base"], {"one": files["one"], "still": files["base"]})
    assert np.isnan(found.cosine()[0, 1]) and np.isnan(found.conflict()[0, 1])
    assert found.clashes() == []


def test_single_expert_is_refused(files: dict) -> None:
    with pytest.raises(CheckpointError, match="at least two"):
        similarity(files["base"], experts(files, "one"))


def test_expert_of_another_architecture_is_refused_by_name(files: dict, tmp_path: Path) -> None:
    odd = save(tmp_path / "odd.safetensors", {"weight": np.zeros(3, np.float32)})
    with pytest.raises(IncompatibleCheckpoint, match="expert odd"):
        similarity(files["base"], {"one": files["one"], "odd": odd})
