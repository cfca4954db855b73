"""The command `trajectory` and the callback for training loops: folders, records, refusals, scores, and going on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import temporal_merge as tm
from merge_service.errors import UserError
from pipeline.merging.along import Along, merge_along
from tests.merge_service.toys import load, save
from tests.pipeline.recipes.tiny import write_models


def checkpoints(room: Path, count: int = 4) -> list[Path]:
    rng = np.random.default_rng(3)
    return [
        save(room / f"step-{step}.safetensors", {"w": rng.normal(size=(4, 5)).astype(np.float32)})
        for step in range(1, count + 1)
    ]


def test_command_makes_all_averages_and_goes_on(tmp_path: Path, cli: Callable[..., Any]) -> None:
    paths = [str(path) for path in checkpoints(tmp_path)]
    words = ["--windows", "2,4", "--shapes", "mean,1-sqrt", "--out", str(tmp_path / "out"), "--json"]
    first = json.loads(cli("trajectory", *paths[::-1], *words).out)
    assert (first["written"], sorted(first["averages"])) == (4, ["1-sqrt-2", "1-sqrt-4", "mean-2", "mean-4"])
    (tmp_path / "out" / "mean-4.safetensors").unlink()
    again = json.loads(cli("trajectory", *paths, *words).out)
    assert (again["written"], again["kept"]) == (1, 3)
    assert json.loads((tmp_path / "out" / "trajectory.json").read_text())["averages"] == again["averages"]
    more = json.loads(cli("trajectory", *paths, "--windows", "3", "--shapes", "ema", *words[4:]).out)
    assert len(more["averages"]) == 5
    held = [load(Path(path))["w"].astype(np.float64) for path in paths]
    np.testing.assert_allclose(load(tmp_path / "out" / "mean-4.safetensors")["w"], sum(held) / 4, atol=1e-7)


def test_averages_of_other_checkpoints_are_replaced_only_on_demand(
    tmp_path: Path, cli: Callable[..., Any]
) -> None:
    paths = [str(path) for path in checkpoints(tmp_path)]
    words = ["--windows", "2", "--shapes", "mean", "--out", str(tmp_path / "out")]
    cli("trajectory", *paths[:3], *words)
    before = (tmp_path / "out" / "mean-2.safetensors").read_bytes()
    refused = cli("trajectory", *paths, *words)
    assert refused.code == 2 and "holds averages of other checkpoints" in refused.err
    assert (tmp_path / "out" / "mean-2.safetensors").read_bytes() == before
    cli("trajectory", *paths, *words, "--force")
    assert (tmp_path / "out" / "mean-2.safetensors").read_bytes() != before
    assert "give --study too" in cli("trajectory", *paths, *words, "--split", "val").err
    with pytest.raises(UserError, match="holds other files"):
        merge_along(Along([Path(path) for path in paths], tmp_path, [2]))


def test_folders_of_transformers_give_folders(tmp_path: Path) -> None:
    write_models(tmp_path)
    made = tm.trajectory(
        [tmp_path / name for name in ("base", "a", "b")], tmp_path / "out", windows=[2, 3], shapes=["mean"]
    ).made
    folder = made.paths["mean-3"]
    assert {"README.md", "config.json", "model.safetensors"} == {path.name for path in folder.iterdir()}
    assert "| base | 0.333333 |" in (folder / "README.md").read_text()


def test_arrivals_keep_the_longest_window_and_average_what_is_full(tmp_path: Path) -> None:
    arrivals = tm.Arrivals(tmp_path, windows=[2, 3], shapes=["mean"])
    embedding = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    states = [
        {
            "embed": embedding + step,
            "head": embedding + step,
            "half": torch.full((3,), step, dtype=torch.bfloat16),
        }
        for step in range(5)
    ]
    for state in states:
        state["head"] = state["embed"]
    found = [arrivals.add(state, 10 * step) for step, state in enumerate(states)]
    assert [sorted(one.averages) for one in found] == [[], ["mean-2"], *[["mean-2", "mean-3"]] * 3]
    assert [path.name for path in arrivals.checkpoints] == [
        f"step-{step:09d}.safetensors" for step in (20, 30, 40)
    ]
    made = load_file(found[-1].averages["mean-3"])
    assert torch.allclose(made["embed"], embedding + 3) and torch.equal(made["embed"], made["head"])
    assert made["half"].dtype == torch.bfloat16 and made["half"].tolist() == [3.0] * 3


def test_same_state_again_changes_nothing_and_an_earlier_step_goes_back(tmp_path: Path) -> None:
    arrivals = tm.Arrivals(tmp_path, windows=[2], shapes=["ema"])
    states = [{"w": np.full(3, step, np.float32)} for step in range(3)]
    for step, state in enumerate(states):
        arrivals.add(state, step)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    arrivals.add(states[2], 2)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == before
    arrivals.add({"w": np.full(3, 7, np.float32)}, 1)
    assert [path.name for path in arrivals.checkpoints] == ["step-000000001.safetensors"]


@pytest.mark.parametrize(
    ("state", "step", "said"),
    [
        ({"w": np.zeros(2, np.float32)}, -1, "0 or more"),
        ({"w": torch.zeros(2, device="meta")}, 3, "meta device"),
        ({"v": np.zeros(2, np.float32)}, 3, "does not have the tensors"),
        ({"w": np.array([np.nan, 0], np.float32)}, 3, "NaN"),
    ],
)
def test_callback_refuses_what_cannot_be_averaged(tmp_path: Path, state: dict, step: int, said: str) -> None:
    arrivals = tm.Arrivals(tmp_path, windows=[2], shapes=["mean"])
    arrivals.add({"w": np.ones(2, np.float32)}, 1)
    with pytest.raises(UserError, match=said):
        arrivals.add(state, step)
