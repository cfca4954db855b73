"""A study that is changed in its OUT, and changed back: the answers of MLflow, status and the alias."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipeline.store.local import Store
from pipeline.study.config import study_from
from pipeline.tracking.mlflow.local import local_uri
from pipeline.tracking.outbox import glance
from pipeline.tracking.session import Tracking, git_tags
from pipeline.tracking.tracker import Tracker, sync
from tests.pipeline.tracked_study import EXPERIMENT, Tracked, deliver, exported

FIRST, CHANGED = {"tasks": ("animals",)}, {"tasks": ("animals", "scripts")}


def alias_of(study: Tracked, alias: str = "best") -> Any:
    from mlflow import MlflowClient

    uri = local_uri(study.out)
    return MlflowClient(uri, registry_uri=uri).get_model_version_by_alias("demo", alias)


def weights_of(study: Tracked) -> str | None:
    served = study.plan.trajectories[-1].points[-1].deployed
    return study.records[served].sha256("open_clip_model.safetensors")


def tell(study: Tracked) -> None:
    outbox = study.outbox()
    study.tell(outbox)
    assert deliver(study, outbox) is None
    outbox.close()


def test_alias_follows_a_study_that_is_changed_and_changed_back(make_study: Callable[..., Tracked]) -> None:
    first, changed = make_study("one", **FIRST), make_study("one", **CHANGED)
    assert weights_of(first) != weights_of(changed)
    for study in (first, changed, first, changed):
        tell(study)
        assert alias_of(study).tags["sha256"] == weights_of(study)
    versions = [item["version"] for item in exported(first) if "registered" in item]
    assert versions == ["1", "2"], "going back makes no further version"


def test_alias_is_that_of_the_last_run_also_when_the_tracker_was_away(
    make_study: Callable[..., Tracked],
) -> None:
    first, changed = make_study("one", **FIRST), make_study("one", **CHANGED)
    for study in (first, changed, first):
        outbox = study.outbox()
        tracker = Tracker(study.out, outbox, uri=None, experiment=EXPERIMENT)  # never started: it is away
        study.tell(outbox)
        assert tracker.pending() > 0
        outbox.close()
    assert sync(first.out) == (0, None)
    assert alias_of(first).tags["sha256"] == weights_of(first)
    assert len([item for item in exported(first) if "registered" in item]) == 2, "both plans have a version"


def test_run_of_a_checkout_says_its_commit_and_whether_it_was_changed(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        line = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()

    assert git_tags(tmp_path) == {}, "no checkout"
    git("init", "-q")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "file.py").write_text("1")
    git("add", "-A")
    git("commit", "-qm", "one")
    commit = git("rev-parse", "HEAD")
    assert git_tags(tmp_path) == {"mlflow.source.git.commit": commit, "mlflow.git.dirty": "false"}
    (tmp_path / "code" / "file.py").write_text("2")
    assert git_tags(tmp_path)["mlflow.git.dirty"] == "true"
    assert git_tags(tmp_path / "code") == {}, "an environment inside of somebody's checkout"


def test_plans_of_one_out_are_told_apart_by_the_names_of_their_parent_runs(
    make_study: Callable[..., Tracked],
) -> None:
    first, changed = make_study("one", **FIRST), make_study("one", **CHANGED)
    changed.facts = type(first.facts)(
        **{**vars(changed.facts), "title": f"demo · {changed.plan.fingerprint[:8]}", "earlier": ("demo",)}
    )
    tell(first)
    assert (glance(first.out).others, glance(first.out).results_of) == ((), None)
    (first.out / "results.json").write_text("{}")
    tell(first)
    outbox = changed.outbox()
    changed.tell(outbox, finish=False)
    said = glance(first.out)
    assert said.others == ("demo",) and said.results_of == "demo", "it is begun, and has no results yet"
    changed.tell(outbox)
    assert deliver(changed, outbox) is None
    outbox.close()
    assert glance(first.out).results_of is None
    parents = [item for item in exported(first) if item.get("parent", "") is None]
    names = {item["name"]: item["tags"]["mlflow.note.content"] for item in parents}
    assert set(names) == {"demo", f"demo · {changed.plan.fingerprint[:8]}"}
    assert "demo came before" in names[f"demo · {changed.plan.fingerprint[:8]}"]
    tell(first)
    assert glance(first.out).others == (f"demo · {changed.plan.fingerprint[:8]}",)


def test_run_of_a_changed_study_says_what_it_keeps_and_replaces(
    make_study: Callable[..., Tracked],
) -> None:
    first, changed = make_study("one", **FIRST), make_study("one", **CHANGED)
    said = []
    for study in (first, first, changed, first):
        workspace: Any = SimpleNamespace(
            study=study_from(dict(study.facts.settings)), plan=study.plan, store=Store(study.out / "store"), out=study.out,
            recipes=frozenset(),
        )  # fmt: skip
        tracking = Tracking(workspace)
        said.append(tracking.notes)
        tracking.recorder.study_started(1)
        tracking.outbox.close()
    assert said[0] == said[1] == []
    name = f"demo · {changed.plan.fingerprint[:8]}"
    (there,), (back,) = said[2:]
    for words in (
        "'demo' in MLflow",
        "stream.tasks",
        f"temporal-merge gc {first.out}",
        "demo@best",
        f"is {name!r}",
    ):
        assert words in there, there
    assert f"({name!r} in MLflow)" in back and "is 'demo'" in back
    assert glance(first.out).others == (name,)
