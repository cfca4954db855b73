"""Removing an expert from a streaming state, or replacing it: exact where the arithmetic is, refused where it is not possible."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from merge_service.checkpoints import sha256_of
from merge_service.engine.stream_state import StreamState
from merge_service.errors import IncompatibleCheckpoint, TechniqueError
from merge_service.merge import MergeReport, advance, merge, replace, retract
from tests.merge_service import toys

IDS = ("a", "b", "c", "d")


class Stream:
    """A base, four experts, and the state of a technique after all of them."""

    def __init__(self, room: Path, *, dyadic: bool = True) -> None:
        rng = np.random.default_rng(3)
        self.room, base = room, toys.towers(rng)
        self.base = toys.save(room / "base.safetensors", base)
        self.paths = {}
        for name in IDS:
            model = toys.moved(rng, base, spread=4)
            if not dyadic:
                model = {
                    n: v if v.dtype != np.float32 else v + rng.standard_normal(v.shape).astype(v.dtype)
                    for n, v in model.items()
                }
            self.paths[name] = toys.save(room / f"{name}.safetensors", model)
        self.sha256 = {name: sha256_of(path) for name, path in self.paths.items()}
        self.out = room / "out.safetensors"

    def state(
        self, technique: str, params: dict[str, Any], ids: tuple[str, ...] = IDS, **options: Any
    ) -> Path:
        state = None
        for name in ids:
            target = self.room / f"state-{''.join(ids)}-{name}.safetensors"
            advance(technique, params, self.base, self.paths[name], None, expert_id=name, state_in=state, state_out=target,
                    **{"sha256": self.sha256} | options)  # fmt: skip
            state = target
        assert state is not None
        return state

    def retract(
        self, technique: str, params: dict[str, Any], name: str, state: Path, **options: Any
    ) -> MergeReport:
        given = {"expert_id": name, "state_in": state, "state_out": self.room / "left.safetensors"} | options
        return retract(technique, params, self.base, self.paths[name], self.out, **given)

    def merged(self, technique: str, params: dict[str, Any], ids: tuple[str, ...]) -> Path:
        out = self.room / "expected.safetensors"
        merge(technique, params, self.base, [self.paths[i] for i in ids], out, ids=ids, sha256=self.sha256)
        return out


@pytest.fixture
def stream(tmp_path: Path) -> Stream:
    return Stream(tmp_path)


def others(name: str) -> tuple[str, ...]:
    return tuple(one for one in IDS if one != name)


EXACT = [
    ("task_arithmetic", {"scale": 0.5}),
    ("ties", {"density": 0.5}),
    ("ties", {"density": 0.3, "consensus": "sum", "granularity": "tensor"}),
    ("ties", {"density": 1}),
    ("breadcrumbs_ties", {"density": 0.6, "outliers": 0.1, "count_frozen": False}),
    ("dare_ties", {"density": 0.5, "seed": 4}),
    ("lines_ties", {"density": 0.5}),
    ("lines_task_arithmetic", {}),
]


@pytest.mark.parametrize("name", ["a", "c", "d"])
@pytest.mark.parametrize(("technique", "params"), EXACT)
def test_dyadic_experts_without_one_are_merged_to_the_byte(
    stream: Stream, technique: str, params: dict, name: str
) -> None:
    report = stream.retract(technique, params, name, stream.state(technique, params))
    assert stream.out.read_bytes() == stream.merged(technique, params, others(name)).read_bytes()
    assert report.experts == 3 and report.notes == ()
    assert (stream.room / "left.safetensors").read_bytes() == stream.state(
        technique, params, others(name)
    ).read_bytes()


@pytest.mark.parametrize(("name", "weights"), [("d", [1, 1, 2, 4]), ("b", [4, 4, 8, 0]), ("a", [0, 1, 1, 2])])
def test_weighted_mean_of_dyadic_experts_loses_one_exactly(stream: Stream, name: str, weights: list) -> None:
    report = stream.retract(
        "average", {"weights": weights}, name, stream.state("average", {"weights": weights})
    )
    left = [weight for one, weight in zip(IDS, weights) if one != name]
    expected = toys.load(stream.merged("average", {"weights": left}, others(name)))
    for tensor, value in toys.load(stream.out).items():
        np.testing.assert_allclose(value, expected[tensor], rtol=0, atol=0 if name != "b" else 1e-6)
    assert report.params["weights"] == left and toys.made(stream.out)["params"]["weights"] == left


MEANS = [
    ("average", {}, IDS),
    ("average", {"schedule": "linear"}, ("d",)),
    ("average", {"schedule": "exp"}, ("d",)),
]


@pytest.mark.parametrize(
    ("technique", "params", "names"), [*MEANS, *((t, p, ("a", "d")) for t, p in EXACT if p != {"density": 1})]
)
def test_other_numbers_are_as_without_the_expert_up_to_rounding(
    tmp_path: Path, technique: str, params: dict, names: tuple[str, ...]
) -> None:
    stream = Stream(tmp_path, dyadic=False)
    state = stream.state(technique, params)
    for name in names:
        stream.retract(technique, params, name, state)
        expected = toys.load(stream.merged(technique, params, others(name)))
        for tensor, value in toys.load(stream.out).items():
            np.testing.assert_allclose(
                value, expected[tensor], rtol=2e-6, atol=4e-6, err_msg=f"{name} {tensor}"
            )


def test_side_without_votes_is_exactly_zero_whatever_was_rounded(tmp_path: Path) -> None:
    def save(name: str, values: list[float]) -> Path:
        return toys.save(tmp_path / f"{name}.safetensors", {"w": toys.vector(values)})

    base, state, out = save("base", [0, 0]), tmp_path / "s.safetensors", tmp_path / "o.safetensors"
    paths = [save("one", [0.1, -0.1]), save("two", [0.7, -0.7]), save("three", [-1e-9, 1e-9])]
    for number, path in enumerate(paths):
        advance("ties", {"density": 1}, base, path, None, expert_id=path.stem,
                state_in=state if number else None, state_out=state)  # fmt: skip
    for path in paths[:2]:
        report = retract(
            "ties", {"density": 1}, base, path, out, expert_id=path.stem, state_in=state, state_out=state
        )
    np.testing.assert_array_equal(toys.load(out)["w"], toys.load(paths[2])["w"])
    assert "does not record its sha256" in report.notes[0]
    assert toys.load(state)["plus:w"].tolist() == [0, toys.vector([1e-9])[0]]


def test_going_on_after_a_retraction_equals_never_having_seen_the_expert(stream: Stream) -> None:
    params = {"density": 0.5}
    state = stream.state("ties", params, IDS[:3])
    stream.retract("ties", params, "b", state)
    advance("ties", params, stream.base, stream.paths["d"], stream.out, expert_id="d",
            state_in=stream.room / "left.safetensors", state_out=state, sha256=stream.sha256)  # fmt: skip
    assert stream.out.read_bytes() == stream.merged("ties", params, ("a", "c", "d")).read_bytes()


def test_replaced_expert_is_the_newest_of_the_merge(stream: Stream) -> None:
    params, state = {"density": 0.5}, stream.state("ties", {"density": 0.5}, IDS[:3])
    target = stream.room / "replaced.safetensors"
    replace("ties", params, stream.base, stream.paths["b"], stream.paths["d"], stream.out, expert_id="b",
            state_in=state, state_out=target, sha256={"b": stream.sha256["d"]})  # fmt: skip
    expected = stream.room / "e.safetensors"
    merge("ties", params, stream.base, [stream.paths[i] for i in "acd"], expected, ids=["a", "c", "b"],
          sha256=stream.sha256 | {"b": stream.sha256["d"]})  # fmt: skip
    assert stream.out.read_bytes() == expected.read_bytes()
    assert not [path for path in stream.room.iterdir() if path.name.endswith(".tmp")]


def test_replaced_expert_keeps_its_explicit_weight(stream: Stream) -> None:
    params = {"weights": [1, 2, 1, 8]}
    state = stream.state("average", params, IDS[:3])
    report = replace("average", params, stream.base, stream.paths["b"], stream.paths["d"], stream.out, expert_id="b",
                     state_in=state, state_out=state)  # fmt: skip
    assert report.params["weights"] == [1, 1, 2, 8] and toys.made(stream.out)["params"]["weights"] == [
        1,
        1,
        2,
    ]
    merge(
        "average",
        {"weights": [1, 1, 2]},
        stream.base,
        [stream.paths[i] for i in "acd"],
        stream.room / "e.safetensors",
    )
    for tensor, value in toys.load(stream.room / "e.safetensors").items():
        np.testing.assert_allclose(toys.load(stream.out)[tensor], value, rtol=0, atol=1e-6)


REFUSED = [
    ("magmax", {}, {}, "magmax: an expert cannot be taken out"),
    ("ties", {"consensus": "max"}, {}, "ties with consensus max: an expert cannot be taken out"),
    ("average", {"schedule": "linear"}, {}, "only the newest can be taken out"),
    ("average", {"weights": [0, 1, 0, 0]}, {}, "no expert that stays has a weight above zero"),
    ("ties", {}, {"expert_id": "bb"}, "the expert 'bb' is not in .*it holds a, b, c, d"),
    ("ties", {}, {"sha256": {"b": "00"}}, "is not the expert 'b'"),
]


@pytest.mark.parametrize(("technique", "params", "options", "says"), REFUSED)
def test_what_cannot_be_taken_out_is_refused_and_nothing_is_written(
    stream: Stream, technique: str, params: dict, options: dict, says: str
) -> None:
    state = stream.state(technique, params)
    before = {path: path.read_bytes() for path in stream.room.iterdir()}
    with pytest.raises(TechniqueError, match=says):
        stream.retract(technique, params, "b", state, **options)
    assert {path: path.read_bytes() for path in stream.room.iterdir()} == before


def test_other_bytes_than_went_in_are_refused_by_their_own_hash(stream: Stream) -> None:
    state = stream.state("ties", {})
    stream.paths["b"] = stream.paths["c"]
    with pytest.raises(TechniqueError, match=f"{stream.sha256['b']} went in"):
        stream.retract("ties", {}, "b", state)


def test_other_parameters_base_or_shape_and_the_last_expert_are_refused(stream: Stream) -> None:
    state = stream.state("ties", {"density": 0.5})
    with pytest.raises(TechniqueError, match="another params"):
        stream.retract("ties", {"density": 0.4}, "b", state)
    with pytest.raises(TechniqueError, match="another technique"):
        stream.retract("dare_ties", {"density": 0.5}, "b", state)
    with pytest.raises(TechniqueError, match="the only expert"):
        stream.retract("ties", {"density": 0.5}, "a", stream.state("ties", {"density": 0.5}, ("a",)))
    stream.paths["b"] = toys.save(stream.room / "small.safetensors", {"w": toys.vector([1])})
    with pytest.raises(IncompatibleCheckpoint):
        stream.retract("ties", {"density": 0.5}, "b", state, sha256={"b": stream.sha256["b"]})
    stream.base = stream.paths["c"]
    with pytest.raises(TechniqueError, match="another base"):
        stream.retract("ties", {"density": 0.5}, "b", state)


def test_state_alone_can_be_reduced(stream: Stream) -> None:
    state = stream.state("task_arithmetic", {})
    retract(
        "task_arithmetic",
        {},
        stream.base,
        stream.paths["a"],
        None,
        expert_id="a",
        state_in=state,
        state_out=state,
    )
    assert not stream.out.exists()
    with StreamState(state) as opened:
        assert [entry["id"] for entry in opened.inputs] == ["b", "c", "d"]
