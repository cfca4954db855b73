"""A study with its configuration, plan, store, and the directory OUT that holds them.

Invariant: opening a workspace writes nothing; `prepare` writes what a run needs, each file whole or not at all.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from merge_service.checkpoints import CONFIG_FILE
from merge_service.errors import UserError
from merge_service.files import sweep_directory
from pipeline.errors import ConfigError
from pipeline.files.disk import clear_leftovers, write_whole
from pipeline.plan.facts import base_for_now, cache_of, ensure_data, gather, local_base, stated
from pipeline.plan.file import study_of, write
from pipeline.plan.keeping import disk, kept_merges, resume_bytes
from pipeline.plan.planner import base_step, make_plan
from pipeline.plan.prompt_notes import prompt_notes
from pipeline.plan.steps import Facts, Plan, Step, Summary
from pipeline.results.over_time import results, write_results
from pipeline.store.artifact import Record
from pipeline.store.local import Store
from pipeline.store.open import store_at
from pipeline.study.config import Study, load_study
from pipeline.study.sections import ModelSection, key_of
from pipeline.study.streams import save
from pipeline.workspace.lock import Failure
from pipeline.workspace.registrations import register
from workers.models.configuration import HUB

STREAMS = "streams"
ENDING_SECONDS = 10.0
"""How long a worker that was ended may take to be gone."""
STUDY_FILE, PLAN_FILE, RESULTS_FILE = "study.yaml", "plan.json", "results.json"


class StudySummary(Summary):
    """What a study would run, and what to know of its bases and data.

    `disk_bytes` is what stays, `disk_least_bytes` what must be free, `disk_peak_bytes` the most that is taken at a time, `disk_all_bytes`
    what keeping every merge would take. `resume_bytes` is what one expert in training takes in OUT/scratch besides, at most.
    """

    disk_least_bytes: int
    disk_peak_bytes: int
    disk_all_bytes: int
    resume_bytes: int
    notes: list[str]


@dataclass
class Workspace:
    """Everything that belongs to one study on one OUT. `failure` is the error that ended the run, if any."""

    study: Study
    out: Path
    plan: Plan
    facts: Facts
    failure: Failure | None = None
    _records: dict[str, Record] = field(default_factory=dict)

    @classmethod
    def open(
        cls, path: Path, overrides: Sequence[str] = (), out: Path | None = None, provisional: bool = False
    ) -> "Workspace":
        """Read, check and plan a study. Raises UserError for every mistake that can be found before anything runs.

        A `provisional` study may lack data that its suite describes: it can be shown but not run.
        """
        return cls.of(load_study(path, overrides), out, provisional)

    @classmethod
    def of(cls, study: Study, out: Path | None = None, provisional: bool = False) -> "Workspace":
        """Like `open`, for a study that has been read."""
        ensure_data(study)
        study = study.resolved().settled()
        facts = gather(study, provisional)
        return cls(study, out or Path("runs") / study.name, make_plan(study, facts), facts)

    @cached_property
    def store(self) -> Store:
        storage = self.study.storage
        return store_at(storage.store, self.out, tuple(self.plan.bases), storage.cache)

    @cached_property
    def kept(self) -> frozenset[str]:
        """The merges whose weights stay as files."""
        return kept_merges(self.plan, self.study.storage)

    @property
    def scratch(self) -> Path:
        """Training checkpoints of unfinished experts, progress files and merge states: all of it may be lost."""
        return (self.out / "scratch").absolute()

    @property
    def limits(self) -> Path:
        """Cached thresholds of the experts, kept apart from these because an artifact holds only what its record states."""
        return self.scratch / "limits"

    def weights(self, fingerprint: str) -> Path:
        """The directory for the weights of a step (or of the base), whether they exist yet or not."""
        if fingerprint in self._records:
            return Path(self._records[fingerprint].path)
        step = self.plan.weights_step(fingerprint)
        return self.store.path(step.kind, step.fingerprint, step.slug)

    def summary(self) -> StudySummary:
        """What would run."""
        found = self.plan.summary(self.store)
        ahead = self.plan.steps.keys() - self.done()
        room = disk(self.plan, ahead, self.kept, self.study.storage.cache)
        pace = lambda step: self.study.resources.of(step.model).experts.checkpoint_pace  # noqa: E731
        return {
            **found,
            "disk_bytes": room.kept,
            "disk_least_bytes": room.least,
            "disk_peak_bytes": room.peak,
            "disk_all_bytes": room.all,
            "resume_bytes": resume_bytes(self.plan, ahead, pace),
            "notes": self.notes,
        }

    @property
    def recipes(self) -> frozenset[str]:
        """The merges whose weights go when nothing waits for them."""
        return frozenset(
            fp for fp, step in self.plan.steps.items() if step.kind == "merge" and fp not in self.kept
        )

    def disk_by_choice(self) -> dict[str, int]:
        """The most bytes at a time under each choice of `storage.keep`."""
        ahead = self.plan.steps.keys() - self.done()
        choices = {
            keep: self.study.storage.model_copy(update={"keep": keep})
            for keep in ("all", "final", "best", "none")
        }
        return {
            keep: disk(self.plan, ahead, kept_merges(self.plan, how)).least for keep, how in choices.items()
        }

    @cached_property
    def notes(self) -> list[str]:
        """Remarks on the bases, on the data, and on how each model reads class names; models that do not exist yet have none."""
        study = self.study
        found = [*(note for model in self.facts.models.values() for note in model.notes), *self.facts.notes]
        named = (*study.learnt, *study.roles.adaptation, *study.roles.held_out)
        scored = [name for name in named if name not in self.facts.missing]
        for model in study.models:
            known = self.facts.models[key_of(model)]
            base = self.plan.bases[base_step(known.weights, known.config).fingerprint]
            places = (self.store.path(base.kind, base.fingerprint, base.slug), local_base(model))
            place = next((place for place in places if place and (place / CONFIG_FILE).is_file()), None)
            with _with_tokenizer(place, model) as directory:
                if directory is not None:
                    found += prompt_notes(directory, study.data_root, scored, cache_of(study))
        return list(dict.fromkeys(found))

    def done(self) -> set[str]:
        """Steps whose artifacts are in the store."""
        return {fp for fp, step in self.plan.steps.items() if self.store.has(step.kind, fp)}

    def tidy(self) -> None:
        """Remove what processes left that ended early: stages and temporary files of dead writers, and scratch of
        finished steps. A worker that was ended while it was stuck in a step is gone only some time after another one did the step, so
        such stages are waited for.
        """
        self.store.sweep()
        until = time.monotonic() + ENDING_SECONDS
        while time.monotonic() < until and any(
            self.store.has(step.kind, step.fingerprint)
            for step in self.store.being_written(self.plan.steps.values())
        ):
            time.sleep(0.05)
            self.store.sweep()
        sweep_directory(self.limits)
        for path in self.scratch.glob("*"):
            step = self.plan.steps.get(path.name)
            if step is not None and self.store.has(step.kind, step.fingerprint):
                shutil.rmtree(path, ignore_errors=True)

    def prepare(self) -> None:
        """Write what a run needs: the store, study.yaml, plan.json, the streams, and the bases. Raises UserError."""
        self.store.prepare()
        self._check_same_study()
        register(self.store, self.plan, self.out, kept=self.kept)
        files = self.out / STUDY_FILE, self.out / PLAN_FILE, self.out / RESULTS_FILE
        clear_leftovers(*files)
        write_whole(files[0], self.study.resolved_yaml(), sync=True)
        write(self.plan, files[1])
        self.save_streams(self.out / STREAMS)
        for model in self.study.models:
            known = self.facts.models[key_of(model)]
            base = self.plan.bases[base_step(known.weights, known.config).fingerprint]
            record = self.store.record(base.kind, base.fingerprint)
            if record is None:
                self._export(model, base)
            else:
                self.store.open_verified(record)

    def save_streams(self, directory: Path) -> None:
        """Write every stream of the study as a file for `stream.file`. Raises UserError if classes are not known."""
        if self.facts.missing:
            raise UserError(
                f"streams cannot be saved while {len(self.facts.missing)} datasets are missing: their classes are unknown"
            )
        for stream in self.facts.streams.values():
            save(stream, directory / f"{stream.fingerprint[:12]}.json")

    def known(self, fingerprint: str) -> Record | None:
        """The record of a step or of a base, read from the store at most once; None if it does not exist."""
        if fingerprint not in self._records:
            record = self.store.record(self.plan.weights_step(fingerprint).kind, fingerprint)
            if record is None:
                return None
            self._records[fingerprint] = record
        return self._records[fingerprint]

    def keep(self, record: Record) -> None:
        """Remember the record of a step that was just carried out."""
        self._records[record.fingerprint] = record

    def forget(self, fingerprint: str) -> None:
        """Forget the record of a step whose artifact is damaged."""
        self._records.pop(fingerprint, None)

    def write_results(self) -> dict[str, object]:
        answer = results(self.plan, self.store)
        write_results(self.out / RESULTS_FILE, answer)
        return answer

    def _export(self, model: ModelSection, base: Step) -> None:
        from workers.models.export import export_base

        source = local_base(model)
        pretrained = str(source) if source else model.pretrained
        self.store.make(
            base,
            lambda stage: {"origin": export_base(model.config, pretrained, stage, model.seed, stated(model))},
        )

    def _check_same_study(self) -> None:
        """Refuse an OUT that holds another study: it would mix the results of two studies."""
        there = study_of(self.out / PLAN_FILE)
        if there is not None and there != self.plan.study:
            raise ConfigError(
                f"{self.out} holds the study {there!r}, not {self.plan.study!r}; choose another --out"
            )


Beside = Callable[[Workspace], AbstractContextManager[object]]
"""What goes on in a workspace beside a run, such as the delivery of its experts."""


@contextmanager
def _with_tokenizer(place: Path | None, model: ModelSection) -> Iterator[Path | None]:
    """A directory that defines how a model reads text: `place`, or only the configuration of a base that does not exist yet.

    None if the tokenizer itself would have to be downloaded from the Hub.
    """
    on_hub = any(name.startswith(HUB) for name in (model.config, model.pretrained or ""))
    base = None if place is not None or on_hub else base_for_now(model)[0]
    if base is None or {"hf_tokenizer_name", "hf_model_name"} & base.model_cfg["text_cfg"].keys():
        yield place
        return
    with tempfile.TemporaryDirectory() as room:
        (Path(room) / CONFIG_FILE).write_text(json.dumps(base.configuration), encoding="utf-8")
        yield Path(room)
