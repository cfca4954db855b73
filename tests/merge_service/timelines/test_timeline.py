"""The whole init x deploy grid, the presets, and strategies that are refused."""

import itertools

import pytest

from merge_service.errors import TechniqueError
from merge_service.techniques import get, names
from merge_service.timelines import PRESETS, Base, Expert, Merged, Strategy
from merge_service.timelines import time as timeline


def value(strategy: Strategy, weights: timeline.Weights, w: float, experts: dict[int, float]) -> float:
    """A weights value as a number, with averaging of scalars and 0 for the base."""
    if isinstance(weights, Base):
        return 0.0
    if isinstance(weights, Expert):
        return experts[weights.t]
    inputs = [value(strategy, parent, w, experts) for parent in timeline.parents(strategy, weights)]
    return sum(inputs) / len(inputs) if weights.policy == "all" else (1 - w) * inputs[0] + w * inputs[1]


def made(strategy: Strategy, tasks: int) -> list[Merged]:
    """The merges of a stream of so many tasks, in the order they are made."""
    steps = (timeline.derivations(strategy, t, last=t == tasks) for t in range(1, tasks + 1))
    return [merge.result for merges in steps for merge in merges]


@pytest.mark.parametrize(
    ("init", "deploy", "seed"),
    [
        (i, d, s)
        for i, d, s in itertools.product(timeline.INITIALIZATIONS, timeline.DEPLOYMENTS, timeline.EMA_SEEDS)
        if d != "base"
    ],
)
def test_grid_cell_follows_its_definition(init: str, deploy: str, seed: str) -> None:
    strategy = Strategy(init, deploy, "average", {"weight": 0.25} if "ema" in (init, deploy) else {}, seed)
    timeline.check(strategy, 5)
    experts = {t: float(2**t) for t in range(1, 6)}
    merges = made(strategy, 5)
    assert len(set(merges)) == len(merges)
    for k in range(6):
        mean = sum(experts[t] for t in range(1, k + 1)) / max(k, 1)
        first = 0.0 if seed == "base" else experts[1]
        ema = first * 0.75 ** (k if seed == "base" else k - 1) if k else 0.0
        ema += sum(0.25 * 0.75 ** (k - t) * experts[t] for t in range(1 if seed == "base" else 2, k + 1))
        expected = {"base": 0.0, "latest": experts.get(k, 0.0), "all": mean, "ema": ema}
        assert value(strategy, timeline.deployed(strategy, k), 0.25, experts) == pytest.approx(
            expected[deploy]
        )
        assert value(strategy, timeline.initial(strategy, k + 1), 0.25, experts) == pytest.approx(
            expected[init]
        )
        for weights in (timeline.deployed(strategy, k), timeline.initial(strategy, min(k + 1, 5))):
            assert not isinstance(weights, Merged) or weights in merges


@pytest.mark.parametrize("seed", timeline.EMA_SEEDS)
def test_merges_come_after_what_they_are_made_of(seed: str) -> None:
    strategy = Strategy("all", "ema", "ties", {}, seed)
    done: set[timeline.Weights] = set()
    for merged in made(strategy, 4):
        for parent in timeline.parents(strategy, merged):
            assert not isinstance(parent, Merged) or parent in done
        done.add(merged)
    assert Merged("all", 4) not in done  # nothing is trained after task 4, and all is not deployed
    assert (Merged("ema", 1) in done) == (seed == "base")


def test_presets_are_those_of_the_paper() -> None:
    cells = {name: (s.init, s.deploy, s.technique) for name, s in PRESETS.items()}
    assert cells == {
        "zero_shot": ("base", "base", None),
        "offline_merging": ("base", "all", "average"),
        "offline_merging_replay": ("base", "all", "average"),
        "offline_merging_weighted": ("base", "all", "average"),
        "continual_finetuning": ("latest", "latest", None),
        "continual_finetuning_replay": ("latest", "latest", None),
        "multitask": ("base", "latest", None),
        "best_in_time": ("ema", "ema", "average"),
    }
    for strategy in PRESETS.values():
        timeline.check(strategy, 6)
        assert not timeline.warnings(strategy)
    assert not timeline.needs_experts(PRESETS["zero_shot"]) and PRESETS["multitask"].joint


def test_parameters_of_a_merge_are_those_of_its_form_alone() -> None:
    one = Strategy("ema", "all", "average", {"weight": 0.25, "schedule": "linear"})
    other = Strategy("base", "all", "average", {"schedule": "linear"})
    assert timeline.params_for(one, Merged("all", 3)) == timeline.params_for(other, Merged("all", 3))
    assert timeline.params_for(one, Merged("ema", 3)) == {"weight": 0.25, "logit_scale": "merge"}
    weighted = Strategy("base", "all", "average", {"weights": [1, 2, 3]})
    assert timeline.params_for(weighted, Merged("all", 2))["weights"] == [1.0, 2.0]
    assert timeline.params_for(one, Merged("ema", 3)) == timeline.params_for(
        Strategy("ema", "ema", "average", {"weight": 1 / 4}), Merged("ema", 1)
    )


@pytest.mark.parametrize(
    ("strategy", "says"),
    [
        (Strategy("lates", "all", "average"), "did you mean latest"),
        (Strategy("base", "everything", "average"), "deploy: 'everything'"),
        (Strategy("base", "ema", "average", ema_seed="first_exprt"), "did you mean first_expert"),
        (Strategy("latest", "base"), "experts that are never served"),
        (Strategy("base", "all"), "needs a technique"),
        (Strategy("base", "base", None, {"scale": 1}), "no technique to take them"),
        (Strategy("base", "all", "slerp"), "cannot merge all experts"),
        (Strategy("base", "all", "average", {"weight": 0.3}), "weight has no effect"),
        (Strategy("base", "all", "average", {"weights": [1, 2]}), "stream has 3 tasks"),
        (Strategy("base", "all", "average", {"weights": [0, 2, 1]}), "no weight above zero"),
        (Strategy("base", "all", "ties", {"density": 2}), "density = 2"),
        (Strategy("base", "all", "tis"), "did you mean ties"),
        (Strategy("base", "latest", mixture=(0.5, 0.6, 0.1)), "sum to 1"),
    ],
)
def test_a_strategy_that_cannot_run_is_refused(strategy: Strategy, says: str) -> None:
    with pytest.raises(TechniqueError) as caught:
        timeline.check(strategy, 3)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("init", "deploy", "technique", "params", "growth"),
    [
        ("ema", "ema", "task_arithmetic", {"scale": 1}, "2*scale = 2"),
        ("ema", "latest", "task_arithmetic", {"scale": 0.6}, "2*scale = 1.2"),
        ("ema", "ema", "task_arithmetic", {"scale": 0.5}, None),
        ("ema", "ema", "ties", {"consensus": "sum"}, "2*scale = 2"),
        ("ema", "ema", "ties", {"consensus": "mean"}, None),
        ("ema", "ema", "magmax", {"scale": 1.5}, "scale = 1.5"),
        ("ema", "ema", "lines", {}, "2*(lines_alpha + lines_beta) = 2"),
        ("all", "all", "task_arithmetic", {"scale": 0.25}, "1 + scale = 1.25"),
        ("base", "all", "task_arithmetic", {"scale": 1}, None),
        ("latest", "ema", "task_arithmetic", {"scale": 2}, "scale = 2"),
        ("ema", "ema", "average", {}, None),
    ],
)
def test_strategies_that_diverge_say_so_before_they_run(init, deploy, technique, params, growth) -> None:
    found = timeline.warnings(Strategy(init, deploy, technique, params))
    assert bool(found) == (growth is not None)
    assert growth is None or any(growth in line and "without bound" in line for line in found)


@pytest.mark.parametrize("technique", [one for one in names() if "fold" in get(one).forms])
def test_growth_is_known_of_every_technique_that_folds(technique: str) -> None:
    """Also of one without a factor of the task vector, where nothing grows."""
    for init in ("ema", "latest"):
        found = timeline.warnings(Strategy(init, "ema", technique, {}))
        assert bool(found) == (init == "ema" and technique == "lines_task_arithmetic")


def test_warning_of_growth_states_the_factor_over_a_stream_and_foretells_no_score() -> None:
    """On ten tasks a factor of .6 was the best of a grid, so the warning states the growth, and no bad result."""
    (line,) = timeline.warnings(Strategy("ema", "ema", "task_arithmetic", {"scale": 0.6}))
    assert (
        "6.19 times after 10 tasks, 38.3 times after 20" in line and "scale <= 0.5 keeps it bounded" in line
    )
    assert "will diverge" not in line and "validation split" in line


def test_folded_task_arithmetic_under_ema_initialization_grows_as_the_warning_says() -> None:
    for scale, expected in ((1, [1, 3, 7, 15, 31, 63]), (0.5, [0.5, 1, 1.5, 2, 2.5, 3])):
        merged, seen = 0.0, []
        for _ in range(6):
            expert = merged + 1
            merged = scale * (merged + expert)
            seen.append(merged)
        assert seen == expected
