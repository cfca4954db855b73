"""One weight per expert in sums and elections of task vectors: against plain formulas, as a stream, and refused where wrong."""

from pathlib import Path

import numpy as np
import pytest

from merge_service import techniques
from merge_service.errors import TechniqueError
from merge_service.merge import advance, merge
from tests.merge_service import toys

WEIGHED = [
    name
    for name in techniques.names()
    if any(one.name == "weights" and one.quiet for one in techniques.get(name).params)
]
WEIGHTS = [0.5, -1.0, 2.0]


@pytest.fixture
def room(tmp_path: Path) -> tuple[Path, list[Path], dict, list[dict]]:
    rng = np.random.default_rng(3)
    base = toys.towers(rng)
    experts = [toys.moved(rng, base, spread=64) for _ in range(3)]
    paths = [toys.save(tmp_path / f"e{i}.safetensors", one) for i, one in enumerate(experts)]
    return toys.save(tmp_path / "base.safetensors", base), paths, base, experts


def merged(room, name: str, out: Path, **params) -> dict[str, np.ndarray]:
    merge(name, params, room[0], room[1], out, ids=["a", "b", "c"])
    return toys.load(out)


def test_sums_and_elections_have_weights() -> None:
    assert {"task_arithmetic", "dare", "ties", "dare_ties", "breadcrumbs", "della", "lines_ties"} <= set(
        WEIGHED
    )


def test_weights_of_a_sum_multiply_task_vectors(room, tmp_path: Path) -> None:
    found = merged(room, "task_arithmetic", tmp_path / "o.safetensors", scale=0.5, weights=WEIGHTS)
    _, _, base, experts = room
    for name in (n for n, v in base.items() if v.dtype == np.float32 and n != "logit_scale"):
        sum_of = sum(w * (e[name].astype(float) - base[name]) for w, e in zip(WEIGHTS, experts))
        np.testing.assert_allclose(found[name], base[name] + 0.5 * sum_of, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("consensus", ["mean", "sum", "max"])
def test_weights_of_an_election_vote_and_divide(consensus: str, room, tmp_path: Path) -> None:
    params = {"density": 1.0, "granularity": "tensor", "consensus": consensus, "weights": [0.5, 1.0, 2.0]}
    found = merged(room, "ties", tmp_path / "o.safetensors", **params)
    _, _, base, experts = room
    weights = np.array([0.5, 1.0, 2.0])
    for name in (n for n, v in base.items() if v.dtype == np.float32 and v.ndim == 2):
        taus = np.array([w * (e[name].astype(float) - base[name]) for w, e in zip(weights, experts)])
        sign = np.sign(taus.sum(0))
        agree = (np.sign(taus) == sign) & (sign != 0)
        share = (agree * weights[:, None, None]).sum(0)
        some = {
            "mean": (taus * agree).sum(0) / np.where(share, share, 1),
            "sum": (taus * agree).sum(0),
            "max": sign * np.abs(taus * agree).max(0),
        }[consensus]
        settled = sign != 0
        np.testing.assert_allclose(
            (found[name] - base[name])[settled], some[settled], atol=2e-6, err_msg=name
        )


@pytest.mark.parametrize("name", WEIGHED)
def test_ones_change_nothing_and_a_stream_is_the_merge(name: str, room, tmp_path: Path) -> None:
    plain, ones = (
        merged(room, name, tmp_path / "o.safetensors", **given) for given in ({}, {"weights": [1, 1, 1]})
    )
    for tensor, value in plain.items():
        np.testing.assert_allclose(ones[tensor], value, atol=2e-6, err_msg=tensor)
    merged(room, name, tmp_path / "batch.safetensors", weights=WEIGHTS)
    state = None
    for number, path in enumerate(room[1]):
        after = tmp_path / f"s{number}.safetensors"
        advance(
            name, {"weights": WEIGHTS[: number + 1]}, room[0], path, tmp_path / "stream.safetensors",
            expert_id="abc"[number], state_in=state, state_out=after,
        )  # fmt: skip
        state = after
    assert (tmp_path / "stream.safetensors").read_bytes() == (tmp_path / "batch.safetensors").read_bytes()


def test_weights_of_another_number_are_refused_and_none_leave_no_trace(room, tmp_path: Path) -> None:
    with pytest.raises(TechniqueError, match="2 entries but there are 3 experts"):
        merged(room, "ties", tmp_path / "o.safetensors", weights=[1, 2])
    assert "weights" not in techniques.get("ties").resolve({}, "merge")
    assert "weights" not in techniques.get("ties").resolve({"weights": None}, "merge")


TABLE = {
    "visual.*": [1.0, 0.0, 0.5],
    "visual.transformer.resblocks.0.*": [0.0, 0.0, 0.0],
    "*": [0.3, 0.3, 0.3],
}


def test_coefficients_are_found_by_name_then_by_the_longest_pattern(room, tmp_path: Path) -> None:
    exact = {**TABLE, "visual.ln_pre.bias": [0.0, 1.0, 0.0]}
    found = merged(room, "task_arithmetic", tmp_path / "o.safetensors", scale=1.0, coefficients=exact)
    _, _, base, experts = room
    for name, row in (
        ("visual.transformer.resblocks.1.mlp.weight", TABLE["visual.*"]),
        ("visual.transformer.resblocks.0.mlp.weight", [0, 0, 0]),
        ("visual.ln_pre.bias", [0, 1, 0]),
        ("text_projection", TABLE["*"]),
    ):
        sum_of = sum(c * (e[name].astype(float) - base[name]) for c, e in zip(row, experts))
        np.testing.assert_allclose(found[name], base[name] + sum_of, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (
            {"coefficients": {"visual.*": [1, 1, 1]}},
            "no pattern for text_projection and 4 more|no pattern for",
        ),
        (
            {"coefficients": {"*": [1, 1, 1], "visaul.*": [0, 0, 0]}},
            "the pattern 'visaul.\\*' of coefficients fits no tensor",
        ),
        ({"coefficients": {"*": [1, 1]}}, "coefficients of '\\*' has 2 entries but there are 3"),
        ({"coefficients": {"*": [1, 1, 1]}, "weights": [1, 1, 1]}, "weights or coefficients, not both"),
        ({"coefficients": [1, 1, 1]}, "not a list of numbers by pattern"),
        ({"coefficients": {"*": "abc"}}, "not a list of numbers by pattern"),
    ],
)
def test_coefficients_that_do_not_fit_are_refused(params, words, room, tmp_path: Path) -> None:
    with pytest.raises(TechniqueError, match=words):
        merged(room, "ties", tmp_path / "o.safetensors", **params)


def test_coefficients_have_no_stream(room, tmp_path: Path) -> None:
    with pytest.raises(TechniqueError, match="no stream form"):
        advance(
            "ties", {"coefficients": {"*": [1]}}, room[0], room[1][0], None, expert_id="a", state_in=None,
            state_out=tmp_path / "s",
        )  # fmt: skip


DENSE = [
    name
    for name in techniques.names()
    if any(one.name == "density" and one.each for one in techniques.get(name).params)
]


@pytest.mark.parametrize("name", DENSE)
def test_density_of_each_expert(name: str, room, tmp_path: Path) -> None:
    """Equal densities give the bytes of one; other ones thin each expert as alone; a stream, if there is one, is the merge."""
    extra = (
        {"outliers": 0.0} if "breadcrumbs" in name else {"epsilon": 0.1} if name.startswith("della") else {}
    )
    one = merged(room, name, tmp_path / "one.safetensors", density=0.5, **extra)
    same = merged(room, name, tmp_path / "same.safetensors", density=[0.5, 0.5, 0.5], **extra)
    assert {key: value.tobytes() for key, value in one.items()} == {
        key: value.tobytes() for key, value in same.items()
    }
    densities = [0.25, 0.5, 0.75]
    other = merged(room, name, tmp_path / "batch.safetensors", density=densities, **extra)
    assert any(other[key].tobytes() != value.tobytes() for key, value in one.items())
    with pytest.raises(TechniqueError, match="2 entries but there are 3 experts"):
        merged(room, name, tmp_path / "o.safetensors", density=[0.5, 0.5], **extra)
    if "stream" not in techniques.get(name).forms:
        return
    state = None
    for number, path in enumerate(room[1]):
        after = tmp_path / f"s{number}.safetensors"
        advance(
            name, {"density": densities[: number + 1], **extra}, room[0], path, tmp_path / "stream.safetensors",
            expert_id="abc"[number], state_in=state, state_out=after,
        )  # fmt: skip
        state = after
    assert (tmp_path / "stream.safetensors").read_bytes() == (tmp_path / "batch.safetensors").read_bytes()


def test_sums_with_densities_add_each_expert_thinned_by_its_own(room, tmp_path: Path) -> None:
    params = {"outliers": 0.0, "granularity": "tensor", "scale": 1.0}
    found = merged(room, "breadcrumbs", tmp_path / "all.safetensors", density=[0.25, 0.5, 0.75], **params)
    start, paths, base, _ = room
    alone = []
    for density, path in zip([0.25, 0.5, 0.75], paths):
        merge(
            "breadcrumbs",
            {**params, "density": density},
            start,
            [path],
            tmp_path / "o.safetensors",
            ids=["a"],
        )
        alone.append(toys.load(tmp_path / "o.safetensors"))
    for name in (n for n, v in base.items() if v.dtype == np.float32 and v.ndim == 2):
        sum_of = sum(one[name].astype(float) - base[name] for one in alone)
        np.testing.assert_allclose(found[name], base[name] + sum_of, atol=1e-5, err_msg=name)
