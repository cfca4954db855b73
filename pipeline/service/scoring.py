"""Scores of a service's models: ordinary evaluate steps in its store, with one bit for every sample.

Invariant: the answers of a model are those of one evaluation, named by its fingerprint, so every comparison is paired, and is made again
from the store with the same numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from merge_service.faults import point
from merge_service.live import Judged, Scored
from merge_service.live import score as score_of
from pipeline.errors import ConfigError, CorruptArtifact
from pipeline.kinds.specs import EvaluateSpec, SourceSpec
from pipeline.kinds.table import KINDS
from pipeline.plan.facts import cache_of, ensure_data, gather
from pipeline.plan.planner import Planner
from pipeline.results.over_time import gm, ka, zs
from pipeline.service.config import ServiceConfig
from pipeline.service.experts import step_of
from pipeline.store.artifact import Record
from pipeline.store.local import Store
from pipeline.study.streams import Part
from workers.jobs import EvaluateJob, Source
from workers.scoring.details import ANSWERS, unpacked


@dataclass(frozen=True)
class Sets:
    """What models are judged by: the datasets of every task, and held-out ones."""

    tasks: Mapping[str, tuple[str, ...]]
    held_out: tuple[str, ...]

    @property
    def adaptation(self) -> tuple[str, ...]:
        """The datasets of all tasks."""
        return tuple(dict.fromkeys(name for names in self.tasks.values() for name in names))

    @property
    def every(self) -> tuple[str, ...]:
        """All datasets, sorted, as a study scores them."""
        return tuple(sorted({*self.adaptation, *self.held_out}))

    def of(self, tasks: Sequence[str]) -> list[str]:
        """The datasets of these tasks, each once."""
        return list(dict.fromkeys(name for task in tasks for name in self.tasks.get(task, ())))


class Scorer(Protocol):
    """Answers the datasets with a model."""

    @property
    def sets(self) -> Sets: ...
    def judged(self, model: str, datasets: Sequence[str]) -> Judged: ...


class NoScorer:
    """The scorer of a service without data: no gate can score anything."""

    sets = Sets({}, ())

    def judged(self, model: str, datasets: Sequence[str]) -> Judged:
        """Raises ConfigError."""
        raise ConfigError("data is missing, so nothing can be scored")


class StoreScorer:
    """Scores models of the store on the data of a configuration. Reads the data once; raises UserError if it is missing."""

    def __init__(self, config: ServiceConfig, store: Store, base: Record) -> None:
        study = config.study()
        ensure_data(study)
        self._study, self._store, self._base, self._config = study.resolved(), store, base, config
        self._planner = Planner(self._study, gather(self._study))
        roles = self._study.roles
        names = config.taken or ()
        unknown = [name for name in names if name not in (*roles.adaptation, *roles.held_out)]
        if unknown:
            raise ConfigError(
                f"service {config.name}: tasks.list: {unknown[0]} is no dataset of data; there are {', '.join(roles.adaptation)}"
            )
        held_out = tuple(name for name in roles.held_out if name not in names)
        self.sets = Sets({name: (name,) for name in names}, held_out)

    def judged(self, model: str, datasets: Sequence[str]) -> Judged:
        """The answers of the weights with this fingerprint. Raises what an evaluation raises."""
        sources = self._planner.sources((*datasets,), lambda: map(Part, datasets), self._config.gates.split)
        gates = self._config.gates
        spec = EvaluateSpec(
            version=KINDS[EvaluateSpec.kind].revision, model=model, datasets=sources, fraction=gates.fraction,
            seed=gates.seed if gates.fraction < 1 else 0, device="cpu", details=[ANSWERS],
        )  # fmt: skip
        step = step_of(spec, "answers", f"answers of {model[:12]}")
        record = self._store.record(spec.kind, step.fingerprint)
        if record is None:
            record = self._store.make(step, lambda _: self._evaluate(model, sources))
            point("eval.after_commit")
        details = record.result["details"]
        return Judged(
            record.fingerprint,
            {name: tuple(map(unpacked, details[name][ANSWERS])) for name in datasets},
        )

    def _evaluate(self, model: str, sources: Sequence[SourceSpec]) -> Mapping[str, object]:
        from workers.scoring.evaluate import evaluate

        record = self._store.find(model)
        if record is None:
            raise CorruptArtifact(f"{model[:16]} is not in {self._store.where}")
        root, study = str(Path(self._study.data_root).absolute()), self._study
        return evaluate(
            EvaluateJob(
                fingerprint="", label=f"{record.kind} {model[:12]}", model=str(record.path),
                datasets=tuple(Source(root, one["dataset"], one["split"], reading=study.data.reading) for one in sources),
                fraction=self._config.gates.fraction, seed=self._config.gates.seed,
                batch_size=self._config.resources.batch_size, threads=self._config.resources.threads,
                cache=str(cache_of(study).absolute()), details=(ANSWERS,),
            )
        )  # fmt: skip


def scored(judged: Judged, sets: Sets) -> Scored:
    """The scores of a model over all datasets, with KA, ZS and GM."""
    scores = {name: score_of(answers) for name, answers in judged.answers.items()}
    accumulated, retained = ka(scores, sets.adaptation), zs(scores, sets.held_out)
    mean = sum(scores.values()) / len(scores) if scores else None
    return Scored(judged.evaluation, scores, mean, accumulated, retained, gm(accumulated, retained))
