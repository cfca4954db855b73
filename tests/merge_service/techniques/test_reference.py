"""Every technique and form compared with an independent, plain implementation, on models with all special tensors."""

from pathlib import Path

import numpy as np
import pytest

from merge_service import techniques
from merge_service.merge import fold, merge
from tests.merge_service import measured, toys
from tests.merge_service import plain_extra as plain

ELECT = {"consensus": ["mean", "sum", "max"], "granularity": ["model", "tower", "tensor"]}
VARIANTS = {
    "average": {
        "schedule": ["uniform", "linear", "sqrt", "quadratic", "cubic", "exp", "log"],
        "weights": [[3, 0, 1]],
    },
    "slerp": {"weight": [0.25, 0.5]},
    "task_arithmetic": {"scale": [0.25, -1]},
    "ties": {**ELECT, "density": [0.2, 0.5, 1], "scale": [0.5], "count_frozen": [False]},
    "dare_ties": {**ELECT, "density": [0.3, 1], "seed": [7], "rescale": ["l1"], "trim": [0.2, 0.5]},
    "breadcrumbs_ties": {**ELECT, "density": [0.2, 0.6, 0.9], "outliers": [0, 0.1], "count_frozen": [False]},
    "magmax": {"scale": [0.5]},
    "lines_task_arithmetic": {
        "lines_alpha": [0.25],
        "lines_beta": [0.75],
        "lines_shape": ["quadratic", "sqrt"],
    },
    "lines_ties": {"density": [0.5], "lines_beta": [0.25]},
    "lines_dare_ties": {"density": [0.5], "lines_alpha": [1]},
    "lines_breadcrumbs_ties": {"density": [0.5], "outliers": [0.05]},
    "nuslerp": {"weight": [0.25], "space": ["task_vectors"]},
    "multislerp": {"weights": [[3, 0, 1]], "space": ["task_vectors"]},
    "karcher": {"weights": [[3, 1, 1]], "space": ["task_vectors"], "iterations": [2], "tolerance": [0.1]},
    "model_stock": {"ratio": ["raw"]},
    "iso_c": {"scale": [0.5], "attention": ["whole"], "text_projection": ["mean"]},
    "iso_cts": {"common_fraction": [0.3, 1], "attention": ["whole"], "text_projection": ["mean"]},
    "svc_task_arithmetic": {
        "alpha": [0.5, 2],
        "scale": [1],
        "scope": ["matrices"],
        "attention": ["whole"],
    },
    "opcm": {"alpha": [0.2, 1], "attention": ["whole"]},
    "rapf": {"floor": [0, 0.3, 1], "attention": ["whole"]},
    "breadcrumbs": {
        "granularity": ["model", "tower", "tensor"],
        "density": [0.05, 0.5, 0.994],
        "outliers": [0, 0.2],
    },
    "dare": {"density": [0.3, 1], "rescale": ["l1"], "seed": [3], "scale": [1]},
    "della": {**ELECT, "density": [0.7, 1], "epsilon": [0, 0.4], "rescale": ["l1"], "seed": [3]},
    "della_linear": {"density": [0.3, 1], "epsilon": [0, 0.4], "rescale": ["l1"], "scale": [1]},
    "sce": {"density": [0.3, 1], "erase_unselected": [False], "scale": [0.5]},
    "ram": {"threshold": [0, 0.1, 0.125], "scale": [0.5]},
    "nearswap": {"threshold": [0, 0.1, 0.125]},
    "random_mix": {"seed": [4], "scale": [0.5]},
    "consensus": {"tall_lambda": [0, 0.6], "min_tasks": [0, 1, 3, 4], "scale": [1]},
    "pcb": {
        "density": [0.3, 1],
        "winsorize": [0, 0.1],
        "inter_balance": ["pairs"],
        "granularity": ["model", "tensor"],
    },
    "wise_ft": {"weight": [0, 0.25, 1]},
}
TOGETHER = [
    ("dare_ties", {"trim": 0.2, "rescale": "l1"}),
    ("dare_ties", {"trim": 0.3, "granularity": "tensor", "density": 0.9}),
    ("sce", {"density": 0.3, "erase_unselected": False}),
    ("pcb", {"inter_balance": "pairs", "density": 0.4, "granularity": "tensor"}),
]
CASES = [
    *TOGETHER,
    *((name, {}) for name in VARIANTS),
    *(
        (name, {param: value})
        for name, params in VARIANTS.items()
        for param, values in params.items()
        for value in values
    ),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory):
    """A base and three experts with ties in magnitude, exact cancellations and a frozen tensor."""
    room = tmp_path_factory.mktemp("models")
    rng = np.random.default_rng(3)
    base = toys.towers(rng)
    frozen = ("visual.ln_pre.bias", "token_embedding.weight")
    experts = [toys.moved(rng, base, spread=5, frozen=frozen) for _ in range(3)]
    paths = [toys.save(room / f"{i}.safetensors", model) for i, model in enumerate([base, *experts])]
    return base, experts, paths


def agree(out: Path, expected: dict, base: dict) -> None:
    result = toys.load(out)
    for name, value in expected.items():
        np.testing.assert_allclose(result[name], value, rtol=2e-7, atol=2e-6, err_msg=name)
    for name in base.keys() - expected.keys():
        np.testing.assert_array_equal(result[name], base[name], err_msg=name)


def test_every_technique_is_covered() -> None:
    assert set(VARIANTS) | measured.BY_GOLDEN == set(techniques.names())


@pytest.mark.parametrize(("name", "params"), CASES, ids=str)
def test_merge_agrees_with_the_plain_implementation(models, name: str, params: dict, tmp_path: Path) -> None:
    base, experts, paths = models
    count = techniques.get(name).arity or 3
    ids = [f"t{i}" for i in range(1, count + 1)]
    report = merge(name, params, paths[0], paths[1 : count + 1], tmp_path / "out.safetensors", ids=ids)
    expected = plain.merge(name, report.params, base, experts[:count], ids)
    agree(tmp_path / "out.safetensors", expected, base)
    moved = np.concatenate([(expected[n] - base[n]).ravel() for n in expected])
    assert report.merged_norm == pytest.approx(float(np.linalg.norm(moved)), rel=1e-5)


@pytest.mark.parametrize("name", [n for n in VARIANTS if "fold" in techniques.get(n).forms])
def test_fold_agrees_with_the_plain_implementation_of_two(models, name: str, tmp_path: Path) -> None:
    base, experts, paths = models
    running, ids, before = paths[0], ("running", "new"), base
    for number, expert in enumerate(experts, 1):
        out = tmp_path / f"{number}.safetensors"
        report = fold(name, {}, paths[0], running, paths[number], out, ids=ids)
        agree(out, plain.merge(name, report.params, base, [before, expert], list(ids)), base)
        running, before = out, toys.load(out)


def test_merge_without_a_base_takes_integers_from_the_last_and_form_from_the_first(
    models, tmp_path: Path
) -> None:
    _, experts, paths = models
    last = experts[1] | {"position_ids": np.arange(6, 12)}
    other = toys.save(tmp_path / "last.safetensors", last)
    merge("average", {}, None, [paths[1], other], tmp_path / "out.safetensors")
    result = toys.load(tmp_path / "out.safetensors")
    np.testing.assert_array_equal(result["position_ids"], np.arange(6, 12))
    np.testing.assert_array_equal(result["visual.ln_pre.bias"], experts[0]["visual.ln_pre.bias"])
    assert list(result) == list(experts[0])
