"""With `parity: fomo_in_flux` our merges are those of the authors' definitions (`authors.py`), on random weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from merge_service import merge as engine
from merge_service.errors import TechniqueError
from merge_service.merging import Rules
from merge_service.techniques import get, names
from merge_service.timelines import Base, Expert, Merged, Strategy, translate, translate_merge
from merge_service.timelines import time as timeline
from merge_service.timelines.parity import TECHNIQUES
from tests.merge_service import authors, toys

THEIRS = "fomo_in_flux"
TASKS = 5
ANY = Rules(any_base=True)
"""Random weights are no fine-tuned experts."""
SEEDS = (0, 1, 2)
LINES = (0.5, 0.5, "linear")
CRUMBS = {"top": 0.01}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "average": ("interpolation", {}),
    "slerp": ("slerp", {}),
    "task_arithmetic": ("task_arithmetic", {}),
    "ties": ("ties", {}),
    "breadcrumbs_ties": ("breadcrumbs_ties", CRUMBS),
    "magmax": ("magmax", {}),
    "lines_task_arithmetic": ("task_arithmetic", {"lines": LINES}),
    "lines_ties": ("ties", {"lines": LINES}),
    "lines_breadcrumbs_ties": ("breadcrumbs_ties", {**CRUMBS, "lines": LINES}),
    "model_stock": ("model_stock", {}),
    "consensus": ("tall_masks", {}),
}
RANDOM = ("dare_ties", "lines_dare_ties", "random_mix")
PAIRS = ("slerp", "model_stock")
SET: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("average", {"weight": 0.9}, {"coefficients": [0.9, 0.1]}),
    ("slerp", {"weight": 0.9}, {"t": 0.9}),
    ("task_arithmetic", {"scale": 0.1}, {"scale": 0.1}),
    ("ties", {"density": 0.2, "consensus": "max", "scale": 0.3}, {"prune": 0.8, "function": "max", "scale": 0.3}),
    ("ties", {"consensus": "sum"}, {"function": "sum"}),
    ("breadcrumbs_ties", {"outliers": 0.05}, {"top": 0.05}),
    ("breadcrumbs_ties", {"density": 0.4}, {"prune": 0.59}),
    ("magmax", {"scale": 0.5}, {"scale": 0.5}),
    ("lines_ties", {"lines_alpha": 0.2, "lines_shape": "quadratic"}, {"lines": (0.2, 0.5, "quadratic")}),
    ("lines_task_arithmetic", {"lines_shape": "sqrt"}, {"lines": (0.5, 0.5, "sqrt")}),
    ("consensus", {"min_tasks": 2, "tall_lambda": 0.6}, {"threshold": 2, "lambda": 0.6}),
]  # fmt: skip
"""What a person sets, in our words, and the same in theirs."""


def clip(rng: np.random.Generator, spread: float = 1.0) -> dict[str, np.ndarray]:
    """Random floats under the names of a CLIP whose image tower is the deeper one."""
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (5, 8), "text_projection": (8, 6), "logit_scale": (), "visual.proj": (12, 6),
        "visual.conv1.weight": (12, 3, 4, 4), "visual.ln_post.bias": (15,), "token_embedding.weight": (21, 8),
    }  # fmt: skip
    for tower, width, depth in (("visual.", 12, 4), ("", 8, 3)):
        for block in range(depth):
            room = f"{tower}transformer.resblocks.{block}"
            shapes |= {
                f"{room}.attn.in_proj_weight": (3 * width, width),
                f"{room}.mlp.c_fc.bias": (4 * width,),
            }
    return {
        name: np.float32(spread) * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()
    }


class World:
    """A base and five experts, in memory and as files; task vectors are as long as the weights, so that arcs are arcs."""

    def __init__(self, room: Path, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.room, self.base = room, clip(rng)
        drift = clip(rng)
        self.experts = [self._moved(clip(rng), drift) for _ in range(TASKS)]
        self.start = toys.save(room / "base.safetensors", self.base)
        self.paths = [toys.save(room / f"{t}.safetensors", e) for t, e in enumerate(self.experts, 1)]

    def _moved(self, own: dict[str, np.ndarray], drift: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """An expert with a direction of its own and one that all share; its logit_scale is above CLIP's ceiling of ln(100)."""
        own["logit_scale"] = np.abs(own["logit_scale"]) + np.float32(7)
        return {name: np.asarray(value + own[name] + drift[name]) for name, value in self.base.items()}

    def model(self, strategy: Strategy, weights: timeline.Weights) -> Path:
        """The model that a translated strategy serves, merged as the pipeline merges it."""
        if isinstance(weights, Base):
            return self.start
        if isinstance(weights, Expert):
            return self.paths[weights.t - 1]
        inputs = [self.model(strategy, parent) for parent in timeline.parents(strategy, weights)]
        params, out = (
            timeline.params_for(strategy, weights),
            self.room / f"{weights.policy}-{weights.t}.safetensors",
        )
        assert strategy.technique is not None
        if weights.policy == "all":
            engine.merge(strategy.technique, params, self.start, inputs, out, rules=ANY)
        else:
            engine.fold(strategy.technique, params, self.start, inputs[0], inputs[1], out, rules=ANY)
        return out


@pytest.fixture(scope="module", params=SEEDS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("parity"), request.param)


def ours(world: World, strategy: Strategy, seeded: bool = False, t: int = TASKS) -> dict[str, np.ndarray]:
    translated, _ = translate(replace(strategy, parity=THEIRS), seeded=seeded)
    timeline.check(translated, TASKS)
    return toys.load(world.model(translated, timeline.deployed(translated, t)))


def agree(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Equal up to the rounding of float32; one element in a thousand may differ, where a sign or a rank was almost tied."""
    assert set(found) == set(expected)
    size = max(float(np.abs(value).max()) for value in expected.values())
    wrong = sum(
        int((~np.isclose(found[n], v, rtol=1e-6, atol=1e-6 * size)).sum()) for n, v in expected.items()
    )
    assert wrong <= 1e-3 * sum(value.size for value in expected.values()), f"{wrong} elements differ"
    assert found["logit_scale"] == pytest.approx(expected["logit_scale"], rel=1e-5)


def theirs(technique: str, prune: float, set_: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
    method, options = METHODS[technique]
    return method, {"prune": prune, **options, **(set_ or {})}


def test_every_technique_of_theirs_is_compared() -> None:
    assert {*METHODS, *RANDOM} == set(TECHNIQUES) <= set(names())


@pytest.mark.parametrize("technique", [name for name in METHODS if name not in PAIRS])
@pytest.mark.parametrize("cell", [("base", "all"), ("latest", "all")], ids="-".join)
def test_merge_of_all_is_theirs(world: World, technique: str, cell: tuple[str, str]) -> None:
    method, options = theirs(technique, 0.2)
    expected = authors.merge(method, options, world.base, world.experts)
    agree(ours(world, Strategy(*cell, technique)), expected)


@pytest.mark.parametrize("technique", METHODS)
@pytest.mark.parametrize("cell", [("ema", "ema"), ("base", "ema"), ("latest", "ema")], ids="-".join)
def test_fold_is_theirs(world: World, technique: str, cell: tuple[str, str]) -> None:
    method, options = theirs(technique, 0.7)
    expected = authors.fold(method, options, world.base, world.experts, cell != ("latest", "ema"))
    agree(ours(world, Strategy(*cell, technique)), expected)


@pytest.mark.parametrize("seed", timeline.EMA_SEEDS)
@pytest.mark.parametrize(("technique", "params", "options"), SET, ids=str)
def test_fold_with_parameters_of_ones_own_is_theirs(
    world: World, technique: str, params: dict, options: dict, seed: str
) -> None:
    method, options = theirs(technique, 0.7, options)
    expected = authors.fold(method, options, world.base, world.experts, seed == "base")
    agree(ours(world, Strategy("ema", "ema", technique, params, seed), seeded=True), expected)


@pytest.mark.parametrize("technique", [name for name in METHODS if name not in PAIRS])
def test_fold_of_a_cell_that_also_merges_all_is_theirs(world: World, technique: str) -> None:
    method, options = theirs(technique, 0.2)
    expected = authors.fold(method, options, world.base, world.experts, start_at_base=False)
    params = {"weight": 0.9} if technique == "average" else {}
    agree(ours(world, Strategy("all", "ema", technique, params)), expected)


@pytest.mark.parametrize("schedule", ["linear", "sqrt", "quadratic", "cubic", "exp", "log"])
def test_weights_that_grow_are_theirs_offline(world: World, schedule: str) -> None:
    i = np.arange(1, TASKS + 1)
    grown = {
        "linear": i,
        "sqrt": i**0.5,
        "quadratic": i**2,
        "cubic": i**3,
        "exp": 2.0**i,
        "log": np.log(i + 1),
    }
    coefficients = list(grown[schedule] / grown[schedule].sum())
    expected = authors.merge("interpolation", {"coefficients": coefficients}, world.base, world.experts)
    agree(ours(world, Strategy("base", "all", "average", {"schedule": schedule})), expected)


@pytest.mark.parametrize("consensus", ["mean", "sum", "max"])
def test_votes_that_cancel_follow_the_majority_of_the_tower(tmp_path: Path, consensus: str) -> None:
    rng = np.random.default_rng(4)
    base = {name: np.round(value * 16) / 16 for name, value in clip(rng).items()}
    experts = [toys.moved(rng, base, spread=3) for _ in range(4)]
    paths = [toys.save(tmp_path / f"{i}.safetensors", model) for i, model in enumerate([base, *experts])]
    params = translate_merge("ties", {"consensus": consensus}, THEIRS, 4)
    out = tmp_path / "out.safetensors"
    engine.merge("ties", params, paths[0], paths[1:], out, rules=ANY)
    expected = authors.merge("ties", {"prune": 0.2, "function": consensus}, base, experts)
    for name, value in expected.items():
        np.testing.assert_allclose(toys.load(out)[name], value, rtol=2e-7, atol=0, err_msg=name)


# --- what is drawn: masks have the same distribution, not the same draws ---------------------------------------------------


@pytest.mark.parametrize(("form", "density"), [("ema", 0.3), ("all", 0.8)])
def test_dare_keeps_task_vectors_over_density_or_nothing(tmp_path: Path, form: str, density: float) -> None:
    world = World(tmp_path, 5)
    strategy = Strategy("base", form, "dare_ties")
    (params,) = [translate(replace(strategy, parity=THEIRS))[0].params]
    out = tmp_path / "one.safetensors"
    engine.merge("dare_ties", params, world.start, world.paths[:1], out, rules=ANY)
    kept = total = 0
    for name, value in toys.load(out).items():
        tau, moved = world.experts[0][name] - world.base[name], value - world.base[name]
        if value.shape:
            np.testing.assert_allclose(
                moved[moved != 0], (tau / np.float32(density))[moved != 0], rtol=1e-3, atol=1e-6
            )
            kept, total = kept + int((moved != 0).sum()), total + moved.size
    assert kept / total == pytest.approx(density, abs=4 * (density * (1 - density) / total) ** 0.5)


@pytest.mark.parametrize("technique", ["dare_ties", "lines_dare_ties"])
@pytest.mark.parametrize("form", ["fold", "merge"])
def test_dare_is_theirs_in_expectation(tmp_path: Path, technique: str, form: str) -> None:
    """Means over many draws: theirs with a generator and an exact share that is dropped, ours with hashes."""
    world, draws = World(tmp_path, 6), 150
    options = {"lines": LINES} if technique.startswith("lines_") else {}
    prune = 0.7 if form == "fold" else 0.2
    strategy = Strategy("base", "ema" if form == "fold" else "all", technique, parity=THEIRS)
    params, rng = translate(strategy)[0].params, np.random.default_rng(0)
    image = authors.towers(world.base)[0]
    found, expected = [], []
    for seed in range(draws):
        out, given = tmp_path / "out.safetensors", {**params, "seed": seed}
        if form == "fold":
            engine.fold(technique, given, world.start, world.paths[0], world.paths[1], out, rules=ANY)
        else:
            engine.merge(technique, given, world.start, world.paths[:2], out, rules=ANY)
        found.append(authors.flat(toys.load(out), image))
        dropped = [_dropped(rng, world.base, expert, prune) for expert in world.experts[:2]]
        expected.append(authors.flat(authors.merge("given", options, world.base, dropped), image))
    spread = np.sqrt((np.var(found, axis=0) + np.var(expected, axis=0)) / draws)
    apart = np.abs(np.mean(found, axis=0) - np.mean(expected, axis=0))
    assert (apart > 5 * spread + 1e-5).mean() < 2e-3
    assert (apart > 2 * spread + 1e-5).mean() < 0.08


def _dropped(
    rng: np.random.Generator, base: authors.Model, model: authors.Model, prune: float
) -> authors.Model:
    """A model whose task vector has lost a random share and gained 1 / (1 - prune) on the rest, tower by tower."""
    thinned: authors.Model = {}
    for members in authors.towers(base):
        start = authors.flat(base, members)
        chance = rng.random(start.size)
        keep = chance >= np.sort(chance)[int(prune * start.size) - 1]
        tau = np.where(keep, (authors.flat(model, members) - start) / np.float32(1 - prune), 0)
        thinned |= authors.apart(start + tau, base, members)
    return thinned


def test_random_takes_every_expert_as_often(tmp_path: Path) -> None:
    world = World(tmp_path, 7)
    merged = ours(world, Strategy("base", "all", "random_mix"))
    wins = np.zeros(TASKS)
    for name, value in merged.items():
        same = np.stack([np.isclose(value, expert[name], rtol=1e-5, atol=1e-5) for expert in world.experts])
        assert same.any(axis=0).all()
        wins += same.reshape(TASKS, -1).sum(axis=1)
    np.testing.assert_allclose(wins / wins.sum(), 1 / TASKS, atol=0.03)


# --- every difference is one -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        (Strategy("ema", "ema", "slerp", {"weight": 0.9}), "weight"),
        (Strategy("base", "all", "task_arithmetic"), "scale"),
        (Strategy("ema", "ema", "ties"), "density"),
        (Strategy("base", "all", "ties"), "density"),
        (Strategy("base", "all", "breadcrumbs_ties"), "density"),
        (Strategy("base", "all", "dare_ties"), "density"),
        (Strategy("ema", "ema", "model_stock"), "ratio"),
        (Strategy("base", "all", "consensus"), "min_tasks"),
        (Strategy("base", "all", "magmax"), "logit_scale"),
        (Strategy("all", "ema", "average", {"weight": 0.9}), "weight"),
        (Strategy("latest", "all", "average", {"schedule": "linear"}), "schedule"),
        (Strategy("base", "all", "average", {"weights": [1, 2, 3, 4, 5]}), "weights"),
    ],
    ids=lambda value: (
        value if isinstance(value, str) else "-".join([value.init, value.deploy, value.technique])
    ),
)
def test_parameter_is_another_one_under_parity(strategy: Strategy, name: str) -> None:
    policy = "ema" if "ema" in (strategy.init, strategy.deploy) else "all"
    translated, _ = translate(replace(strategy, parity=THEIRS))
    here, there = (timeline.params_for(one, Merged(policy, 2))[name] for one in (strategy, translated))
    assert here != there


@pytest.mark.parametrize("technique", [name for name in TECHNIQUES if name not in PAIRS])
def test_merge_without_parity_is_another_one(world: World, technique: str) -> None:
    strategy = Strategy("latest", "ema", technique)
    plain = toys.load(world.model(strategy, timeline.deployed(strategy, TASKS)))
    merged = ours(world, strategy)
    assert any(not np.array_equal(plain[name], merged[name]) for name in plain)


def test_slerp_weight_counts_for_the_running_model(world: World) -> None:
    strategy = Strategy("ema", "ema", "slerp", {"weight": 0.9})
    assert translate(replace(strategy, parity=THEIRS))[0].params["weight"] == 0.1
    near = authors.flat(ours(world, strategy, t=1), list(world.base)) - authors.flat(
        world.base, list(world.base)
    )
    far = authors.flat(world.experts[0], list(world.base)) - authors.flat(world.base, list(world.base))
    assert np.linalg.norm(near) < 0.3 * np.linalg.norm(far)


@pytest.mark.parametrize("init", timeline.INITIALIZATIONS)
@pytest.mark.parametrize("deploy", ["latest", "all", "ema"])
def test_fold_begins_where_their_protocol_of_the_cell_does(init: str, deploy: str) -> None:
    first = {("latest", "ema"), ("all", "ema"), ("ema", "latest"), ("ema", "all")}
    strategy = Strategy(init, deploy, "average", parity=THEIRS)
    assert translate(strategy)[0].ema_seed == ("first_expert" if (init, deploy) in first else "base")
    assert translate(strategy, seeded=True)[0].ema_seed == "base"
    chosen = replace(strategy, ema_seed="first_expert")
    assert translate(chosen, seeded=True)[0].ema_seed == "first_expert"


@pytest.mark.parametrize("technique", ["average", "ties"])
def test_offline_merging_serves_the_first_expert_as_it_is(world: World, technique: str) -> None:
    offline = ours(world, Strategy("base", "all", technique), t=1)
    assert all(np.array_equal(offline[name], world.experts[0][name]) for name in offline)
    double = ours(world, Strategy("latest", "all", technique), t=1)
    agree(double, authors.merge(*theirs(technique, 0.2), world.base, world.experts[:1]))


def test_reset_weights_are_said() -> None:
    def notes(init: str, deploy: str, **params: Any) -> list[str]:
        return translate(Strategy(init, deploy, "average", params, parity=THEIRS))[1]

    assert "weight = 0.9 is not used" in notes("all", "ema", weight=0.9)[0]
    assert "weight is 0.5" in notes("ema", "all", weight=0.9)[0]
    assert [text.split(" = ")[0] for text in notes("ema", "all", weight=0.9, schedule="log")] == [
        "average: schedule",
        "average: weight",
    ]
    assert notes("all", "ema", weight=0.5) == notes("ema", "ema", weight=0.9) == []
    assert notes("base", "all", schedule="log") == []
    assert "weights" in notes("base", "all", weights=[1, 2])[0]
    assert "merge nothing" in notes("latest", "latest")[0]


# --- the translation itself ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("technique", names())
@pytest.mark.parametrize("cell", [("ema", "ema"), ("all", "ema"), ("base", "all")], ids="-".join)
def test_translation_is_idempotent_and_leaves_others_alone(technique: str, cell: tuple[str, str]) -> None:
    plain = Strategy(*cell, technique, {"logit_scale": "base"})
    assert translate(plain) == (plain, [])
    if technique in TECHNIQUES and not (technique in PAIRS and "all" in cell):
        once, _ = translate(replace(plain, parity=THEIRS))
        assert once.parity is None
        assert once.params["logit_scale"] == "base"
        assert translate(once) == (once, [])
        for policy in timeline.policies(once):
            timeline.params_for(once, Merged(policy, 2))
    else:
        with pytest.raises(TechniqueError, match=r"has no .*; it has average, slerp|exactly two"):
            translate(replace(plain, parity=THEIRS))


def test_what_is_set_stays() -> None:
    params = {"density": 0.5, "scale": 2.0, "consensus": "sum", "logit_scale": "merge"}
    once, notes = translate(Strategy("ema", "ema", "ties", params, parity=THEIRS))
    assert ({**once.params}, notes) == (params, [])


def test_bad_parity_technique_and_count_are_named() -> None:
    with pytest.raises(TechniqueError, match="did you mean fomo_in_flux"):
        translate(Strategy("ema", "ema", "average", parity="fomo-in-flux"))
    with pytest.raises(TechniqueError, match=r"fomo_in_flux has no iso_c.* it has average"):
        translate_merge("iso_c", {}, THEIRS, 2)
    with pytest.raises(TechniqueError, match="exactly two checkpoints in fomo_in_flux, not 3"):
        translate_merge("model_stock", {}, THEIRS, 3)
    with pytest.raises(TechniqueError, match="no parameter 'prune'"):
        translate_merge("ties", {"prune": 0.2}, THEIRS, 2)
    assert translate_merge("lines", {}, THEIRS, 2) == {"logit_scale": "unclamped"}
    assert translate_merge("iso_c", {"scale": 2}, None, 2) == {"scale": 2}


# --- logit_scale without a ceiling, whichever way it is merged ------------------------------------------------------------------


@pytest.mark.parametrize(
    "technique", ["average", "task_arithmetic", "ties", "iso_c", "consensus", "multislerp"]
)
def test_unclamped_logit_scale_is_what_any_parameter_is(world: World, technique: str) -> None:
    def merged(choice: str, **options: Any) -> dict[str, np.ndarray]:
        out = world.room / "out.safetensors"
        engine.merge(
            technique, {"logit_scale": choice}, world.start, world.paths[:3], out, rules=ANY, **options
        )
        return toys.load(out)

    free, held, ceiling = merged("unclamped"), merged("merge"), max(np.log(100), world.base["logit_scale"])
    for name in free:
        limit = ceiling if name == "logit_scale" else np.inf
        np.testing.assert_array_equal(held[name], np.minimum(free[name], np.float32(limit)))
    for other in (merged("unclamped", block=16, threads=2), merged("unclamped", device="cpu")):
        np.testing.assert_allclose(other["logit_scale"], free["logit_scale"], rtol=1e-6)


def test_unclamped_logit_scale_in_a_stream_and_a_fold(world: World) -> None:
    params, out = {"scale": 1.0, "logit_scale": "unclamped"}, world.room / "o.safetensors"
    state = None
    for t, path in enumerate(world.paths[:2], 1):
        new = world.room / f"state-{t}.safetensors"
        given = {"expert_id": f"t{t}", "state_in": state, "state_out": new}
        engine.advance("task_arithmetic", params, world.start, path, out, rules=ANY, **given)
        state = new
    start, taus = (
        world.base["logit_scale"],
        [e["logit_scale"] - world.base["logit_scale"] for e in world.experts],
    )
    assert float(toys.load(out)["logit_scale"]) == pytest.approx(float(start + taus[0] + taus[1]), rel=1e-6)
    assert float(toys.load(out)["logit_scale"]) > np.log(100)
    engine.fold("task_arithmetic", params, world.start, world.paths[0], world.paths[1], out, rules=ANY)
    assert float(toys.load(out)["logit_scale"]) == pytest.approx(float(start + taus[0] + taus[1]), rel=1e-6)


def test_technique_without_logit_scale_choice_does_not_exist() -> None:
    assert all("unclamped" in get(name).param("logit_scale").choices for name in names())
