"""How often the gates of a live service are wrong: honest experts that are stopped, and poisoned ones that are accepted.

    temporal-merge run configs/demo.yaml --out runs/gates --set 'grid.strategies=[offline_merging_replay]' --set 'grid.seed=[0,1,2]'
    python benchmarks/service_gates.py --study runs/gates --json service_gates.json

For every seed, the experts of a study arrive one after another, and what the gates say of each is counted. Then, for every seed and every
task, the experts of the other tasks are accepted (by hand where a gate stops one), and for the last task poisoned experts arrive, one
of each kind. The gates are those of the configuration: margins are chosen before, on another study, and never on these counts.

Invariant: a rate is given with its exact 95 % interval, and an expert counts as accepted only if it is in the accepted sequence.
"""

import argparse
import contextlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import record
from safetensors.numpy import load_file, save_file

from merge_service.checkpoints import WEIGHTS_FILE
from merge_service.live import Arrival, Removed, proportion
from pipeline.kinds.specs import BASE
from pipeline.plan.file import read
from pipeline.service.config import GatesSection, ServiceConfig, read_config
from pipeline.service.home import Home
from pipeline.service.operations import Operations, Sender
from pipeline.service.worker import Worker
from pipeline.store.open import store_at

Tensors = dict[str, np.ndarray]
HONEST, OTHER, REPLAYED = "honest", "expert of another task", "expert of a later task that replayed this one"


@dataclass(frozen=True)
class Made:
    """What a poisoned expert is made of: base, the honest expert, that of another task, and numbers at random."""

    base: Tensors
    honest: Tensors
    other: Tensors
    rng: np.random.Generator

    def moved(self, change: Callable[[np.ndarray], np.ndarray]) -> Tensors:
        """The base and a changed task vector."""
        return {
            name: (start + change(self.honest[name] - start)).astype(start.dtype)
            for name, start in self.base.items()
        }

    def noise(self, vector: np.ndarray) -> np.ndarray:
        """Gaussian noise with the norm of each tensor's task vector."""
        drawn = self.rng.standard_normal(vector.shape)
        return drawn * np.linalg.norm(vector) / max(float(np.linalg.norm(drawn)), 1e-30)

    def put(self, value: float) -> Tensors:
        """The honest expert with one other number in its largest tensor."""
        name = max(self.honest, key=lambda one: self.honest[one].size)
        changed = self.honest[name].copy()
        changed.reshape(-1)[0] = value
        return {**self.honest, name: changed}

    def without(self) -> Tensors:
        """The honest expert without its largest tensor."""
        name = max(self.honest, key=lambda one: self.honest[one].size)
        return {key: value for key, value in self.honest.items() if key != name}


POISONS: Mapping[str, Callable[[Made], Tensors]] = {
    "flipped": lambda of: of.moved(lambda vector: -vector),
    "ten times": lambda of: of.moved(lambda vector: 10 * vector),
    "a tenth": lambda of: of.moved(lambda vector: vector / 10),
    "noise": lambda of: of.moved(of.noise),
    "shuffled": lambda of: of.moved(
        lambda vector: of.rng.permutation(vector.reshape(-1)).reshape(vector.shape)
    ),
    "the base": lambda of: of.base,
    "copy of another's": lambda of: of.other,
    "scaled copy of another's": lambda of: {
        name: (start + 0.8 * (of.other[name] - start)).astype(start.dtype) for name, start in of.base.items()
    },
    "NaN": lambda of: of.put(float("nan")),
    "one huge value": lambda of: of.put(1e30),
    "missing tensor": lambda of: of.without(),
    "extra tensor": lambda of: {**of.honest, "more": np.zeros(3, np.float32)},
}


@dataclass(frozen=True)
class Expert:
    """The weights of an expert, and the datasets that it was trained on, by replay too."""

    file: Path
    seen: frozenset[str]


Experts = dict[int, dict[str, Expert]]
"""By seed of the study and task."""


def experts_of(study: Path, tasks: Sequence[str], seeds: Sequence[int] | None) -> Experts:
    """A study's experts that were trained from the base, by seed of the study and task; of these seeds, or all."""
    plan, store = read(study / "plan.json"), store_at(None, study)
    found = Experts()
    for trajectory in plan.trajectories:
        if seeds is not None and trajectory.seed not in seeds:
            continue
        known = found.setdefault(trajectory.seed, {})
        for point in trajectory.points:
            if point.init != BASE or point.task not in tasks or point.train is None:
                continue
            record = store.record("train", point.train)
            if record is None:
                raise SystemExit(
                    f"{study}: the expert of {point.task} for seed {trajectory.seed} is not there yet"
                )
            seen = frozenset(one["dataset"] for key in ("update", "buffer") for one in record.spec[key])
            one = Expert(record.path / WEIGHTS_FILE, seen)
            if known.setdefault(point.task, one) != one:
                raise SystemExit(
                    f"{study} has several experts of {point.task} from the base; give a study of one recipe"
                )
    for seed in found if seeds is None else seeds:
        if missing := [task for task in tasks if task not in found.get(seed, {})]:
            raise SystemExit(f"{study} has no expert of {missing[0]} for seed {seed}")
    return {seed: {task: known[task] for task in tasks} for seed, known in sorted(found.items())}


class Trier:
    """A service of its own in a directory that several share, so that what one has scored is known to the others."""

    def __init__(self, out: Path, config: ServiceConfig, name: str) -> None:
        self.home = Home.open(out, config.model_copy(update={"name": name}))
        self.worker: Worker = self.home.worker()

    def bring(self, file: Path, task: str) -> Arrival:
        """What became of an expert."""
        name = Operations(self.home).arrive(file, Sender(task, "benchmark", "MIT"))
        return self.worker.run().arrivals[name]

    def accept(self, file: Path, task: str) -> None:
        """Bring an expert, and release it until it is accepted."""
        one = self.bring(file, task)
        while one.status != "accepted":
            Operations(self.home).release(one.id, "benchmark: what others are judged against")
            one = self.worker.run().arrivals[one.id]

    def forget(self, one: Arrival) -> None:
        """Take an expert out that was accepted."""
        Operations(self.home).remove(one.id, Removed("benchmark", force=True))
        self.worker.run()


@dataclass(frozen=True)
class Asked:
    """What is tried: the experts by seed and task, those of all seeds of the study, and the kinds of poisoned ones."""

    config: ServiceConfig
    experts: Experts
    kinds: Sequence[str]

    def wrong(self, seed: int, task: str) -> dict[str, Path]:
        """Experts of the next seed and other tasks, to be sent as one of this task: one that never saw it, and one that replayed it."""
        tasks, seeds = [*self.experts[seed]], [*self.experts]
        place, other = tasks.index(task), seeds[(seeds.index(seed) + 1) % len(seeds)]
        found = dict[str, Path]()
        for name in [*tasks[place + 1 :], *tasks[:place]] if other != seed else ():
            one = self.experts[other][name]
            found.setdefault(REPLAYED if task in one.seen else OTHER, one.file)
        return found


@dataclass(frozen=True)
class Row:
    """What the gates said of one expert."""

    seed: int
    task: str
    kind: str
    arrival: Arrival

    def line(self) -> str:
        """For people."""
        one = self.arrival
        return f"seed {self.seed}  {self.task:12} {self.kind:26} {one.status:12} {' '.join(one.reasons)}"

    def plain(self) -> dict[str, object]:
        """For the file of results."""
        one = self.arrival
        gates = {gate.gate: [gate.verdict, gate.difference, gate.low, gate.high] for gate in one.verdicts}
        return {
            "seed": self.seed, "task": self.task, "kind": self.kind, "status": one.status, "reasons": list(one.reasons),
            "own": dict(one.own), "gates": gates,
        }  # fmt: skip


def tried(work: Path, asked: Asked) -> Iterator[Row]:
    """Honest experts first, then poisoned ones, of all seeds for a task before the next task: a run that is cut off has seen every seed."""
    for seed in asked.experts:
        yield from honest(work / f"{seed}", asked, seed)
    for task in next(iter(asked.experts.values())):
        for seed in asked.experts:
            yield from poisoned(work / f"{seed}", asked, seed, task)


def honest(out: Path, asked: Asked, seed: int) -> Iterator[Row]:
    """The experts of one seed arrive in their order."""
    trier = Trier(out, asked.config, "honest")
    with trier.home.working():
        for task, one in asked.experts[seed].items():
            yield Row(seed, task, HONEST, trier.bring(one.file, task))


def poisoned(out: Path, asked: Asked, seed: int, task: str) -> Iterator[Row]:
    """Poisoned experts of a task arrive after the honest ones of all others."""
    trier = Trier(out, asked.config, task)
    experts = {name: one.file for name, one in asked.experts[seed].items()}
    others = [one for one in experts if one != task]
    with trier.home.working():
        for one in others:
            trier.accept(experts[one], one)
        base = load_file(trier.home.base.path / WEIGHTS_FILE)
        of = Made(base, load_file(experts[task]), load_file(experts[others[0]]), np.random.default_rng(0))
        for kind in asked.kinds:
            file = out / "poisoned.safetensors"
            save_file({name: np.asarray(one) for name, one in POISONS[kind](of).items()}, file)
            found = trier.bring(file, task)
            yield Row(seed, task, kind, found)
            if found.status == "accepted":
                trier.forget(found)
        for kind, file in asked.wrong(seed, task).items():
            found = trier.bring(file, task)
            yield Row(seed, task, kind, found)
            if found.status == "accepted":
                trier.forget(found)


def rate(count: int, n: int) -> str:
    """A share with its interval."""
    found = proportion(count, n)
    return f"{count} of {n} ({found.low:.2f} to {found.high:.2f})"


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: how many of each kind were accepted, with the exact 95 % interval, and what stopped the others."""
    lines = ["| expert | accepted | stopped or held by |", "|---|---|---|"]
    for kind in dict.fromkeys(one["kind"] for one in rows):
        of = [one for one in rows if one["kind"] == kind]
        gates = Counter(one["reasons"][0] for one in of if one["status"] != "accepted")
        accepted = sum(one["status"] == "accepted" for one in of)
        stopped = ", ".join(f"`{gate}` {count}" for gate, count in gates.most_common())
        lines.append(f"| {kind} | {rate(accepted, len(of))} | {stopped} |")
    return "\n".join(lines)


def under_defaults(rows: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """How many honest experts would have passed, been undecided or failed with the margins that a configuration has by default, each
    judged after the same others."""
    gates = GatesSection()
    margins = {
        "held_out.mean": gates.held_out.margin,
        "drift": gates.drift,
        "accumulated.mean": gates.accumulated.margin,
    }
    found = Counter[str]()
    for one in rows:
        if one["kind"] == HONEST:
            asked = [
                (low, high, margins.get(gate, gates.accumulated.worst))
                for gate, (_, _, low, high) in one["gates"].items()
                if not gate.startswith("solo.")
            ]
            failed = any(high < -margin for _, high, margin in asked)
            passed = all(low >= -margin for low, _, margin in asked)
            found["failed" if failed else "passed" if passed else "undecided"] += 1
    return found


def main() -> None:
    """Try, print, and keep the numbers; what was found is kept when Ctrl-C ends it before."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--study", type=Path, required=True, help="a study whose experts start from the base")
    parser.add_argument("--config", type=Path, default=record.ROOT / "configs" / "service.yaml")
    parser.add_argument("--tasks", default="letters,scripts,photos_b,icon_style,emoji_group,skin_tone")
    parser.add_argument("--seeds", help="some of the seeds of the study, as in 0,1")
    parser.add_argument("--kinds", default=",".join(POISONS), help="kinds of poisoned experts; none: ''")
    parser.add_argument("--set", action="append", default=[], help="values of the configuration")
    record.add_json(parser)
    given = parser.parse_args()
    tasks, kinds = given.tasks.split(","), [one for one in given.kinds.split(",") if one]
    if unknown := set(kinds) - set(POISONS):
        raise SystemExit(f"no such kind: {', '.join(sorted(unknown))}; there are {', '.join(POISONS)}")
    seeds = None if given.seeds is None else [int(one) for one in given.seeds.split(",")]
    asked = Asked(read_config(given.config, given.set), experts_of(given.study, tasks, seeds), kinds)
    rows = list[Mapping[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="service-gates-") as work, contextlib.suppress(KeyboardInterrupt):
        for row in tried(Path(work), asked):
            rows.append(row.plain())
            print(row.line(), flush=True)
    print(f"\n{summary(rows)}")
    settings = {"tasks": tasks, "seeds": [*asked.experts], "config": given.config.name, "set": given.set}
    record.save(given.json, settings, {"rows": rows})


if __name__ == "__main__":
    main()
