"""Adapters as arrivals: two small files come, and the expert is what they make of the weights that training started from."""

import hashlib
import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from merge_service.checkpoints import WEIGHTS_FILE, Checkpoint, sha256_of, write_adapted
from merge_service.errors import UserError
from merge_service.live import Received, plain
from merge_service.live.values import of_plain
from pipeline.service.client import Service, ServiceError
from pipeline.service.home import Home
from pipeline.service.operations import Operations, Sender
from tests.merge_service.toys import save
from tests.pipeline.service import toys
from tests.pipeline.service.conftest import set_up
from tests.pipeline.service.live_toys import LiveService, reached, worked
from tests.pipeline.service.outside import until
from tests.pipeline.service.test_app import problem
from tests.pipeline.service.test_live_http import Make, incoming, live, make_live
from tests.serving_toys import Zoo

__all__ = ["live", "make_live"]
RANK = 8
CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["mlp"]}


def adapter(room: Path, task: str, **config: object) -> Path:
    """The folder of an adapter that moves along a task's direction, as peft writes it."""
    factors = {}
    for name, by in toys.direction(task).items():
        if by.ndim == 2:
            u, s, v = np.linalg.svd(toys.SIZE * by)
            module = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{module}.lora_A.weight"] = v[:RANK].astype(np.float32)
            factors[f"{module}.lora_B.weight"] = (u[:, :RANK] * s[:RANK]).astype(np.float32)
    room.mkdir(parents=True, exist_ok=True)
    save(room / "adapter_model.safetensors", factors)
    (room / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    return room


def weights(path: Path) -> dict[str, np.ndarray]:
    with Checkpoint.open(path) as opened:
        return {name: opened.read(name).copy() for name in opened.tensors}


def test_adapter_becomes_the_expert_that_it_makes_of_the_base(zoo: Zoo, tmp_path: Path) -> None:
    toys.home(tmp_path / "out")
    setup, _, tokens = set_up(zoo, tmp_path / "state", out=tmp_path / "out")
    folders = [adapter(tmp_path / task, task) for task in toys.TASKS[:2]]
    with (
        reached(setup) as at,
        worked(tmp_path / "out"),
        Service(at.url, tokens["submitter"]) as service,
    ):
        came = [service.arrive(one, one.name, owner="ann") for one in folders]
        for one in came:
            service.wait(one.id)
        found = list(service.arrivals())  # the first may have been served alone until the second came
        assert service.arrive(folders[0], "task0", owner="ann").id == came[0].id  # it came before
    assert [one.id for one in found] == [one.id for one in came]
    assert [one.status for one in found] == ["superseded", "promoted"]
    assert [one.adapter for one in found] == [sha256_of(one / "adapter_model.safetensors") for one in folders]
    state = Home.open(tmp_path / "out").log.state
    assert [state.arrivals[one.id].adapter for one in came] == [one.adapter for one in found]
    other = toys.home(tmp_path / "other")
    for one in folders:
        write_adapted(other.base.path, one, tmp_path / f"{one.name}.safetensors")
        toys.arrive(other, tmp_path / f"{one.name}.safetensors", one.name)
    assert state.served.sha256 == other.log.state.served.sha256


def test_adapter_with_a_ticket_stands_on_the_weights_of_the_ticket(zoo: Zoo, tmp_path: Path) -> None:
    toys.home(tmp_path / "out", "best_in_time")
    setup, _, tokens = set_up(zoo, tmp_path / "state", out=tmp_path / "out")
    with (
        reached(setup) as at,
        worked(tmp_path / "out"),
        Service(at.url, tokens["submitter"]) as service,
    ):
        service.wait(service.arrive(toys.expert(tmp_path, "task0"), "task0", owner="ann").id)
        start = service.next("task1", tmp_path / "start")
        folder = adapter(tmp_path / "task1", "task1")
        with pytest.raises(ServiceError, match="start ticket") as refused:  # of which weights, nobody says
            service.arrive(folder, "task1", owner="ann")
        assert refused.value.code == "upload.unfit"
        found = service.wait(service.arrive(folder, "task1", start.ticket, owner="ann").id)
    home = Home.open(tmp_path / "out")
    assert found.init == start.sha256 != home.base.sha256(WEIGHTS_FILE)
    before, after = weights(tmp_path / "start" / WEIGHTS_FILE), weights(home.experts.path(found.sha256))
    name = "visual.transformer.resblocks.0.mlp.weight"
    expected = toys.SIZE * toys.direction("task1")[name].reshape(-1)
    moved = after[name] - before[name]
    assert moved @ expected > 0.8 * (expected @ expected)
    assert np.array_equal(after["visual.ln_pre.bias"], before["visual.ln_pre.bias"])


@pytest.mark.parametrize(
    "strategy", ["best_in_time", {"init": "all", "deploy": "all", "technique": "average"}]
)
def test_adapter_that_comes_late_stands_on_a_version_that_was_dropped_meanwhile(
    zoo: Zoo, tmp_path: Path, strategy: object
) -> None:
    toys.home(tmp_path / "out", strategy, serving={"keep_warm": 1})
    setup, _, tokens = set_up(zoo, tmp_path / "state", out=tmp_path / "out")
    with (
        reached(setup) as at,
        worked(tmp_path / "out"),
        Service(at.url, tokens["submitter"]) as service,
    ):
        for task in toys.TASKS[:2]:
            start = service.next(task, tmp_path / task)
            service.wait(service.arrive(toys.expert(tmp_path, task), task, start.ticket, owner="ann").id)
        start = service.next("task5", tmp_path / "start")
        for task in toys.TASKS[2:4]:
            own = service.next(task, tmp_path / task)
            service.wait(service.arrive(toys.expert(tmp_path, task), task, own.ticket, owner="ann").id)
        home = Home.open(tmp_path / "out")
        until(lambda: home.models.known(home.log.refresh(), start.sha256) is None)
        kept = {one.name: one.read_bytes() for one in home.models.folder.states.iterdir()}
        folder = adapter(tmp_path / "task5", "task5")
        found = service.wait(service.arrive(folder, "task5", start.ticket, owner="ann").id)
    write_adapted(tmp_path / "start" / WEIGHTS_FILE, folder, tmp_path / "whole.safetensors")
    assert found.sha256 == sha256_of(tmp_path / "whole.safetensors") and found.init == start.sha256
    now = {one.name: one.read_bytes() for one in home.models.folder.states.iterdir() if one.name in kept}
    assert now.items() <= kept.items()
    assert not list((home.store.root / ".stage").iterdir())


def test_adapter_without_http_is_the_same_expert(tmp_path: Path) -> None:
    home = toys.home(tmp_path / "out")
    folder = adapter(tmp_path / "task0", "task0")
    found = toys.arrive(home, folder, "task0")
    write_adapted(home.base.path, folder, tmp_path / "whole.safetensors")
    arrival = home.log.state.arrivals[found]
    assert arrival.status == "accepted" and arrival.sha256 == sha256_of(tmp_path / "whole.safetensors")
    with pytest.raises(UserError, match="foreign"):
        Operations(home).arrive(folder, Sender("task1", "tests", init="foreign"))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        Operations(home).arrive(folder, Sender("task1", "tests"))


def test_path_in_the_configuration_of_an_adapter_is_not_looked_for(tmp_path: Path) -> None:
    home = toys.home(tmp_path / "out")
    named = adapter(tmp_path / "named", "task0", base_model_name_or_path=str(toys.expert(tmp_path, "task1")))
    taken = home.experts.take(named, 10**9, lambda: nullcontext(home.base.path))
    plain_one = adapter(tmp_path / "plain", "task0")
    assert home.experts.take(plain_one, 10**9, lambda: nullcontext(home.base.path)).sha256 == taken.sha256


def sent(live: LiveService, folder: Path, **names: str) -> str:
    """The id of the upload of an adapter; `names` are other names for files."""
    files = [(names.get(one.stem, one.name), one.read_bytes()) for one in sorted(folder.iterdir())]
    said = [
        {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files
    ]
    came = live.ask("POST", "/v1/uploads", "submitter", json={"task": "task0", "files": said})
    if came.status_code != 201:
        return problem(came)
    for name, data in files:
        assert live.put(came.json()["id"], name, 0, data).status_code == 204
    return str(came.json()["id"])


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"peft_type": "VERA"}, "VERA"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"r": 4, "lora_alpha": "x"}, "lora_alpha"),
        ({"target_modules": None, "layer_replication": [[0, 1]]}, "layer_replication"),
    ],
)
def test_adapter_that_cannot_be_read_is_refused_with_the_reason_and_leaves_nothing(
    live: LiveService, tmp_path: Path, config: dict[str, object], says: str
) -> None:
    number = sent(live, adapter(tmp_path / "a", "task0", **config))
    asked = {"task": "task0", "upload": number, "owner": "ann"}
    answer = live.ask("POST", "/v1/arrivals", "submitter", json=asked)
    assert problem(answer) == "upload.unfit" and says in answer.json()["detail"]
    assert str(live.out) not in answer.text and not incoming(live)


def test_adapter_of_another_model_or_with_other_files_is_refused(
    live: LiveService, tmp_path: Path, make_live: Make
) -> None:
    foreign = adapter(tmp_path / "a", "task0")
    save(
        foreign / "adapter_model.safetensors",
        {"base_model.model.x.lora_A.weight": np.ones((RANK, 4), np.float32)},
    )
    asked = {"task": "task0", "upload": sent(live, foreign), "owner": "ann"}
    answer = live.ask("POST", "/v1/arrivals", "submitter", json=asked)
    assert problem(answer) == "upload.unfit" and str(live.out) not in answer.text
    good = adapter(tmp_path / "b", "task0")
    assert sent(live, good, adapter_model="model.safetensors") == "upload.files"
    (good / "more.safetensors").write_bytes(b"x")
    assert sent(live, good) == "upload.files"
    (good / "more.safetensors").unlink()
    (good / "adapter_config.json").write_text(" " * (1 << 20) + json.dumps(CONFIG))
    assert sent(live, good) == "upload.files"


def test_adapter_that_is_not_finite_is_quarantined(live: LiveService, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", "task0")
    with Checkpoint.open(folder / "adapter_model.safetensors") as opened:
        tensors = {
            name: opened.read(name).reshape(info.shape).copy() for name, info in opened.tensors.items()
        }
    next(iter(tensors.values()))[0, 0] = np.nan
    save(folder / "adapter_model.safetensors", tensors)
    asked = {"task": "task0", "upload": sent(live, folder), "owner": "ann"}
    number = live.ask("POST", "/v1/arrivals", "submitter", json=asked).json()["id"]
    live.work()
    one = live.ask("GET", f"/v1/arrivals/{number}").json()
    assert (one["status"], one["reasons"]) == ("quarantined", ["format.non_finite"])


def test_entry_without_an_adapter_has_the_text_that_it_had_before_there_were_any() -> None:
    data = Received("task", "0" * 64, 1, "base", "ann")
    assert "adapter" not in plain(data) and of_plain(Received, plain(data)) == data
    with_one = Received("task", "0" * 64, 1, "base", "ann", adapter="1" * 64)
    assert plain(with_one)["adapter"] == "1" * 64 and of_plain(Received, plain(with_one)) == with_one


def test_weights_of_an_adapter_without_its_configuration_are_quarantined(tmp_path: Path) -> None:
    home, folder = toys.home(tmp_path / "out"), adapter(tmp_path / "a", "task0")
    (folder / "adapter_config.json").unlink()
    found = toys.arrive(home, folder / "adapter_model.safetensors", "task0")
    arrival = home.log.state.arrivals[found]
    assert (arrival.status, arrival.reasons) == ("quarantined", ("format.adapter",))
