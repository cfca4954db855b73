"""One weight per expert in sums, elections and means: against plain formulas, by tensor, as a stream, and refused where wrong."""

from pathlib import Path

import numpy as np
import pytest

from merge_service import techniques
from merge_service.errors import TechniqueError
from merge_service.merge import advance, merge
from tests.merge_service import measured, toys

LEAST = {
    name: one.low
    for name in techniques.names()
    for one in techniques.get(name).params
    if one.name == "weights"
}
WEIGHED = [name for name, low in LEAST.items() if low is None]
"""Techniques whose weights are factors of task vectors; those of the others are weights of a mean."""
MEANS = [name for name in LEAST if name not in WEIGHED]
WEIGHTS = [0.5, -1.0, 2.0]


@pytest.fixture
def room(tmp_path: Path) -> tuple[Path, list[Path], dict, list[dict]]:
    rng = np.random.default_rng(3)
    base = toys.towers(rng)
    experts = [toys.moved(rng, base, spread=64) for _ in range(3)]
    paths = [toys.save(tmp_path / f"e{i}.safetensors", one) for i, one in enumerate(experts)]
    return toys.save(tmp_path / "base.safetensors", base), paths, base, experts


def merged(room, name: str, out: Path, **params) -> dict[str, np.ndarray]:
    for path in room[1]:
        measured.of_technique(name, path)
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
    assert same(plain, ones)
    streams(name, room, tmp_path, WEIGHTS)


@pytest.mark.parametrize("name", MEANS)
def test_equal_weights_of_a_mean_give_the_bytes_of_none_and_a_stream_is_the_merge(
    name, room, tmp_path: Path
) -> None:
    plain = merged(room, name, tmp_path / "o.safetensors")
    for given in (
        {"weights": [0.1] * 3},
        {"weights": [3] * 3},
        {"coefficients": {"visual.*": [0.7] * 3, "*": [2] * 3}},
    ):
        assert same(plain, merged(room, name, tmp_path / "o.safetensors", **given)), given
    streams(name, room, tmp_path, [0.25, 0, 2.0])


@pytest.mark.parametrize("name", LEAST)
def test_weights_by_tensor_are_those_weights_in_each_tensor(name: str, room, tmp_path: Path) -> None:
    first, second = [0.5, 0.0, 2.0], [1.0, 3.0, 0.25]
    found = merged(room, name, tmp_path / "o.safetensors", coefficients={"visual.*": first, "*": second})
    image, text = (merged(room, name, tmp_path / "o.safetensors", weights=one) for one in (first, second))
    assert not same(image, text)
    assert same(found, {key: (image if key.startswith("visual.") else text)[key] for key in found})


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return {key: value.tobytes() for key, value in one.items()} == {
        key: value.tobytes() for key, value in other.items()
    }


def streams(name: str, room, tmp_path: Path, weights: list[float]) -> None:
    """The stream writes the bytes of the merge, where there is one."""
    merged(room, name, tmp_path / "batch.safetensors", weights=weights)
    if "stream" not in techniques.get(name).forms:
        return
    state = None
    for number, path in enumerate(room[1]):
        after = tmp_path / f"s{number}.safetensors"
        advance(
            name, {"weights": weights[: number + 1]}, room[0], path, tmp_path / "stream.safetensors",
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


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("average", {"coefficients": {"visual.*": [1, 1, 1]}}, "no pattern for"),
        ("average", {"coefficients": {"*": [0, 0, 0]}}, "coefficients of '\\*' has no weight above zero"),
        ("fisher", {"coefficients": {"*": [1, -1, 1]}}, "not a list of numbers by pattern of: 0 <= x"),
        (
            "regmean",
            {"coefficients": {"*": [1, 1, 1]}, "schedule": "linear"},
            "give coefficients or schedule, not both",
        ),
        (
            "wudi",
            {"weights": [1, 2, 3], "solver": "adam"},
            "steps of solver adam depend on the size of its loss",
        ),
        ("sce", {"density": [0.1, 0.2, 0.3]}, "one for all experts, because positions are selected"),
    ],
)
def test_weights_that_a_technique_has_no_place_for_are_refused(
    name, params, words, room, tmp_path: Path
) -> None:
    with pytest.raises(TechniqueError, match=words):
        merged(room, name, tmp_path / "o.safetensors", **params)


def test_every_technique_has_weights_in_both_forms_or_says_why_not() -> None:
    for name in techniques.names():
        row = techniques.get(name)
        has = {one.name for one in row.params} & {"weights", "coefficients"}
        assert has == (set() if row.unweighed else {"weights", "coefficients"}), name
        if row.unweighed:
            with pytest.raises(
                TechniqueError, match=f"{name} has no weights of experts: .*; leave weights out"
            ):
                row.param("weights")


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
    equal = merged(room, name, tmp_path / "same.safetensors", density=[0.5, 0.5, 0.5], **extra)
    assert same(one, equal)
    densities = [0.25, 0.5, 0.75]
    other = merged(room, name, tmp_path / "batch.safetensors", density=densities, **extra)
    assert not same(one, other)
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
