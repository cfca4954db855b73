"""Margins that are read off a study: against differences worked out by hand, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from merge_service.errors import UserError
from merge_service.live import Judged, Margins, merge_gates
from merge_service.timelines import PRESETS, Strategy
from pipeline.plan.draft import effective_params
from pipeline.results import over_time
from pipeline.results.margins import Losses, Wanted, block, losses, percentile
from pipeline.service.config import config_from
from tests.merge_service.live.test_gates import answers
from tests.pipeline.plan_toys import base_of, facts, make_plan, study
from tests.pipeline.results.test_results import FakeStore

TASKS = ("a", "b", "c", "d", "e", "f")
OFFLINE = Wanted(Strategy("base", "all", "average"), "tiny-clip", "test")
CONFIG = {
    "name": "zoo",
    "model": {"config": "tiny-clip"},
    "strategy": {"init": "base", "deploy": "all", "technique": "average"},
    "data": {"suite": "mini"},
}


def trajectory(order: str = "abcdef", fall: float = 0.01, **other: Any) -> dict[str, Any]:
    """A task is at .1 before its expert comes, .6 after it, and falls by `fall` at each later arrival; the held-out set by twice that."""
    steps = []
    for t in range(len(order) + 1):
        scores = {
            name: 0.6 - fall * (t - order.index(name) - 1) if order.index(name) < t else 0.1 for name in order
        }
        task, own = (order[t - 1], 0.7) if t else ("base", None)
        steps.append(
            {"t": t, "task": task, "scores": {**scores, "kept": 0.8 - 2 * fall * t}, "expert_own_score": own}
        )
    return {
        "id": f"offline-{order}", "name": "offline", "init": "base", "deploy": "all", "technique": "average",
        "params": {"weights": None, "schedule": "uniform"}, "ema_seed": None, "model": "tiny-clip", "split": "test",
        "settings": {}, "arrivals": {name: t for t, name in enumerate(order, 1)}, "steps": steps, **other,
    }  # fmt: skip


def results(*trajectories: dict[str, Any]) -> dict[str, Any]:
    return {"study": "orders", "complete": True, "held_out": ["kept"], "trajectories": [*trajectories]}


def of_strategy(one: dict[str, Any]) -> dict[str, Any]:
    """The same trajectory with the parameters that average has."""
    return {**one, "params": json.loads(json.dumps(effective_params(OFFLINE.strategy)))}


TWO = results(of_strategy(trajectory()), of_strategy(trajectory("fedcba")))


def test_losses_are_those_of_the_tasks_before_and_of_the_held_out_sets() -> None:
    found = losses(TWO, OFFLINE)
    assert found.arrivals == 12 and found.trajectories == ("offline-abcdef", "offline-fedcba")
    assert found.gains == pytest.approx([0.6] * 12)
    assert found.accumulated == pytest.approx([0.01] * 10) and found.worst == pytest.approx([0.01] * 10)
    assert found.held_out == pytest.approx([0.02] * 12)
    # t = 1 against the base; t against the best before it, which each arrival raises: (t - 1 tasks by .01, one set by .02) / t
    one = [0.02, *[((t - 1) * 0.01 + 0.02) / t for t in range(2, 7)]]
    assert found.drift == pytest.approx([*one, *one])


def test_worst_is_the_task_that_lost_most_and_drift_looks_back_to_the_best() -> None:
    hurt = of_strategy(trajectory())
    hurt["steps"][3]["scores"] |= {"a": 0.3, "b": 0.6, "kept": 0.1}  # t = 3: a loses .29, b gains .0
    found = losses(results(hurt, TWO["trajectories"][1]), OFFLINE)
    assert found.worst[1] == pytest.approx(0.29) and found.accumulated[1] == pytest.approx((0.29 + 0.0) / 2)
    # t = 4 is compared with t = 2, whose mean is higher than that of t = 3
    before = {"a": 0.59, "b": 0.6, "c": 0.1, "kept": 0.76}
    after = {"a": 0.57, "b": 0.58, "c": 0.59, "kept": 0.72}
    assert found.drift[3] == pytest.approx(sum(before[name] - after[name] for name in before) / 4)


def test_a_loss_is_what_the_gate_of_the_service_measures() -> None:
    champion = {"a": answers(60, 100), "kept": answers(80, 100)}
    candidate = {"a": answers(52, 100), "kept": answers(77, 100)}
    seen = merge_gates(
        Judged("1", candidate), Judged("2", champion), Judged("3", champion), ["a"], ["kept"], Margins()
    )
    study = [of_strategy(trajectory(order, 0.0)) for order in ("abcdef", "fedcba", "abcfed")]
    study[0]["steps"][1]["scores"] |= {"a": 0.6, "kept": 0.8}
    study[0]["steps"][2]["scores"] |= {"a": 0.52, "kept": 0.77}
    found = losses(results(*study), OFFLINE)
    first = (found.accumulated[0], found.worst[0], found.held_out[1], found.drift[1])
    assert [-one.difference for one in seen] == pytest.approx(first)


def test_margin_is_the_smallest_that_nine_in_ten_keep() -> None:
    assert percentile([float(one) for one in range(10)]) == 8.0
    assert percentile([float(one) for one in range(11)]) == 9.0
    assert percentile([3.0] * 19 + [9.0]) == 3.0


def test_block_goes_into_a_configuration_as_it_is() -> None:
    ten = tuple(0.01 * one for one in range(11))
    found = Losses(
        ("x",), 11, tuple(0.5 + one for one in ten), ten, tuple(2 * one for one in ten), ten, (-0.1,) * 11
    )
    text = block(found, "runs/orders", OFFLINE)
    gates = config_from({**CONFIG, **yaml.safe_load(text)}, "service").gates
    assert (gates.solo.min_gain, gates.drift) == (0.51, 0.0)
    assert (gates.accumulated.margin, gates.accumulated.worst, gates.held_out.margin) == (0.09, 0.18, 0.09)
    assert "11 arrivals of x" in text and "gained 0.500 to 0.600, the median 0.550" in text
    rounded = block(
        Losses(("x",), 10, (0.1239,) * 10, (0.1231,) * 10, *[(0.1,) * 10] * 3), "runs/orders", OFFLINE
    )
    assert "min_gain: 0.123}" in rounded and "margin: 0.124, worst: 0.1}" in rounded


def test_gates_that_the_study_cannot_speak_for_are_left_out() -> None:
    without = {**TWO, "held_out": []}
    assert losses(without, OFFLINE).held_out == ()
    latest = Wanted(
        Strategy("latest", "all", "average"), "tiny-clip", "test"
    )  # starts that were never scored
    found = losses(results(*({**one, "init": "latest"} for one in TWO["trajectories"])), latest)
    assert found.gains == () and len(found.drift) == 12
    text = block(losses(without, OFFLINE), "runs/orders", OFFLINE)
    assert set(yaml.safe_load(text)["gates"]) == {"solo", "accumulated", "drift"} and "# held_out:" in text
    assert "solo" not in yaml.safe_load(block(found, "runs/orders", latest))["gates"]


def test_gain_of_a_chain_is_over_what_was_served_before() -> None:
    served = Wanted(Strategy("latest", "latest"), "tiny-clip", "test")
    chains = [
        {**one, "init": "latest", "deploy": "latest", "technique": None, "params": {}}
        for one in TWO["trajectories"]
    ]
    chains[0]["steps"][1]["scores"]["b"] = 0.4
    found = losses(results(*chains), served)
    assert found.gains[:2] == pytest.approx([0.6, 0.3])


@pytest.mark.parametrize(
    "strategy",
    [
        "offline_merging", "offline_merging_replay", "offline_merging_weighted", "continual_finetuning", "best_in_time",
        {"preset": "best_in_time", "params": {"weight": 0.25}, "ema_seed": "first_expert"},
        {"init": "base", "deploy": "all", "technique": "dare", "params": {"density": 0.25, "seed": 3}},
        {"init": "all", "deploy": "all", "technique": "ties", "parity": "fomo_in_flux"},
    ],
    ids=str,
)  # fmt: skip
def test_strategy_of_a_service_finds_itself_in_the_results_of_a_study(strategy: Any) -> None:
    plan, store = make_plan(study([strategy, "zero_shot"], tasks=11), facts(11)), FakeStore()
    store.tell("base", base_of(plan), {}, "base")
    for name, step in plan.steps.items():
        scores = {**{f"d{t}": 0.5 for t in range(1, 12)}, "kept": 0.5}
        store.tell(step.kind, name, {"scores": scores} if step.kind == "evaluate" else {}, name)
    wanted = Wanted(config_from({**CONFIG, "strategy": strategy}, "service").timeline, "toy", "test")
    found = losses(json.loads(json.dumps(over_time.results(plan, store))), wanted)
    assert found.arrivals == 11 and found.drift == (0.0,) * 11


@pytest.mark.parametrize(
    "wanted",
    [
        Wanted(Strategy("base", "all", "ties"), "tiny-clip", "test"),
        Wanted(Strategy("ema", "ema", "average"), "tiny-clip", "test"),
        Wanted(PRESETS["offline_merging_replay"], "tiny-clip", "test"),
        Wanted(PRESETS["offline_merging_weighted"], "tiny-clip", "test"),
        Wanted(OFFLINE.strategy, "ViT-B-16", "test"),
        Wanted(OFFLINE.strategy, "tiny-clip", "val"),
    ],
)  # fmt: skip
def test_study_of_another_strategy_model_or_split_is_refused(wanted: Wanted) -> None:
    with pytest.raises(
        UserError, match=r"no trajectory of the service's strategy .* it has offline \(tiny-clip, test\)"
    ):
        losses(TWO, wanted)


def test_trajectories_of_the_mixture_that_the_strategy_names_count() -> None:
    mixture = {"recipe.mixture.pretraining": 0.0, "recipe.mixture.update": 1.0, "recipe.mixture.buffer": 0.0}
    plain = results(*({**one, "settings": mixture} for one in TWO["trajectories"]))
    assert losses(plain, Wanted(PRESETS["offline_merging"], "tiny-clip", "test")).arrivals == 12


def test_too_few_arrivals_and_tasks_that_are_no_dataset_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"has 6 arrivals .* in 1 trajectories, and some gate saw only 5; .* needs 10"
    ):
        losses(results(TWO["trajectories"][0]), OFFLINE)
    chunks = {**TWO["trajectories"][0], "arrivals": {"a": 1, "b": 1}}
    with pytest.raises(UserError, match="of t = 1 is not one whole dataset"):
        losses(results(chunks), OFFLINE)


def test_command_prints_the_block_or_the_reason(tmp_path: Path, cli: Any) -> None:
    config, out = tmp_path / "service.yaml", tmp_path / "orders"
    config.write_text(yaml.safe_dump(CONFIG))
    out.mkdir()

    def asked() -> Any:
        return cli("serve", config, "--suggest-gates", out)

    assert asked().code == 2 and "holds no results.json" in asked().err
    (out / "results.json").write_text("{")
    assert asked().code == 2 and "cannot be read" in asked().err
    (out / "results.json").write_text(json.dumps({**TWO, "complete": False}))
    assert asked().code == 2 and "study orders is not finished" in asked().err
    (out / "results.json").write_text(json.dumps(TWO))
    found = asked()
    assert found.code == 0, found.err
    assert yaml.safe_load(found.out)["gates"]["held_out"] == {"margin": 0.02}
