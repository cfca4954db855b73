"""Streams: which classes arrive in which task. A stream is made in an order of FoMo-in-Flux, or read from a shared file.

Invariant: a stream holds every class at most once, and every task holds at least one. The name of a task depends only
on its content, because the seed of an expert depends on the name: equal tasks of different streams have equal names
(and share an expert), different tasks have different names.

Orders are those of FoMo-in-Flux (arXiv 2408.14471 and its stream files); where these do not specify a detail, the
docstring says "our convention".
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from pipeline.errors import ConfigError, PlanError
from pipeline.files.disk import write_whole
from pipeline.identity import fingerprint
from pipeline.study.mistakes import nearest, validate
from pipeline.study.sections import Name, Section, Text
from pipeline.study.sections_stream import StreamSection
from pipeline.study.stream_tables import read_counts

FORMAT = 1
JOINT = "+++"
"""The separator of dataset and class in one name, as in the files of FoMo-in-Flux."""
WHOLE = ""
"""The class of an element that is a whole dataset (a retrieval set, which has no classes)."""
NAME_DIGITS = 10
LISTED = 5

Element = tuple[str, str]
"""(dataset, class), or (dataset, WHOLE)."""
Measured = Mapping[Element, float | tuple[float, ...]]


@dataclass(frozen=True)
class Part:
    """The part of a task that comes from one dataset; `classes` None is the whole dataset."""

    dataset: str
    classes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class StreamTask:
    """The content of one time step. `name` is one plain path segment."""

    name: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Stream:
    """Tasks in the order of their arrival. `made` records how they were made; it is information and no part of the identity."""

    tasks: tuple[StreamTask, ...]
    made: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def to_json(self) -> dict[str, Any]:
        """{"tasks": [{"name", "parts": [{"dataset", "classes": [...] or null}]}]}."""
        return {
            "tasks": [
                {
                    "name": task.name,
                    "parts": [
                        {
                            "dataset": part.dataset,
                            "classes": None if part.classes is None else list(part.classes),
                        }
                        for part in task.parts
                    ],
                }
                for task in self.tasks
            ]
        }

    @classmethod
    def from_json(cls, body: Any) -> "Stream":
        """The stream from the output of `to_json`. Raises ConfigError for anything else."""
        return _parsed(body, _Body, "stream")

    @cached_property
    def fingerprint(self) -> str:
        """The digest of the tasks with their names and classes; `made` is not part of it."""
        return fingerprint(self.to_json())

    @property
    def datasets(self) -> tuple[str, ...]:
        """Every dataset of the stream, in order of first arrival."""
        return tuple(dict.fromkeys(part.dataset for task in self.tasks for part in task.parts))


# --- making -----------------------------------------------------------------------------------------------------------------


def participants(section: StreamSection, datasets: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The datasets whose classes take part, for a section without `file`. Raises ConfigError for an unknown name."""
    names = section.tasks or tuple(datasets)
    for name in names:
        if name not in datasets:
            raise ConfigError(
                f"stream.tasks: {name!r} is no adaptation dataset{nearest(name, datasets) or _available(datasets)}"
            )
    return names


def datasets_of(section: StreamSection) -> tuple[str, ...]:
    """The datasets that a section or its file names. Raises ConfigError for a file that is not a stream."""
    return load(Path(section.file)).datasets if section.file is not None else section.tasks or ()


def length_of(section: StreamSection) -> int:
    """The number of tasks of a section that names its datasets. Raises ConfigError for a file that is not a stream."""
    if section.file is not None:
        return len(load(Path(section.file)).tasks)
    return section.chunks or len(section.tasks or ())


def make_stream(
    section: StreamSection, datasets: Mapping[str, Sequence[str]], measured: Measured | None = None
) -> Stream:
    """The stream of a section over `datasets`: adaptation dataset -> its class names, () for a retrieval set.

    Two orders need `measured`, with a value for every element that takes part. For `performance` it is the base's score
    (higher is easier; further values of a tuple break ties), for `similarity` the position on the path
    (`workers.scoring.stream_orders.measure`). The order of the keys of `datasets` matters for dataset_incremental only.
    Raises ConfigError, PlanError.
    """
    if section.file is not None:
        return _fitting(load(Path(section.file)), datasets)
    names = participants(section, datasets)
    made = section.model_dump(mode="json", include={"order", "chunks", "seed", "reverse"})
    if section.chunks is None:
        whole = [StreamTask(name, (Part(name),)) for name in names]
        return Stream(tuple(whole[::-1] if section.reverse else whole), made)
    taking_part = {name: _distinct_classes(name, datasets[name]) for name in names}
    elements = _in_order(section, taking_part, measured)
    if section.reverse:
        elements.reverse()
    return Stream(tuple(_task(chunk, taking_part) for chunk in _cut(elements, section.chunks)), made)


def elements_of(datasets: Mapping[str, Sequence[str]]) -> list[Element]:
    """Every (dataset, class), in the order of the datasets and of their classes; a set without classes is one element."""
    return [(name, label) for name, classes in datasets.items() for label in classes or (WHOLE,)]


def _in_order(
    section: StreamSection, datasets: Mapping[str, Sequence[str]], measured: Measured | None
) -> list[Element]:
    """All elements in the order of the section, before reversal."""
    if section.order == "dataset_incremental":
        return elements_of(datasets)
    elements = elements_of(dict(sorted(datasets.items())))
    keys: list[Any]
    if section.order in ("performance", "similarity"):
        keys = _measured_keys(section.order, elements, measured)
    else:
        drawn = _draws(len(elements), section.seed)
        first: Sequence[Any] = [0] * len(elements)
        if section.order == "frequency":
            first = _frequencies(Path(section.table or ""), elements)
        elif section.order == "time":
            first = _arrivals(section, elements)
        keys = list(zip(first, drawn, strict=True))
    return [elements[at] for at in sorted(range(len(elements)), key=keys.__getitem__)]


def _draws(count: int, seed: int) -> list[int]:
    """One 64-bit number per element: raw Philox output, which NumPy keeps the same in every version and on every machine."""
    return np.random.Philox(key=seed).random_raw(count).tolist()


def _measured_keys(order: str, elements: Sequence[Element], measured: Measured | None) -> list[Any]:
    """Sort keys. performance: easy to hard, descending scores. similarity: ascending positions. Ties keep dataset and
    class order.
    """
    measured = measured or {}
    missing = [element for element in elements if element not in measured]
    if missing:
        raise PlanError(
            f"stream.order: {order} needs the base model's measure of every class, which {_some_of(missing)} lack; measure "
            "them first (workers.scoring.stream_orders), or take a saved stream (stream.file)"
        )
    found = [measured[element] for element in elements]
    values = [value if isinstance(value, tuple) else (value,) for value in found]
    for element, value in zip(elements, values, strict=True):
        if not all(math.isfinite(number) for number in value):
            raise PlanError(
                f"stream.order: {order}: the measure of {JOINT.join(element)} is {value}, not finite"
            )
    return [tuple(-number for number in value) for value in values] if order == "performance" else [*values]


def _frequencies(table: Path, elements: Sequence[Element]) -> list[float]:
    """Counts, least frequent first (2408.14471). DATASET+++class takes precedence over class; a retrieval set uses its
    own name.
    """
    counts = read_counts(table)
    found = [
        counts.get(JOINT.join(element), counts.get(element[1] if element[1] != WHOLE else element[0]))
        for element in elements
    ]
    missing = [element for element, count in zip(elements, found, strict=True) if count is None]
    if missing:
        raise ConfigError(
            f"stream.table: {table} has no count for {_some_of(missing)}; add a row for each (0 if it never occurs)"
        )
    return [count for count in found if count is not None]


def _arrivals(section: StreamSection, elements: Sequence[Element]) -> list[tuple[int, ...]]:
    """The date of each element's dataset: earlier first, with classes of one date in random order (FoMo-in-Flux's rsagg)."""
    periods = section.periods
    missing = sorted({dataset for dataset, _ in elements if dataset not in periods})
    if missing:
        raise ConfigError(
            f"stream.dates: no date for {', '.join(missing[:20])}{nearest(missing[0], periods)}; give each a year or an ISO date"
        )
    return [periods[dataset] for dataset, _ in elements]


def _cut(elements: Sequence[Element], chunks: int) -> Iterator[Sequence[Element]]:
    """`chunks` runs of near-equal length; the first (n mod chunks) are longer by one, as in FoMo-in-Flux."""
    if chunks > len(elements):
        raise ConfigError(
            f"stream.chunks: {chunks} tasks cannot be cut from {len(elements)} classes; ask for {len(elements)} or fewer"
        )
    size, longer = divmod(len(elements), chunks)
    start = 0
    for number in range(chunks):
        end = start + size + (number < longer)
        yield elements[start:end]
        start = end


def _task(chunk: Sequence[Element], datasets: Mapping[str, Sequence[str]]) -> StreamTask:
    """Parts sorted by dataset name, classes in the order of their dataset, so that equal sets of classes give equal tasks."""
    chosen: dict[str, set[str]] = {}
    for dataset, label in chunk:
        chosen.setdefault(dataset, set()).add(label)
    parts = []
    for dataset in sorted(chosen):
        kept = tuple(label for label in datasets[dataset] if label in chosen[dataset])
        parts.append(Part(dataset, None if len(kept) == len(datasets[dataset]) else kept))
    return StreamTask(_task_name(parts, len(chunk), datasets), tuple(parts))


def _task_name(parts: Sequence[Part], size: int, datasets: Mapping[str, Sequence[str]]) -> str:
    """The dataset if the task is one whole dataset, else the sizes of its content and a digest of it (our convention)."""
    if len(parts) == 1 and parts[0].classes is None:
        return parts[0].dataset
    content = [[part.dataset, None if part.classes is None else list(part.classes)] for part in parts]
    digest = fingerprint(content)[:NAME_DIGITS]
    if len(parts) == 1:
        dataset = parts[0].dataset
        return f"{dataset[:60]}-{size}of{len(datasets[dataset])}-{digest}"
    return f"{size}classes-{len(parts)}datasets-{digest}"


def _distinct_classes(dataset: str, classes: Sequence[str]) -> tuple[str, ...]:
    if len(set(classes)) < len(classes):
        twice = next(label for at, label in enumerate(classes) if label in classes[:at])
        raise PlanError(
            f"dataset {dataset} has two classes named {twice!r}, which a stream of classes cannot tell apart; "
            "rename one in its classnames.txt, or make every dataset one task (stream.order dataset_incremental, no chunks)"
        )
    return tuple(classes)


# --- files ------------------------------------------------------------------------------------------------------------------


class _PartBody(Section):
    dataset: Name
    classes: Annotated[tuple[Text, ...], Field(min_length=1)] | None


class _TaskBody(Section):
    name: Name
    parts: Annotated[tuple[_PartBody, ...], Field(min_length=1)]


class _Body(Section):
    tasks: Annotated[tuple[_TaskBody, ...], Field(min_length=1)]


class _File(_Body):
    format: Literal[1]
    made: dict[str, Any] = {}


def save(stream: Stream, path: Path) -> None:
    """Write a stream as a JSON file, the same bytes for the same stream."""
    body = {"format": FORMAT, "made": dict(stream.made), **stream.to_json()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(body, indent=1, ensure_ascii=False) + "\n")


def load(path: Path) -> Stream:
    """The stream in a file. Raises ConfigError if it is unreadable, malformed, has unknown keys, or repeats a class or
    task name.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_key_twice)
    except OSError as error:
        raise ConfigError(f"stream.file: {path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"stream.file: {path} is not a stream: no valid JSON ({error})") from None
    return _parsed(raw, _File, f"stream.file: {path}")


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError(f"a key is given twice among {', '.join(key for key, _ in pairs)[:100]}")
    return dict(pairs)


def _parsed(raw: Any, model: type[_Body], where: str) -> Stream:
    body, problems = validate(model, raw)
    if body is None:
        raise ConfigError([f"{where}: {problem.key}: {problem.text}" for problem in problems])
    tasks = tuple(
        StreamTask(task.name, tuple(Part(part.dataset, part.classes) for part in task.parts))
        for task in body.tasks
    )
    repeated = list(_repetitions(tasks))
    if repeated:
        raise ConfigError([f"{where}: {text}" for text in repeated[:20]])
    return Stream(tasks, body.made if isinstance(body, _File) else {})


def _repetitions(tasks: Sequence[StreamTask]) -> Iterator[str]:
    """Whatever a stream may hold only once but holds twice: task names, classes, and whole datasets."""
    names: set[str] = set()
    seen: dict[str, set[str]] = {}
    whole: set[str] = set()
    for task in tasks:
        if task.name in names:
            yield f"two tasks are called {task.name!r}; rename one"
        names.add(task.name)
        for part in task.parts:
            known = seen.setdefault(part.dataset, set())
            if part.dataset in whole or (part.classes is None and known):
                yield f"task {task.name}: dataset {part.dataset} is also there as a whole; every class may arrive once"
            for label in part.classes or ():
                if label in known:
                    yield f"task {task.name}: {part.dataset}{JOINT}{label} arrives a second time; remove one"
                known.add(label)
            if part.classes is None:
                whole.add(part.dataset)
                known.add(WHOLE)


def _fitting(stream: Stream, datasets: Mapping[str, Sequence[str]]) -> Stream:
    """The stream, if all that it names exists. Raises ConfigError with the first names that do not."""
    problems = list(islice(_unfitting(stream, datasets), 20))
    if problems:
        raise ConfigError([f"stream.file: {problem}" for problem in problems])
    return stream


def _unfitting(stream: Stream, datasets: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for name in stream.datasets:
        if name not in datasets:
            yield f"{name!r} is no adaptation dataset{nearest(name, datasets) or _available(datasets)}"
    for task in stream.tasks:
        for part in task.parts:
            if part.dataset not in datasets or part.classes is None:
                continue
            known = _distinct_classes(part.dataset, datasets[part.dataset])
            unknown = sorted(set(part.classes) - set(known))
            if unknown:
                listed = ", ".join(repr(label) for label in unknown[:LISTED])
                yield f"task {task.name}: dataset {part.dataset} has no class {listed}{nearest(unknown[0], known)}"


def _some_of(elements: Sequence[Element]) -> str:
    listed = ", ".join(JOINT.join(element) if element[1] else element[0] for element in elements[:LISTED])
    more = len(elements) - LISTED
    return f"{listed} and {more} more" if more > 0 else listed


def _available(datasets: Mapping[str, Sequence[str]]) -> str:
    return f"; there are {', '.join(list(datasets)[:40]) or 'none'}"
