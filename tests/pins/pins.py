"""Values that users keep and compare, computed from fixed inputs; they must not change without a decision.

`pinned.json`, `tracked.json` and `help.json` hold the last accepted result of each function below; `test_pins.py` compares. A
change that moves one on purpose says so and runs `python -m tests.pins.pins`, which writes the files again.

Invariant: nothing here depends on installed data, time, place, or the number of threads.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from merge_service import techniques
from merge_service.checkpoints import sha256_of
from merge_service.merge import advance, fold, merge
from pipeline.cli.app import PANELS, app
from pipeline.cli.service import COMMANDS as SERVICE
from pipeline.identity import fingerprint
from pipeline.plan.planner import make_plan
from pipeline.plan.steps import DatasetFacts, Facts, ModelFacts
from pipeline.study.config import load_study, study_from
from pipeline.study.sections import key_of
from pipeline.study.streams import datasets_of, make_stream
from pipeline.tracking.mlflow.local import LOCAL_DB
from tests.merge_service.rounding import BY_MACHINE
from tests.merge_service.toys import dyadic, moved, save, towers
from tests.pipeline.tracked_study import deliver, exported, finished_study
from workers.data.mini import ROLES

ROOT = Path(__file__).parents[2]
PINNED = Path(__file__).parent / "pinned.json"
TRACKED = Path(__file__).parent / "tracked.json"
HELP = Path(__file__).parent / "help.json"
STUDIES = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "configs").rglob("*.yaml")
    if "\ngrid:" in path.read_text()
)
TECHNIQUES = tuple(
    name for name in techniques.names() if techniques.get(name).origin is None and name not in BY_MACHINE
)


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def plans() -> dict[str, str]:
    """Of every study under configs/: its trajectories and the fingerprints of their steps, on invented facts."""
    return {name: digest(_plan(name)) for name in STUDIES}


def _plan(name: str) -> list[Any]:
    os.chdir(ROOT)
    study = load_study(Path(name))
    if study.data.suite == "mini":
        tree = yaml.safe_load(study.resolved_yaml())
        tree["data"] |= {"suite": None, "root": "data/mini", **ROLES}
        study = study_from(tree)
    study = study.resolved()
    roles = study.roles
    names = (*study.learnt, *roles.pretraining, *roles.adaptation, *roles.held_out)
    datasets = {
        name: DatasetFacts(
            {split: fingerprint([name, split]) for split in ("train", "test", "val")}, fingerprint(name), {}
        )
        for name in names
    }
    models: dict[str, ModelFacts] = defaultdict(lambda: ModelFacts("unknown"))
    for model in study.models:
        costs = dict.fromkeys(("all", "image", "text"), 0.05 if model.config.startswith("tiny") else 40.0)
        models[key_of(model)] = ModelFacts(
            fingerprint([model.config, model.pretrained]),
            model.config,
            costs,
            dict.fromkeys(costs, 0.8),
            1_000_000,
        )
    streams = {}
    for section in study.streams:
        filled = study.filled(section)
        classes = {name: [f"{name}-{i}" for i in range(12)] for name in datasets_of(filled)}
        streams[key_of(section)] = make_stream(filled, classes)
    experts = {task: fingerprint([task, path]) for task, path in study.experts.items()}
    plan = make_plan(study, Facts(datasets, models, streams, experts=experts))
    trajectories = [
        [t.id, t.base, [[p.train, p.merge, p.deployed, p.evaluate] for p in t.points]]
        for t in plan.trajectories
    ]
    return [trajectories, sorted(plan.steps), sorted(plan.bases)]


def merges(technique: str, **way: Any) -> dict[str, str]:
    """sha256 of the merges of a study: the merge of three experts, a fold, and the third arrival of a stream.

    `way` is how the merge is carried out: threads, block, device.
    """
    plugin = techniques.get(technique)
    found = {}
    with tempfile.TemporaryDirectory() as room:
        base, experts = _files(Path(room), plugin.arity or 3)
        ids = [f"{i:064x}" for i in range(1, len(experts) + 1)]
        sha256 = {name: sha256_of(path) for name, path in zip(ids, experts)}
        out = Path(room) / "out.safetensors"
        merge(technique, {}, base, experts, out, ids=ids, sha256=sha256, **way)
        found["merge"] = sha256_of(out)
        if "fold" in plugin.forms:
            fold(technique, {}, base, experts[0], experts[1], out, ids=(ids[0], ids[1]), sha256=sha256, **way)
            found["fold"] = sha256_of(out)
        if "stream" in plugin.forms:
            state = None
            for number, (name, path) in enumerate(zip(ids, experts)):
                after = Path(room) / f"state-{number}.safetensors"
                advance(
                    technique,
                    {},
                    base,
                    path,
                    out,
                    expert_id=name,
                    state_in=state,
                    state_out=after,
                    sha256=sha256,
                    **way,
                )
                state = after
            found["stream"] = sha256_of(out)
    return {form: value[:32] for form, value in found.items()}


def _files(room: Path, count: int) -> tuple[Path, list[Path]]:
    rng = np.random.default_rng(11)
    base = towers(rng)
    base["visual.proj"] = dyadic(rng, (40, 24), 64)
    start = save(room / "base.safetensors", base)
    return start, [
        save(room / f"e{i}.safetensors", moved(rng, base, spread=4, frozen=("visual.ln_pre.bias",)))
        for i in range(count)
    ]


def tracked(empty_store: Path | None = None) -> list[dict[str, Any]]:
    """The content of MLflow for a small study with invented results. `empty_store`: a tracking store to copy instead of creating
    one.
    """
    with tempfile.TemporaryDirectory() as room:
        study = finished_study(
            Path(room) / "out", strategies=("zero_shot", "best_in_time"), tasks=("animals", "scripts")
        )
        if empty_store is not None:
            shutil.copyfile(empty_store, study.out / LOCAL_DB)
        outbox = study.outbox()
        study.tell(outbox)
        deliver(study, outbox)
        outbox.close()
        return exported(study)


def helps() -> dict[str, str]:
    """The text of every command's --help, without the frames and line breaks that depend on a terminal's width."""
    commands = [one.__name__.replace("_", "-") for panel in PANELS.values() for one in panel]
    assert {*commands, "service"} == set(get_command(app).commands)
    commands += [f"service {one.__name__}" for one in SERVICE]
    wide = CliRunner(env={"COLUMNS": "4000", "NO_COLOR": "1", "TERM": "dumb"})
    texts = {name: wide.invoke(app, [*name.split(), "--help"]).stdout for name in ("", *commands)}
    return {name: re.sub(r"[\s─│╭╮╰╯]+", " ", text).strip() for name, text in texts.items()}


def everything() -> dict[str, Any]:
    return {"plans": plans(), "merges": {name: merges(name) for name in TECHNIQUES}}


if __name__ == "__main__":
    PINNED.write_text(json.dumps(everything(), indent=1, sort_keys=True) + "\n")
    TRACKED.write_text("[\n" + ",\n".join(json.dumps(one) for one in tracked()) + "\n]\n")
    HELP.write_text(json.dumps(helps(), indent=1, ensure_ascii=False) + "\n")
