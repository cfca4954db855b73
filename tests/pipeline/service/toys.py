"""A service over toy models: experts that move along a direction of their own, and scores that read how far a model lies along each.

Run as a program it works for a service in a process of its own, with faults placed by the environment.
"""

import contextlib
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from merge_service.checkpoints import CONFIG_FILE, WEIGHTS_FILE, Checkpoint, sha256_of
from merge_service.faults import VARIABLE
from merge_service.live import Draft, Judged, Received, Removed, State, digest
from pipeline.errors import CorruptArtifact
from pipeline.plan.planner import base_step
from pipeline.service import log as logs
from pipeline.service.config import ServiceConfig, config_from
from pipeline.service.home import Home
from pipeline.service.intake import uploads
from pipeline.service.operations import Operations, Sender
from pipeline.service.scoring import Sets
from pipeline.store.artifact import Record
from pipeline.store.local import Store
from tests.merge_service import toys

SHAPES = {
    "logit_scale": (),
    "transformer.resblocks.0.mlp.weight": (24, 16),
    "transformer.resblocks.1.mlp.weight": (24, 16),
    "visual.transformer.resblocks.0.mlp.weight": (24, 16),
    "visual.ln_pre.bias": (32,),
}
SIZE = 4.0
"""The norm of an honest task vector."""
SAMPLES = 400
SMALL_PART = 1000
"""Bytes of a part of an upload, in this file run as a program."""
TASKS = tuple(f"task{number}" for number in range(12))
HELD_OUT = ("held_a", "held_b")


def base() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def direction(name: str) -> dict[str, np.ndarray]:
    """A unit vector over all tensors but the temperature, of its own for every name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    found = {one: rng.standard_normal(shape) for one, shape in SHAPES.items() if shape}
    norm = np.sqrt(sum(float((value**2).sum()) for value in found.values()))
    return {one: value / norm for one, value in found.items()}


def moved(by: dict[str, np.ndarray], size: float = SIZE) -> dict[str, np.ndarray]:
    start = base()
    return {
        name: (value + size * by[name]).astype(np.float32) if name in by else value
        for name, value in start.items()
    }


def expert(room: Path, task: str, variant: int = 0, size: float = SIZE) -> Path:
    """The file of an expert of a task; variants differ a little."""
    by, other = direction(task), direction(f"{task}/{variant}")
    mixed = {name: by[name] + (0.2 * other[name] if variant else 0.0) for name in by}
    return toys.save(room / f"{task}-{variant}-{size:g}.safetensors", moved(mixed, size))


def write_base(store: Store) -> Record:
    with store.staged() as stage:
        toys.save(stage / WEIGHTS_FILE, base())
        (stage / CONFIG_FILE).write_text("{}")
        step = base_step(sha256_of(stage / WEIGHTS_FILE))
        return store.record("base", step.fingerprint) or store.commit(
            step, stage, {"origin": "toy"}, seconds=0.0
        )


class ToyScorer:
    """Answers of a model: a task's accuracy grows with how far the model lies along the task's direction, and held-out accuracy
    falls with its distance from the base."""

    sets = Sets({task: (task,) for task in TASKS}, HELD_OUT)

    def __init__(self, store: Store) -> None:
        self.store, self.asked = store, 0
        self.known: dict[tuple[str, tuple[str, ...]], Judged] = {}
        """Evaluations stay in a store when their model is dropped."""

    def judged(self, model: str, datasets: Sequence[str]) -> Judged:
        self.asked += 1
        key = (model, tuple(datasets))
        if key not in self.known:
            self.known[key] = self._judged(model, datasets)
        return self.known[key]

    def _judged(self, model: str, datasets: Sequence[str]) -> Judged:
        record = self.store.find(model)
        if record is None:
            raise CorruptArtifact(model)
        with Checkpoint.open(record.path) as weights:
            start = base()
            vector = {
                name: weights.read(name).reshape(SHAPES[name]) - start[name] for name in start if SHAPES[name]
            }
        answers = {name: (self._answers(name, vector),) for name in datasets}
        return Judged(digest([model, list(datasets)]), answers)

    @staticmethod
    def _answers(name: str, vector: dict[str, np.ndarray]) -> np.ndarray:
        if name in HELD_OUT:
            norm = np.sqrt(sum(float((value**2).sum()) for value in vector.values()))
            accuracy = 0.6 - 0.02 * norm / SIZE
        else:
            along = sum(float((direction(name)[one] * value).sum()) for one, value in vector.items()) / SIZE
            accuracy = 0.2 + 0.6 * np.clip(along, 0, 1)
        luck = np.random.default_rng(zlib.crc32(name.encode())).random(SAMPLES)
        return luck < accuracy


def config(strategy: object = "offline_merging", **more: Any) -> ServiceConfig:
    """A configuration whose margins suit toys: an average of n experts holds 1/n of each."""
    gates = {
        "solo": {"min_gain": 0.1, "required": False},
        "accumulated": {"margin": 0.6, "worst": 0.8}, "held_out": {"margin": 0.1}, "drift": 0.5,
        "geometry": {"reference": {"norm": SIZE}}, "undecided": "pass",
    }  # fmt: skip
    tree = {"name": "toy", "model": {"config": "toy"}, "strategy": strategy, "gates": gates, **more}
    return config_from(tree, "toy.yaml")


def home(out: Path, strategy: object = "offline_merging", **more: Any) -> Home:
    """The toy service in OUT, begun if it is not there yet."""
    ticks = iter(range(10**9))
    return Home.open(out, config(strategy, **more), write_base, lambda: next(ticks))


def arrive(service: Home, path: Path, task: str, **more: Any) -> str:
    """Send an expert and work until its arrival is final; returns its id."""
    found = Operations(service).arrive(path, Sender(task, "tests", **more))
    work(service, lambda state: state.arrivals[found].is_final)
    return found


def work(service: Home, until: Any = lambda _: False) -> State:
    with service.working():
        return service.worker(ToyScorer(service.store)).run(until)


def withdrawn(arrival: str) -> Draft:
    """What takes an arrival back that is not accepted."""
    return Draft(Removed("tests"), arrival)


def said(service: Home) -> list[tuple[str, str | None, object]]:
    """The log without what may differ: kinds, arrivals and data."""
    return [(entry.kind, entry.arrival, entry.data) for entry in service.log.entries()]


def child(*arguments: Any, faults: dict[str, Any] | None = None, what: str = "story") -> int:
    """The exit code of this file run as a program that does `what`, negative for a signal."""
    environment = {**os.environ, VARIABLE: json.dumps(faults or {})}
    return subprocess.run(
        [sys.executable, "-m", __spec__.name, what, *map(str, arguments)], env=environment
    ).returncode  # type: ignore[name-defined]


def small_log() -> None:
    """Segments of sixteen entries, and a snapshot at every fourth."""
    logs.SEGMENT, logs.SNAPSHOT_EVERY = 16, 4


def story(out: Path, room: Path) -> Home:
    """Three experts come, the second is removed, and a fourth comes: what is done already is found done."""
    for task in TASKS[:3]:
        opened = home(out)
        if not any(
            one.task == task and one.status == "removed" for one in opened.log.state.arrivals.values()
        ):
            arrive(opened, expert(room, task), task)
    opened = home(out)
    second = next(one.id for one in opened.log.state.arrivals.values() if one.task == TASKS[1])
    Operations(opened).remove(second, Removed("asked", force=True))
    work(opened)
    arrive(opened, expert(room, TASKS[3]), TASKS[3])
    return opened


def sent(out: Path, room: Path) -> tuple[Home, list[int]]:
    """One expert comes as an upload in parts, as the routes take it, and is merged: the parts that were sent now, by number. What
    is done already is found done."""
    parts, size = list[int](), uploads.PART_BYTES
    opened, path = home(out), expert(room, TASKS[0])
    data, announced = path.read_bytes(), uploads.Announced(path.name, path.stat().st_size, sha256_of(path))
    every = uploads.Uploads(opened.place / uploads.FOLDER, uploads.Room(10**9, 4, 0, 0))
    note = room / "upload"
    if not (note.exists() and every.taken(note.read_text(), "token", "request")):
        upload, _ = every.open("token", TASKS[0], [announced])
        note.write_text(upload.id)
        for first, last in every.missing(upload).get(path.name, []):
            for part in range(first, last + 1):
                every.put(upload, path.name, part, data[part * size : (part + 1) * size])
                parts.append(part)
        with every.taking(
            upload, opened.experts, "request", lambda: contextlib.nullcontext(opened.base.path)
        ) as taking:
            data_of = Received(
                TASKS[0], taking.taken.sha256, taking.taken.bytes, "base", "ann", origin="upload"
            )
            taking.arrival = Operations(opened, "token").received(data_of).id
    work(opened)
    return opened, parts


if __name__ == "__main__":
    small_log()
    uploads.PART_BYTES = SMALL_PART
    {"story": story, "sent": sent}[sys.argv[1]](*map(Path, sys.argv[2:]))
