"""A small study, planned and finished without training, as tracking sees one, with real records and files."""

import hashlib
import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_service.checkpoints import CONFIG_FILE, WEIGHTS_FILE
from pipeline.plan.steps import DatasetFacts, Facts, ModelFacts, Plan, Step
from pipeline.store.artifact import Record
from pipeline.store.local import Store
from pipeline.study.config import study_from
from pipeline.tracking.mlflow.export import export
from pipeline.tracking.mlflow.local import local_uri
from pipeline.tracking.outbox import FILE, Entry, Outbox
from pipeline.tracking.recorder import Recorder
from pipeline.tracking.rows.events import Projection, StudyFacts
from pipeline.tracking.tracker import Tracker
from tests.pipeline.plan_toys import base_of, make_plan

TASKS = ("animals", "scripts", "photos_b")
HELD_OUT = ("mnist", "icons")
STRATEGIES = ("zero_shot", "offline_merging", "continual_finetuning", "best_in_time")
EXPERIMENT = "tests"
START_MS = 1_790_000_000_000
MODEL_FILES = [
    "MLmodel", "code", "conda.yaml", "input_example.json", "manifest.json", "open_clip_config.json", "open_clip_model.safetensors",
    "python_env.yaml", "requirements.txt", "serving_input_example.json",
]  # fmt: skip
"""What a logged model consists of."""


@dataclass
class Tracked:
    """A plan with the records of all its steps in a store below `out`."""

    out: Path
    plan: Plan
    base: Record
    records: dict[str, Record]
    facts: StudyFacts

    def projection(self) -> Projection:
        return Projection(self.plan, self.facts, {self.base.fingerprint: self.base})

    def outbox(self) -> Outbox:
        return Outbox(self.out / FILE)

    def tell(
        self,
        outbox: Outbox,
        order: Sequence[str] | None = None,
        *,
        finish: bool = True,
        best: str | None = None,
    ) -> Recorder:
        """Record the whole study in an outbox, its steps in the plan's order unless another is given. `best` is registered; by
        default the last trajectory.
        """
        best = best or self.plan.trajectories[-1].id
        recorder = Recorder(self.projection(), outbox, self.out)
        recorder.study_started(START_MS)
        for fingerprint in self.plan.steps if order is None else order:
            recorder.step_done(self.plan.steps[fingerprint], self.records[fingerprint])
        if finish:
            recorder.study_finished("trajectory,t,gm\nbest_in_time,3,0.5\n", best)
        return recorder


def finished_study(
    out: Path,
    *,
    strategies: Sequence[Any] = STRATEGIES,
    seeds: Sequence[int] = (0,),
    tasks: Sequence[str] = TASKS,
    axes: Mapping[str, Any] | None = None,
    log_weights: bool = True,
    weights: Path | None = None,
) -> Tracked:
    """Plan a study and commit an invented result for each of its steps; all weights are those in the directory `weights`, or no
    weights at all but a file."""
    study = study_from(
        {
            "name": "demo",
            "model": {"config": "tiny-clip"},
            "data": {
                "root": "data/mini",
                "pretraining": ["letters"],
                "adaptation": list(tasks),
                "held_out": list(HELD_OUT),
            },
            "stream": {"tasks": list(tasks)},
            "recipe": {"lr": 1e-3, "batch_size": 32, "precision": "fp32"},
            "budget": {"steps_per_task": 20},
            "grid": {"strategies": list(strategies), "seed": list(seeds), **(axes or {})},
        }
    ).resolved()
    names = (*tasks, *HELD_OUT, "letters")
    datasets = {name: DatasetFacts({s: digest(name + s) for s in ("train", "test", "val")}) for name in names}
    plan = make_plan(study, Facts(datasets, defaultdict(lambda: ModelFacts(digest("base"))), {}))
    out.mkdir(parents=True, exist_ok=True)
    store = Store(out / "store")
    store.prepare()
    base = _commit(store, plan.bases[base_of(plan)], {}, weights)
    records = {fp: _commit(store, step, _result(plan, step), weights) for fp, step in plan.steps.items()}
    (out / "study.yaml").write_text(study.resolved_yaml())
    (out / "plan.json").write_text("{}\n")
    registry = {"name": "demo", "by": "gm", "alias": "best"}
    facts = StudyFacts(study.model_dump(mode="json"), "0.1.0", log_weights, registry=registry)
    return Tracked(out, plan, base, records, facts)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _commit(store: Store, step: Step, result: dict[str, Any], weights: Path | None) -> Record:
    with store.staged(step) as stage:
        if step.kind != "evaluate" and weights is not None:
            for name in (WEIGHTS_FILE, CONFIG_FILE):
                shutil.copyfile(weights / name, stage / name)
        elif step.kind != "evaluate":
            (stage / WEIGHTS_FILE).write_bytes(step.fingerprint.encode() * 16)
            (stage / CONFIG_FILE).write_text("{}")
        return store.commit(step, stage, result, seconds=2.5)


def _result(plan: Plan, step: Step) -> dict[str, Any]:
    """Invented, but a function of the step alone: scores rise with t on tasks seen, fall a little on the others."""
    if step.kind == "train":
        curve = [[index, 2.0 / (1 + index / 4) + step.t / 10] for index in range(2, 21, 2)]
        return {
            "steps": 20, "samples": 640, "seconds": 2.0, "samples_per_second": 320.0, "loss": curve,
            "lr": [1e-4, 1e-3, 1e-6], "task_vector_norm": 0.5, "resumed_from": None,
            "system": {"time_ms": [START_MS, START_MS + 10_000], "cpu_utilization_percentage": [80.0, 90.0]},
        }  # fmt: skip
    if step.kind == "merge":
        return {"merge_seconds": 0.1, "merged_norm": 0.4 + step.t / 10, "expert_norm": 0.5, "cosine": 0.6}
    served = plan.steps.get(step.inputs["model"])
    spread = int(digest(step.fingerprint)[:4], 16) / 2**16 / 50
    scores = {}
    for source in step.spec["datasets"]:
        name = source["dataset"]
        learnt = served is not None and name in plan.trajectories[0].stream[: step.t]
        scores[name] = round((0.6 if learnt else 0.4) - step.t / 100 + spread, 6)
    return {"scores": scores, "samples": dict.fromkeys(scores, 100), "seconds": 0.5}


def deliver(study: Tracked, outbox: Outbox, on_sent: Callable[[Entry], None] | None = None) -> str | None:
    """Run a flusher until all is delivered."""
    tracker = Tracker(study.out, outbox, uri=None, experiment=EXPERIMENT)
    tracker.on_sent = on_sent or tracker.on_sent
    tracker.start()
    assert tracker.close(240) == 0, tracker.last_error
    return tracker.last_error


def exported(study: Tracked) -> list[dict[str, Any]]:
    """The export without places and times, named by content."""
    text = json.dumps(export(local_uri(study.out), EXPERIMENT))
    return json.loads(text.replace(str(study.out), "OUT"))
