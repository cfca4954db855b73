"""The experts of a study come to a service: in time-step order, once, with the ticket of what they started from."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from merge_service.checkpoints import ADAPTER_FOLDER, CONFIG_FILE, WEIGHTS_FILE, sha256_of, write_adapted
from merge_service.errors import UserError
from merge_service.merge import merge
from pipeline.errors import ConfigError
from pipeline.plan.steps import Step
from pipeline.run.events import read_events
from pipeline.service.client import Service
from pipeline.service.client.delivery import Delivery, experts_of
from pipeline.service.home import Home
from pipeline.workspace.workspace import Workspace
from tests.merge_service import toys as files
from tests.pipeline.plan_toys import base_of, facts, make_plan, study
from tests.pipeline.service import toys
from tests.pipeline.service.conftest import set_up
from tests.pipeline.service.live_toys import Reached, reached, worked
from tests.pipeline.service.test_adapters_arrive import adapter
from tests.serving_toys import Zoo

AVERAGE = {"init": "base", "deploy": "all", "technique": "average"}


def a_study(out: Path, strategy: Any, base: Path) -> Workspace:
    """A study of two tasks, d1 and d2, whose base is in its store and whose experts are not."""
    asked, known = study([strategy], tasks=2), facts(2)
    workspace = Workspace(asked, out, make_plan(asked, known), known)
    workspace.store.prepare()
    commit(workspace, workspace.plan.bases[base_of(workspace.plan)], base)
    return workspace


def commit(workspace: Workspace, step: Step, weights: Path) -> None:
    with workspace.store.staged(step) as stage:
        shutil.copyfile(weights, stage / WEIGHTS_FILE)
        (stage / CONFIG_FILE).write_text("{}")
        workspace.store.commit(step, stage, {}, seconds=0.0)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return files.save(tmp_path / "base.safetensors", toys.base())


def served(zoo: Zoo, room: Path, strategy: Any, **more: Any) -> Iterator[tuple[Reached, str, Home]]:
    home = toys.home(room / "out", strategy, **more)
    setup, _, tokens = set_up(zoo, room / "state", out=room / "out")
    with reached(setup) as found, worked(room / "out"):
        yield found, tokens["submitter"], home


@pytest.fixture
def averaging(zoo: Zoo, tmp_path: Path) -> Iterator[tuple[Reached, str, Home]]:
    yield from served(zoo, tmp_path, AVERAGE)


def test_experts_that_end_in_any_order_come_in_time_step_order_and_once(
    averaging: tuple[Reached, str, Home], base: Path, tmp_path: Path
) -> None:
    reach, token, home = averaging
    workspace = a_study(tmp_path / "run", AVERAGE, base)
    paths = [toys.expert(tmp_path, task) for task in toys.TASKS[:2]]
    first, second = experts_of(workspace.plan)
    with Service(reach.url, token) as service:
        deliver = Delivery(service, {"license": "MIT", "owner": "ann"})
        with deliver(workspace):
            commit(workspace, second, paths[1])
            commit(workspace, first, paths[0])
        for one in service.arrivals():
            service.wait(one.id)
        came = [(one.id, one.task, one.license, one.init) for one in service.arrivals()]
        with deliver(workspace):  # the same command again
            pass
        assert [one.id for one in service.arrivals()] == [name for name, *_ in came]
    assert [said for _, *said in came] == [["d1", "MIT", "base"], ["d2", "MIT", "base"]]
    ids, out = ["t1", "t2"], tmp_path / "all.safetensors"
    merge("average", {}, base, paths, out, ids=ids, sha256=dict(zip(ids, map(sha256_of, paths))))
    assert home.log.refresh().served.sha256 == sha256_of(out)
    said = [one["text"] for one in read_events(workspace.out) if one["kind"] == "delivery"]
    assert [text.split()[-1] for text in said] == [name for name, *_ in came]


def test_expert_that_starts_from_the_one_before_waits_for_the_decision_and_brings_its_ticket(
    zoo: Zoo, base: Path, tmp_path: Path
) -> None:
    latest = {"init": "latest", "deploy": "latest"}
    workspace = a_study(tmp_path / "run", latest, base)
    for step, task in zip(experts_of(workspace.plan), toys.TASKS):
        commit(workspace, step, toys.expert(tmp_path, task))
    for reach, token, home in served(zoo, tmp_path, latest):
        with Service(reach.url, token) as service, Delivery(service, {"owner": "ann"})(workspace):
            pass
        with Service(reach.url, token) as service:
            found = [service.wait(one.id) for one in service.arrivals()]
        tickets = [one.init_seq for one in home.log.refresh().arrivals.values()]
    assert [one.init for one in found] == ["base", found[0].sha256]
    assert None not in tickets


def test_expert_that_is_an_adapter_goes_as_one(
    averaging: tuple[Reached, str, Home], base: Path, tmp_path: Path
) -> None:
    reach, token, _ = averaging
    workspace = a_study(tmp_path / "run", AVERAGE, base)
    first, second = experts_of(workspace.plan)
    folder = adapter(tmp_path / "d1", "task0")
    with workspace.store.staged(first) as stage:
        shutil.copytree(folder, stage / ADAPTER_FOLDER)
        write_adapted(base, folder, stage / WEIGHTS_FILE)
        (stage / CONFIG_FILE).write_text("{}")
        whole = sha256_of(stage / WEIGHTS_FILE)
        workspace.store.commit(first, stage, {}, seconds=0.0)
    commit(workspace, second, toys.expert(tmp_path, "task1"))
    with Service(reach.url, token) as service:
        with Delivery(service, {"owner": "ann"})(workspace):
            pass
        found = [service.wait(one.id) for one in service.arrivals()]
    assert (found[0].sha256, found[0].adapter) == (whole, sha256_of(folder / "adapter_model.safetensors"))
    assert found[1].adapter == "" and [one.init for one in found] == ["base", "base"]
    assert all("adapter_" in one for one in reach.puts() if "/adapter" in one) and len(reach.puts()) == 3


def test_expert_of_another_base_is_foreign_to_the_service(
    averaging: tuple[Reached, str, Home], tmp_path: Path
) -> None:
    reach, token, _ = averaging
    other = files.save(tmp_path / "other.safetensors", toys.moved(toys.direction("other"), 0.1))
    workspace = a_study(tmp_path / "run", AVERAGE, other)
    for step, task in zip(experts_of(workspace.plan), toys.TASKS):
        commit(workspace, step, toys.expert(tmp_path, task))
    with Service(reach.url, token) as service:
        with Delivery(service, {"owner": "ann"})(workspace):
            pass
        assert [one.init for one in service.arrivals()] == ["foreign", "foreign"]


def test_what_the_service_refuses_ends_the_delivery_and_not_the_study(
    zoo: Zoo, base: Path, tmp_path: Path
) -> None:
    workspace, went_on = a_study(tmp_path / "run", AVERAGE, base), threading.Event()
    for step, task in zip(experts_of(workspace.plan), toys.TASKS):
        commit(workspace, step, toys.expert(tmp_path, task))
    for reach, token, _ in served(zoo, tmp_path, AVERAGE, tasks={"open": False, "list": ["d1"]}):
        with Service(reach.url, token) as service:
            wrong = "1 of its 2 experts were not delivered: ServiceError: task.unknown"
            with pytest.raises(UserError, match=wrong), Delivery(service, {"owner": "ann"})(workspace):
                went_on.set()
            assert [one.task for one in service.arrivals()] == ["d1"]
    assert went_on.is_set()


def test_study_with_two_experts_of_a_task_is_refused() -> None:
    asked = study(["offline_merging", "best_in_time"], tasks=2)
    with pytest.raises(ConfigError, match=r"trains 2 experts of the task d\d"):
        experts_of(make_plan(asked, facts(2)))
