"""How often the gates of a live service are wrong: honest experts that are stopped, and poisoned ones that are accepted.

    temporal-merge run configs/demo.yaml --out runs/gates --set 'grid.strategies=[offline_merging_replay]' --set 'grid.seed=[0,1,2]'
    python benchmarks/service_gates.py --study runs/gates --json service_gates.json

For every seed, the experts of a study arrive one after another, and what the gates say of each is counted. Then, for every seed and every
task, the experts of the other tasks are accepted (by hand where a gate stops one), and for the last task poisoned experts arrive, one
of each kind. The gates are those of the configuration: margins are chosen before, on another study, and never on these counts.

Invariant: a rate is given with its exact 95 % interval, and an expert counts as accepted only if it is in the accepted sequence.
"""

import argparse
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import record
from safetensors.numpy import load_file, save_file

from merge_service.checkpoints import WEIGHTS_FILE
from merge_service.live import Arrival, Removed, proportion
from pipeline.service.config import ServiceConfig, read_config
from pipeline.service.home import Home
from pipeline.service.operations import Operations, Sender
from pipeline.service.worker import Worker
from pipeline.store.open import store_at

Tensors = dict[str, np.ndarray]


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


def experts_of(study: Path, tasks: Sequence[str]) -> dict[int, dict[str, Path]]:
    """The weights of experts that were trained from the base, by seed and task."""
    store, found = store_at(None, study), dict[int, dict[str, Path]]()
    bases = {one.fingerprint for one in store.records("base")}
    for one in store.records("train"):
        (task,) = {source["dataset"] for source in one.spec["update"]}
        if one.spec["init"] in bases and task in tasks:
            if task in found.setdefault(one.spec["seed"], {}):
                raise SystemExit(
                    f"{study} has several experts of {task} from the base; give a study of one recipe"
                )
            found[one.spec["seed"]][task] = one.path / WEIGHTS_FILE
    for seed, known in found.items():
        if missing := [task for task in tasks if task not in known]:
            raise SystemExit(f"{study} has no expert of {missing[0]} for seed {seed}")
    return {seed: {task: known[task] for task in tasks} for seed, known in sorted(found.items())}


class Trier:
    """One service to which experts are brought, with the answers of models that earlier ones have scored already."""

    def __init__(self, out: Path, config: ServiceConfig) -> None:
        self.home = Home.open(out, config)
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


def honest(room: Path, config: ServiceConfig, experts: Mapping[str, Path]) -> Iterator[tuple[str, Arrival]]:
    """What the gates say of the experts of one seed, in their order."""
    trier = Trier(room, config)
    with trier.home.working():
        for task, file in experts.items():
            yield task, trier.bring(file, task)


def poisoned(
    room: Path,
    config: ServiceConfig,
    experts: Mapping[str, Path],
    task: str,
    kinds: Sequence[str],
    wrong: Path | None,
) -> Iterator[tuple[str, Arrival]]:
    """What the gates say of poisoned experts of a task, after the honest ones of all others; `wrong` is an expert of another task and seed,
    which is sent as one of this task."""
    trier, others = Trier(room, config), [one for one in experts if one != task]
    with trier.home.working():
        for one in others:
            trier.accept(experts[one], one)
        base = load_file(trier.home.base.path / WEIGHTS_FILE)
        of = Made(base, load_file(experts[task]), load_file(experts[others[0]]), np.random.default_rng(0))
        for kind in kinds:
            file = room / "poisoned.safetensors"
            save_file(POISONS[kind](of), file)
            found = trier.bring(file, task)
            yield kind, found
            if found.status == "accepted":
                trier.forget(found)
        if wrong is not None:
            yield "expert of another task", trier.bring(wrong, task)


def rate(count: int, n: int) -> str:
    """A share with its interval."""
    found = proportion(count, n)
    return f"{count} of {n} ({found.low:.2f} to {found.high:.2f})"


def main() -> None:
    """Count, print, and keep the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--study", type=Path, required=True, help="a finished study whose experts start from the base"
    )
    parser.add_argument("--config", type=Path, default=record.ROOT / "configs" / "service.yaml")
    parser.add_argument("--tasks", default="letters,scripts,photos_b,icon_style,emoji_group,skin_tone")
    parser.add_argument("--seeds", help="some of the seeds of the study, as in 0,1")
    parser.add_argument("--kinds", default=",".join(POISONS), help="kinds of poisoned experts")
    parser.add_argument("--set", action="append", default=[], help="values of the configuration")
    record.add_json(parser)
    given = parser.parse_args()
    tasks, kinds = given.tasks.split(","), given.kinds.split(",")
    config = read_config(given.config, given.set)
    seeds = None if given.seeds is None else {int(one) for one in given.seeds.split(",")}
    every = {
        seed: one for seed, one in experts_of(given.study, tasks).items() if seeds is None or seed in seeds
    }
    rows = list[dict[str, object]]()
    with tempfile.TemporaryDirectory(prefix="service-gates-") as work:
        for seed, experts in every.items():
            runs = [("honest", honest(Path(work) / f"{seed}", config, experts))]
            for task in tasks:
                wrong = next(
                    (
                        one[other]
                        for key, one in every.items()
                        for other in tasks
                        if key != seed and other != task
                    ),
                    None,
                )
                place = Path(work) / f"{seed}-{task}"
                runs.append((task, poisoned(place, config, experts, task, kinds, wrong)))
            for label, run in runs:
                for what, one in run:
                    kind, task = ("honest", what) if label == "honest" else (what, label)
                    rows.append(
                        {"seed": seed, "task": task, "kind": kind, "status": one.status, "reasons": list(one.reasons),
                         "own": dict(one.own)}
                    )  # fmt: skip
                    print(
                        f"seed {seed}  {task:12} {kind:26} {one.status:12} {' '.join(one.reasons)}",
                        flush=True,
                    )
            shutil.rmtree(work, ignore_errors=True)
            Path(work).mkdir()
    print()
    for kind in dict.fromkeys(str(one["kind"]) for one in rows):
        of = [one for one in rows if one["kind"] == kind]
        gates = Counter(str(one["reasons"][0]) for one in of if one["reasons"])  # type: ignore[index]
        accepted = sum(one["status"] == "accepted" for one in of)
        stopped = ", ".join(f"{gate} {count}" for gate, count in gates.most_common())
        print(f"{kind:26} accepted {rate(accepted, len(of)):28} {stopped}")
    record.save(
        given.json, {"tasks": tasks, "config": str(given.config.name), "set": given.set}, {"rows": rows}
    )


if __name__ == "__main__":
    main()
