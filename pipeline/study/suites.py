"""Suites as files: the datasets of a benchmark, and the check of a data root against them.

A suite file holds facts (role, kind, prompt, counts, dates) and no data, so a study on it can be planned before any
data is there.
Invariant: stated facts are checked, unknown ones (null) are not. An unknown count is never assumed in a check, only in
a provisional plan (`Suite.described`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from merge_service.errors import UserError
from pipeline.errors import ConfigError
from pipeline.study.file_kinds import expect
from pipeline.study.mistakes import validate
from pipeline.study.sections import GroupsSection, Name, Section, Text
from pipeline.study.yaml_input import read
from workers.data.lines import class_names, filled_lines, stated_number
from workers.data.manifest import (
    CLASSES_FILE,
    KIND_FILE,
    MANIFEST_FILE,
    TEMPLATES_FILE,
    DatasetInfo,
    SplitInfo,
    describe,
    folder,
    verify,
)
from workers.data.zero_shot import misfit

Role = Literal["pretraining", "adaptation", "held_out"]
ROLES: tuple[Role, ...] = ("pretraining", "adaptation", "held_out")
SPLITS: dict[Role, tuple[str, ...]] = {
    "pretraining": ("train",),
    "adaptation": ("train", "test"),
    "held_out": ("test",),
}
VAL = "val"
"""A split that any dataset may have in addition."""


def _with_place(template: str) -> str:
    if template.count("{c}") != 1:
        raise ValueError(f"{template!r} must hold {{c}}, the place of the class name, exactly once")
    return template


Count = Annotated[int | None, Field(ge=1, le=10**10)]


class SuiteDataset(Section):
    """One dataset, expected under the root in a folder of its name, with or without the prefix wds_. Null is unknown.

    `classes`, `train`, `test` and `val` are counts (`val` null: the split is optional); `original` is the folder's name
    in the download of the benchmark; `date` is a year, or text (year-month or year-month-day).
    """

    name: Name
    role: Role
    kind: Literal["classification", "retrieval"]
    original: Text | None = None
    template: Annotated[Text, AfterValidator(_with_place)] | None = None
    classes: Count = None
    train: Count = None
    test: Count = None
    val: Count = None
    date: int | Text | None = None

    @model_validator(mode="after")
    def _prompt_fits(self) -> Self:
        if (self.template is None) != (self.kind == "retrieval"):
            raise ValueError(
                f"{self.name}: a classification set has a template, a retrieval set has null, for its captions are whole"
            )
        if self.kind == "retrieval" and self.classes is not None:
            raise ValueError(f"{self.name}: a retrieval set has captions, not classes; write classes: null")
        return self

    @property
    def splits(self) -> tuple[str, ...]:
        """The required splits."""
        return (*SPLITS[self.role], VAL) if self.val is not None else SPLITS[self.role]


class Totals(Section):
    """The benchmark's totals over all datasets of a role."""

    classes: int = Field(ge=1)
    train: int = Field(ge=1)
    test: int = Field(ge=1)


class Suite(Section):
    """A benchmark: its datasets in the order of the file, and the stated totals. `read_suite_file` makes one."""

    format: Literal[1]
    name: Name
    totals: dict[Literal["adaptation", "held_out"], Totals] = {}
    zero_shot_groups: GroupsSection | None = None
    datasets: Annotated[tuple[SuiteDataset, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _grouped(self) -> Self:
        groups, roles = self.zero_shot_groups, self.roles
        if groups and (wrong := misfit(groups.model_dump(), roles["held_out"], roles["pretraining"])):
            raise ValueError(f"zero_shot_groups: {wrong}")
        return self

    @model_validator(mode="after")
    def _has_unique_names(self) -> Self:
        values = [dataset.name for dataset in self.datasets]
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)}: two datasets have this name; remove one")
        if not self.roles["adaptation"]:
            raise ValueError("no dataset has the role adaptation, so there is nothing to learn")
        return self

    @cached_property
    def roles(self) -> dict[str, tuple[str, ...]]:
        """The datasets of each role, as in the `suite.json` of a root."""
        return {role: tuple(d.name for d in self.datasets if d.role == role) for role in ROLES}

    @cached_property
    def dates(self) -> dict[str, int | str]:
        """The date of every dataset that has one, as `stream.dates` takes it."""
        return {d.name: d.date for d in self.datasets if d.date is not None}

    def dataset(self, name: str) -> SuiteDataset:
        """The dataset of that name. Raises UserError."""
        for dataset in self.datasets:
            if dataset.name == name:
                return dataset
        raise UserError(f"suite {self.name} has no dataset {name!r}")

    def described(self) -> dict[str, DatasetInfo]:
        """Descriptions of all datasets for planning before the data are there: no shards, and digests that no shards have.

        Class names are placeholders (class-00001, ...). A count that is null is an equal share of what remains of the
        role's total (1 without a total), so that sums over all datasets are right although single counts are not.
        """
        classes, train, test = (self._counts(what) for what in ("classes", "train", "test"))
        answer = {}
        for d in self.datasets:
            count = 0 if d.kind == "retrieval" else classes[d.name]
            samples = {"train": train[d.name], "test": test[d.name], VAL: d.val or 0}
            splits = {split: _no_shards(d.name, split, samples[split]) for split in d.splits}
            names = tuple(f"class-{index:05d}" for index in range(1, count + 1))
            prompts = (d.template,) if d.template is not None else ()
            answer[d.name] = DatasetInfo(d.name, d.kind, names, prompts, splits, f"provisional {d.name}")
        return answer

    def _counts(self, what: str) -> dict[str, int]:
        counts: dict[str, int] = {}
        for role in ROLES:
            mine = [d for d in self.datasets if d.role == role]
            if what == "classes":
                mine = [d for d in mine if d.kind == "classification"]
            unknown = [d.name for d in mine if getattr(d, what) is None]
            counts |= {d.name: getattr(d, what) for d in mine if getattr(d, what) is not None}
            total = getattr(self.totals[role], what) if role != "pretraining" and role in self.totals else 0
            left = max(len(unknown), total - sum(counts[d.name] for d in mine if d.name in counts))
            for index, name in enumerate(unknown):
                counts[name] = left // len(unknown) + (index < left % len(unknown))
        return counts


def _no_shards(name: str, split: str, samples: int) -> SplitInfo:
    return SplitInfo(samples, (), f"provisional {name} {split} {samples}")


def read_suite_file(path: str | Path) -> Suite:
    """The suite in a YAML file. Raises ConfigError with every mistake found, each with its key."""
    raw = read(Path(path))
    expect("suite", raw, Path(path))
    suite, problems = validate(Suite, raw)
    if suite is None:
        raise ConfigError([f"{path}: {problem.key}: {problem.text}" for problem in problems])
    return suite


@dataclass(frozen=True)
class Finding:
    """An obstacle between a dataset and a run.

    `what` is missing (no folder), wrong (not usable as the suite says), or differs (usable, but its scores are not
    comparable with the benchmark's). `text` says what was found, where, and what to do.
    """

    dataset: str
    role: str
    what: Literal["missing", "wrong", "differs"]
    text: str

    @property
    def blocks(self) -> bool:
        """Whether a study on the suite cannot run."""
        return self.what != "differs"


def missing(suite: Suite, root: str | Path, names: Sequence[str] | None = None) -> list[Finding]:
    """The datasets (of `names`, or all) that have no folder under `root`; only folders are checked."""
    wanted = suite.datasets if names is None else [suite.dataset(name) for name in names]
    return [_missing(d, Path(root)) for d in wanted if _home(d, Path(root)) is None]


def check(suite: Suite, root: str | Path, deep: bool = False, cache: Path | None = None) -> list[Finding]:
    """All findings of a suite under a root, in the order of the suite.

    Reads the small text files and manifests of each folder. `deep` also reads every shard and decodes every picture
    (the index goes to `cache`).
    """
    return [finding for d in suite.datasets for finding in _findings(d, Path(root), deep, cache)]


def summary(suite: Suite, root: str | Path, findings: Sequence[Finding]) -> dict[str, Any]:
    """The findings of `check` for programs: complete, counts, findings."""
    blocked = {finding.dataset for finding in findings if finding.blocks}
    return {
        "suite": suite.name,
        "root": str(root),
        "complete": not blocked,
        "datasets": len(suite.datasets),
        "usable": len(suite.datasets) - len(blocked),
        "findings": [asdict(finding) for finding in findings],
    }


def _findings(d: SuiteDataset, root: Path, deep: bool, cache: Path | None) -> Iterator[Finding]:
    home = _home(d, root)
    if home is None:
        yield _missing(d, root)
        return
    try:
        found = _whole(d, root, home, cache) if deep or (home / MANIFEST_FILE).is_file() else _shallow(home)
        if deep:
            for split in dict.fromkeys((*d.splits, VAL)):
                if split in found.samples:
                    verify(root, d.name, split, cache, decode=True)
    except (UserError, OSError, ValueError) as error:
        yield Finding(d.name, d.role, "wrong", str(error))
        return
    yield from _compare(d, home, found)


def _compare(d: SuiteDataset, home: Path, found: "_Found") -> Iterator[Finding]:
    def finding(what: Literal["wrong", "differs"], text: str) -> Finding:
        return Finding(d.name, d.role, what, text)

    if found.kind != d.kind:
        text = (
            f"{home / 'dataset_type.txt'} says {found.kind}, the suite {d.kind}; convert it again as {d.kind}"
        )
        yield finding("wrong", text)
    if d.kind == "classification" and d.classes not in (None, len(found.classes)):
        text = f"{home / 'classnames.txt'} names {len(found.classes)} classes, the suite states {d.classes}"
        yield finding("wrong", f"{text}; write one class a line")
    for split in d.splits:
        if split not in found.samples:
            text = f"{home / split} is missing or holds no *.tar; convert the {split} split"
            yield finding("wrong", text)
            continue
        stated, samples = getattr(d, split), found.samples[split]
        if None not in (stated, samples) and stated != samples:
            text = f"{home / split} holds {samples} samples, the suite states {stated}"
            yield finding("differs", f"{text}; convert the split that the benchmark uses")
    if d.template is not None and found.templates != (d.template,):
        prompts = (
            f"{found.templates[0]!r}" if len(found.templates) == 1 else f"{len(found.templates)} prompts"
        )
        path = home / "zeroshot_classification_templates.txt"
        yield finding(
            "differs", f"{path} gives {prompts}; to compare scores, let it hold the one line {d.template}"
        )


@dataclass(frozen=True)
class _Found:
    """The content of a dataset folder. `samples` is by split; None where counting would require reading the shards."""

    kind: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    samples: Mapping[str, int | None]


def _whole(d: SuiteDataset, root: Path, home: Path, cache: Path | None) -> _Found:
    info = describe(root, d.name, cache)
    samples: dict[str, int | None] = {split: of.samples for split, of in info.splits.items()}
    return _Found(info.kind, info.classes, filled_lines(home / TEMPLATES_FILE), samples)


def _shallow(home: Path) -> _Found:
    """The content of a folder without our manifest: its text files, and whether each split has as many shards as it states."""
    samples: dict[str, int | None] = {}
    for place in (home / "train", home / "test", home / VAL):
        shards = len(list(place.glob("*.tar")))
        stated = stated_number(place / "nshards.txt")
        if stated not in (None, shards):
            raise UserError(
                f"{place} holds {shards} shards, its nshards.txt states {stated}; fetch the missing ones"
            )
        if shards:
            samples[place.name] = None
    kind = (filled_lines(home / KIND_FILE) or ("classification",))[0]
    return _Found(kind, class_names(home / CLASSES_FILE), filled_lines(home / TEMPLATES_FILE), samples)


def _home(d: SuiteDataset, root: Path) -> Path | None:
    try:
        return folder(root, d.name)
    except UserError:
        return None


def _missing(d: SuiteDataset, root: Path) -> Finding:
    of = f" (from {d.original} of the original download)" if d.original else ""
    return Finding(d.name, d.role, "missing", f"put it at {root / d.name} or {root / f'wds_{d.name}'}{of}")
