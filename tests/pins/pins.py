"""What must not move without a word: values that users keep and compare, computed anew from fixed inputs.

`pinned.json` holds what each function below answered when it was last decided on; `test_pins.py` compares. A change that moves
one on purpose says so and runs `python -m tests.pins.pins`, which writes the file anew.
Invariant: nothing here depends on installed data, time, place, or the number of threads.
"""

import hashlib
import json
import os
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from merge_service import techniques
from merge_service.checkpoint import sha256_of
from merge_service.merge import advance, fold, merge
from pipeline.config import load_study, study_from
from pipeline.fingerprint import fingerprint
from pipeline.plan import make_plan
from pipeline.sections import key_of
from pipeline.steps import DatasetFacts, Facts, ModelFacts
from pipeline.streams import datasets_of, make_stream
from tests.merge_service.toys import dyadic, moved, save, towers
from workers.data.mini import ROLES

ROOT = Path(__file__).parents[2]
PINNED = Path(__file__).parent / "pinned.json"
STUDIES = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "configs").rglob("*.yaml")
    if "\ngrid:" in path.read_text()
)
BY_MACHINE = frozenset(
    {"iso_c", "iso_cts", "karcher", "model_stock", "multislerp", "nuslerp", "opcm", "pcb", "rapf", "slerp"}
)
"""Techniques that use functions (decompositions, exp, arc cosine) whose last bit depends on the processor: not pinned."""
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
    plan = make_plan(study, Facts(datasets, models, streams))
    trajectories = [
        [t.id, t.base, [[p.train, p.merge, p.deployed, p.evaluate] for p in t.points]]
        for t in plan.trajectories
    ]
    return [trajectories, sorted(plan.steps), sorted(plan.bases)]


def merges(technique: str, **way: Any) -> dict[str, str]:
    """sha256 of what a study would write: the merge of three experts, a fold, and the third arrival of a stream.

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


def everything() -> dict[str, Any]:
    return {"plans": plans(), "merges": {name: merges(name) for name in TECHNIQUES}}


if __name__ == "__main__":
    PINNED.write_text(json.dumps(everything(), indent=1, sort_keys=True) + "\n")
