"""Experts inside one model: the golden vector, layers together, and mistakes."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from merge_service.errors import TechniqueError
from merge_service.techniques.inside import Layer, m_smoe
from tests.merge_service.statistics import golden


def layer(seed: int, experts: int = 4) -> Layer:
    rng = np.random.default_rng(seed)
    return Layer(
        rng.standard_normal((50, experts)),
        rng.standard_normal((experts, 3, 2)),
        rng.standard_normal((experts, 2, 3)),
    )


def outputs(w_in: np.ndarray, w_out: np.ndarray, x: np.ndarray) -> np.ndarray:
    return w_out @ np.maximum(w_in @ x, 0)


def test_groups_are_the_golden_vector() -> None:
    case = golden.case("m-smoe")
    (found,) = m_smoe([Layer(**load_file(golden.FOLDER / case["inputs"]))], **case["params"])
    golden.check_tensors(
        case,
        {
            "w_in": found.w_in, "w_out": found.w_out, "core": found.cores, "label": found.groups,
            "usage": found.usage,
        },
    )  # fmt: skip


def test_as_many_groups_as_experts_change_nothing() -> None:
    (found,) = m_smoe([layer(0)], 4)
    np.testing.assert_array_equal(found.w_in, layer(0).w_in[found.cores])
    assert sorted(found.cores) == [0, 1, 2, 3] and list(found.cores[found.groups]) == [0, 1, 2, 3]


def test_copies_with_neurons_in_another_order_compute_what_the_core_computes() -> None:
    one, order = layer(1, 2), [2, 0, 1]
    twin = Layer(
        one.router_logits, np.stack([one.w_in[0], one.w_in[0][order]]),
        np.stack([one.w_out[0], one.w_out[0][:, order]]),
    )  # fmt: skip
    (found,) = m_smoe([twin], 1)
    x = np.random.default_rng(3).standard_normal(2)
    np.testing.assert_allclose(
        outputs(found.w_in[0], found.w_out[0], x), outputs(one.w_in[0], one.w_out[0], x), rtol=1e-12
    )


def test_cores_are_the_most_used_of_all_layers_and_one_of_each() -> None:
    even, steep = layer(2), layer(3)
    steep = Layer(steep.router_logits * 0 + np.array([9, 0, 0, 0]), steep.w_in, steep.w_out)
    found = m_smoe([even, steep], 4)
    assert [len(one.cores) for one in found] == [3, 1] and list(found[1].cores) == [0]
    np.testing.assert_array_equal(found[1].w_in[0], steep.w_in[0])  # nobody uses the others


@pytest.mark.parametrize(
    ("layers", "groups", "words"),
    [
        ([layer(0)], 5, "5 groups for 4 experts"),
        ([layer(0), layer(1)], 1, "one for each layer"),
        ([Layer(layer(0).router_logits, layer(0).w_out, layer(0).w_out)], 2, "layer 1: router_logits"),
        ([layer(0), Layer(layer(0).router_logits * np.nan, layer(0).w_in, layer(0).w_out)], 2, "layer 2 holds NaN"),
    ],
)  # fmt: skip
def test_mistakes_are_named(layers: list[Layer], groups: int, words: str) -> None:
    with pytest.raises(TechniqueError, match=words):
        m_smoe(layers, groups)
