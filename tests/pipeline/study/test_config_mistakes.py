"""Mistakes in a study, and hostile files: each gives a message with its key and what to do, and has no other effect."""

import copy
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from merge_service.errors import UserError
from pipeline.errors import ConfigError
from pipeline.study import yaml_input
from pipeline.study.config import load_study, study_from
from tests.pipeline.plan_toys import raw_study

GOOD = """
name: toy
model: {config: tiny-clip}
data: {root: somewhere, pretraining: [pool], held_out: [kept]}
stream: {tasks: [d1, d2, d3]}
recipe: {lr: 3e-4, batch_size: 64, precision: fp32, mixture: {pretraining: .33, update: .34, buffer: .33}}
budget: {steps_per_task: 100}
grid:
  strategies: [zero_shot, offline_merging, best_in_time]
"""


def problems(raw: dict[str, Any], *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        study_from(raw, "f.yaml", overrides)
    return caught.value.problems


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


TIES: dict[str, Any] = {"preset": "offline_merging", "technique": "ties"}
MISTAKES: list[tuple[str, str, str]] = [
    # override, key in the message, text in the message
    ("recipe.lrr=1", "recipe.lrr", "did you mean recipe.lr?"),
    ("lr=1", "lr", "did you mean recipe.lr?"),
    ("density=1", "density", "valid keys here"),
    ("bugdet.multiplier=2", "bugdet", "did you mean budget?"),
    ("recipe.mixture.buffr=1", "recipe.mixture.buffr", "did you mean recipe.mixture.buffer?"),
    ("resources.experts.worker=2", "resources.experts.worker", "did you mean resources.experts.workers?"),
    ("recipe.lr=-1", "recipe.lr", "greater than 0"),
    ("recipe.lr=true", "recipe.lr", "valid number"),
    ("recipe.lr='1'", "recipe.lr", "valid number"),
    ("recipe.lr=1e308", "recipe.lr", "less than or equal to 10"),
    ("recipe.lr=1e999", "recipe.lr", "finite"),
    ("recipe.batch_size=2.5", "recipe.batch_size", "integer"),
    ("recipe.batch_size=-4", "recipe.batch_size", "greater than or equal to 2"),
    ("recipe.precision=fp33", "recipe.precision", "did you mean fp32?"),
    ("recipe.optimizer=sgd", "recipe.optimizer", "adamw"),
    ("recipe.mixture={update: .5}", "recipe.mixture", "sum to 1"),
    ("recipe=[1]", "recipe", "mapping"),
    ("name=../../etc", "name", "plain name"),
    ("name=.hidden", "name", "plain name"),
    ("name=a/b", "name", "plain name"),
    ("name=", "name", "text"),
    ("name=3", "name", "text"),
    ("stream.tasks=[http://x]", "stream.tasks[0]", "plain name"),
    ("stream.tasks=[a,a]", "stream.tasks", "listed twice"),
    ("stream.tasks=[]", "stream.tasks", "empty"),
    ("stream.order=randm", "stream.order", "dataset_incremental"),
    ("data.held_out=[..]", "data.held_out[0]", "plain name"),
    ("data={}", "data", "give suite"),
    ("budget.total_gflops=1e9", "budget", "exactly one"),
    ("budget.steps_per_task=null", "budget", "exactly one"),
    ("budget.steps_per_task=0", "budget.steps_per_task", "greater than 0"),
    ("budget.multiplier=-1", "budget.multiplier", "greater than 0"),
    ("evaluation.fraction=2", "evaluation.fraction", "less than or equal to 1"),
    ("resources.experts.engine=trch", "resources.experts.engine", "did you mean torch?"),
    ("resources.experts.groups=0", "resources.experts.groups", "auto"),
    ("resources.experts.gpus=1.5", "resources.experts", "GPU"),
    ("resources.experts.zero_stage=4", "resources.experts.zero_stage", "3"),
    ("tracking.uri=http://me:secret@host", "tracking", "password"),
    ("model.config=null", "model.config", "text"),
    ("grid=3", "grid", "mapping"),
    ("grid.strategies=[]", "grid.strategies", "at least one"),
    ("grid.strategies=[best_in_tme]", "grid.strategies[0]", "did you mean best_in_time?"),
    ("grid.strategies=[{preset: nope}]", "grid.strategies[0]", "there are zero_shot"),
    ("grid.strategies=[{init: base}]", "grid.strategies[0]", "deploy is missing"),
    ("grid.strategies=[{ini: base, deploy: all}]", "grid.strategies[0].ini", "did you mean grid.strategies[0].init?"),
    ("grid.strategies=[{init: bse, deploy: all, technique: average}]", "grid.strategies[0]", "did you mean base?"),
    ("grid.strategies=[{init: base, deploy: all}]", "grid.strategies[0]", "technique"),
    ("grid.strategies=[{preset: offline_merging, technique: tis}]", "grid.strategies[0]", "did you mean ties?"),
    ("grid.strategies=[{preset: offline_merging, technique: os.system}]", "grid.strategies[0]", "unknown technique"),
    ("grid.strategies=[{preset: offline_merging, technique: ties, params: {density: 2}}]", "grid.strategies[0]", "density"),
    ("grid.strategies=[{preset: offline_merging, technique: ties, params: {density: '.2'}}]", "grid.strategies[0]", "density"),
    ("grid.strategies=[{preset: offline_merging, technique: ties, params: {densty: .2}}]", "grid.strategies[0]", "did you mean density?"),
    ("grid.strategies=[{preset: best_in_time, params: {schedule: linear}}]", "grid.strategies[0]", "no effect"),
    ("grid.strategies=[{init: base, deploy: all, technique: slerp}]", "grid.strategies[0]", "exactly 2"),
    ("grid.strategies=[{preset: multitask, init: ema}]", "grid.strategies[0]", "takes no init"),
    ("grid.strategies=[{preset: multitask, mixture: {update: .5, buffer: .5}}]", "grid.strategies[0]", "no earlier tasks"),
    ("grid.strategies=[{preset: best_in_time, name: a/b}]", "grid.strategies[0].name", "plain name"),
    ("grid.strategies=[{init: [base, ema], deploy: all, technique: average, name: x}]", "grid.strategies[0].name", "one name"),
    ("grid.strategies=[{preset: best_in_time, parity: fomo-in-flx}]", "grid.strategies[0]", "did you mean fomo_in_flux?"),
    ("grid.strategies=[{preset: zero_shot, parity: authors}]", "grid.strategies[0]", "there is fomo_in_flux"),
    ("grid.strategies=[{preset: best_in_time, technique: karcher, parity: fomo_in_flux}]", "grid.strategies[0]", "it has average, slerp"),
    ("grid.strategies=[{init: base, deploy: all, technique: model_stock, parity: fomo_in_flux}]", "grid.strategies[0]", "exactly two"),
    ("grid.strategies=[{preset: best_in_time, paritiy: fomo_in_flux}]", "grid.strategies[0].paritiy", "did you mean grid.strategies[0].parity?"),
    ("grid.strategies=[best_in_time, best_in_time]", "grid.strategies[1]", "repeats grid.strategies[0]"),
    ("grid.strategies=[3]", "grid.strategies[0]", "mapping"),
    ("grid.sed=[0]", "grid.sed", "did you mean seed?"),
    ("grid.seed=[-1]", "grid.seed[0]", "whole number"),
    ("grid.seed=[0,0]", "grid.seed[1]", "twice"),
    ("grid.seed=[true]", "grid.seed[0]", "whole number"),
    ("grid.recipe.lr=[1e-4,-1]", "grid.recipe.lr[1]", "greater than 0"),
    ("grid.recipe.lr=[]", "grid.recipe.lr", "empty"),
    ("grid.recipe.lrr=[1]", "grid.recipe.lrr", "did you mean recipe.lr?"),
    ("grid.resources.experts.gpus=[1]", "grid.resources.experts.gpus", "unknown axis"),
    ("grid.budget.multiplier=[1,0]", "grid.budget.multiplier[1]", "greater than 0"),
]  # fmt: skip


@pytest.mark.fault("F26")
@pytest.mark.parametrize(
    ("override", "key", "words"), MISTAKES, ids=[mistake[0][:60] for mistake in MISTAKES]
)
def test_mistake_is_answered_with_its_key_and_what_to_do(override: str, key: str, words: str) -> None:
    (problem,) = problems(raw_study(["best_in_time"]), override)
    assert f"{key}:" in problem or problem.startswith(f"--set {key}")
    assert words in problem


@pytest.mark.fault("F26")
def test_password_is_not_repeated_in_the_message() -> None:
    assert "hunter2" not in str(
        problems(raw_study(["zero_shot"], tracking={"uri": "http://me:hunter2@host"}))
    )


@pytest.mark.parametrize("section", ["name", "model", "data", "budget", "grid"])
def test_missing_section_is_named(section: str) -> None:
    raw = raw_study(["best_in_time"])
    del raw[section]
    (problem,) = problems(raw)
    assert (section in problem and "missing" in problem) or "at least one" in problem


@pytest.mark.fault("F26")
def test_all_mistakes_are_told_at_once() -> None:
    raw = raw_study(["best_in_tme"], recipe={"lr": -1, "lrr": 2}, modl={})
    found = problems(raw)
    assert len(found) == 4
    message = str(ConfigError(found))
    assert message.startswith("4 problems:\n  - f.yaml: ")
    assert issubclass(ConfigError, UserError)


@pytest.mark.fault("F26")
def test_grid_of_too_many_cells_is_refused() -> None:
    raw = raw_study(["best_in_time"])
    raw["grid"] |= {"seed": list(range(1000)), "recipe.lr": [index / 1e6 for index in range(1, 102)]}
    assert "combinations" in problems(raw)[0]


# --- hostile files -------------------------------------------------------------------------------------------------------

HOSTILE: dict[str, str | bytes] = {
    "python object": GOOD + "x: !!python/object/apply:os.system ['touch canary']",
    "python name": GOOD + "x: !!python/name:os.system",
    "custom tag": GOOD + "x: !thing 3",
    "anchor": GOOD + "x: &a [1]",
    "billion laughs": "a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\nd: [*c,*c]",
    "too large": GOOD + "#" * 300_000,
    "ten megabytes": b"a" * 10_000_000,
    "deep brackets": GOOD + "x: " + "[" * 1000,
    "deep and closed": GOOD + "x: " + "[" * 1000 + "]" * 1000,
    "deep mappings": GOOD + "x: " + "{a: " * 30 + "1" + "}" * 30,
    "many values": "x: [" + "1," * 100_000 + "1]",
    "two documents": GOOD + "---\na: 1",
    "key twice": GOOD + "name: again",
    "merge key": GOOD + "<<: {a: 1}",
    "NaN": GOOD.replace("3e-4", ".nan"),
    "infinity": GOOD.replace("3e-4", "-.inf"),
    "NUL": GOOD.replace("name: toy", 'name: "a\\0b"'),
    "surrogate": GOOD.replace("name: toy", 'name: "\\ud800"'),
    "not UTF-8": b"name: \xff\xfe",
    "broken": GOOD + "x: [1, 2",
    "tab": "\tname: x",
    "number as key": GOOD + "1: 2",
    "list as key": GOOD + "? [a]\n: 1",
    "empty": "",
    "a list": "- name: toy",
    "a word": "name",
    "huge number": GOOD.replace("100", "9" * 5000),
    "binary": GOOD + "x: !!binary aGk=",
}


@pytest.mark.fault("F26")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_refused_quickly_and_does_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "study.yaml", HOSTILE[name])
    began = time.thread_time()
    with pytest.raises(ConfigError) as caught:
        load_study(path)
    assert time.thread_time() - began < 0.5
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert [entry.name for entry in tmp_path.iterdir()] == ["study.yaml"]


@pytest.mark.fault("F26")
@pytest.mark.parametrize("path", ["nowhere.yaml", "."])
def test_file_that_cannot_be_read_is_named(path: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_study(tmp_path / path)


@pytest.mark.fault("F26")
def test_mutated_files_raise_nothing_but_configuration_errors(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("cases", 500)
    rng = random.Random(0)
    pieces = [
        "[",
        "]",
        "{",
        "}",
        ": ",
        "\n",
        "- ",
        "&a ",
        "*a",
        "!!x ",
        "1e999",
        ".nan",
        "null",
        "true",
        "-1",
        '"',
        "'",
        "\\0",
        "\u2028",
        "grid",
        "é",
    ]
    accepted = 0
    for _ in range(500):
        text = GOOD
        for _ in range(rng.randint(1, 4)):
            place, length = rng.randrange(len(text)), rng.choice([0, 1, 1, 5, 20])
            text = (
                text[:place]
                + rng.choice([*pieces, "", chr(rng.randrange(32, 0x3000))])
                + text[place + length :]
            )
        try:
            study_from(yaml_input.read(write(tmp_path / "s.yaml", text)), "s.yaml")
            accepted += 1
        except ConfigError as error:
            assert str(error)
    assert 0 < accepted < 400


@pytest.mark.fault("F26")
def test_shuffled_trees_raise_nothing_but_configuration_errors(
    record_property: Callable[[str, object], None],
) -> None:
    record_property("cases", 700)
    rng = random.Random(1)
    values: list[Any] = [
        None,
        True,
        -1,
        0,
        3,
        0.5,
        1e300,
        "",
        "x",
        [],
        [1],
        ["base", "ema"],
        {},
        {"a": 1},
        [[]],
        [{}],
        2**70,
    ]
    for _ in range(700):
        raw: Any = json.loads(json.dumps(yaml.safe_load(GOOD)))
        for _ in range(rng.randint(1, 3)):
            node = raw
            while True:
                keys = list(node) if isinstance(node, dict) else list(range(len(node)))
                key = rng.choice(keys) if keys else "new"
                inner = node[key] if keys else None
                if isinstance(inner, dict | list) and inner and rng.random() < 0.7:
                    node = inner
                    continue
                if isinstance(node, dict) or keys:
                    node[key] = copy.deepcopy(rng.choice(values))
                break
        try:
            study_from(raw, "s.yaml")
        except ConfigError as error:
            assert str(error)


def test_reading_configuration_loads_no_heavy_library() -> None:
    code = "import sys, pipeline.study.config, pipeline.plan.planner, pipeline.store.local; print([m for m in ('torch', 'ray', 'mlflow', 'open_clip') if m in sys.modules])"
    answer = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.strip() == "[]"
