"""A plan as JSON, and as the file plan.json, whose size grows with the number of steps and not with the lists that steps name.

A value that many steps name is written once, in "values" (`shared_values`). Trajectories name steps by their number in "steps". The
file has one step per line, so it is written and read line by line; `read` parses a step when it is first used.
Invariant: `decode(encode(plan)) == plan`; the file is replaced as a whole.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pipeline.errors import PlanError
from pipeline.files.disk import write_whole
from pipeline.kinds.table import KINDS
from pipeline.plan.shared_values import Known, Prefixes, Values
from pipeline.plan.steps import Plan, Point, Step, TrajectoryPlan

FORMAT = 3
_REFERENCES = ("train", "init", "deployed", "merge", "evaluate", "own")
_FIELDS = tuple(one.name for one in fields(Step) if one.name not in ("spec", "inputs"))
_LINE = re.compile(r'\{"kind": "([a-z]+)", "fingerprint": "([0-9a-f]+)"')
_STEPS, _VALUES, _NEXT, _END = '"steps": [\n', '"values": [\n', "],\n", "]}\n"


def encode(plan: Plan) -> dict[str, object]:
    """The plan as plain JSON values; `decode` gives an equal plan."""
    values = Values()
    steps = [_step_body(step, values) for step in plan.steps.values()]
    return {**_head(plan), "steps": steps, "values": values.bodies}


def decode(body: Mapping[str, object]) -> Plan:
    """The plan in its JSON. Raises PlanError if it is malformed."""
    return _decoded(body)


def _decoded(body: Mapping[str, Any]) -> Plan:
    with _malformed_refused():
        _check_format(body)
        values = Known(body["values"])
        steps = {entry["fingerprint"]: _step(entry, values) for entry in body["steps"]}
        return _plan(body, steps)


def write(plan: Plan, path: Path) -> None:
    """Write plan.json, step by step. Raises StorageFull, OSError."""
    write_whole(path, _lines(plan), sync=True)


def read(path: Path) -> Plan:
    """The plan in a plan.json; its steps are parsed when they are first used. Raises PlanError, OSError."""
    with _malformed_refused(), path.open(encoding="utf-8") as stream:
        head = []
        for line in stream:
            if line == _STEPS:
                break
            head.append(line)
        else:
            return decode(json.loads("".join(head)))
        body = json.loads("".join(head) + '"steps": []}')
        _check_format(body)
        lines = [*_until(stream, _NEXT)]
        if next(stream, "") != _VALUES:
            raise KeyError("values")
        return _plan(body, LazySteps(lines, Known([*_until(stream, _END)])))


def study_of(path: Path) -> str | None:
    """The name of the study in a plan.json of any format, None if there is none. Reads no more of the file than needed."""
    found = None
    try:
        with path.open(encoding="utf-8") as stream:
            found = re.search(r'"study": ("(?:[^"\\]|\\.)*")', stream.read(4096))
        return (
            str(json.loads(found[1])) if found else str(json.loads(path.read_text(encoding="utf-8"))["study"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


class LazySteps(Mapping[str, Step]):
    """Steps by fingerprint, each parsed when it is first used. `kinds` is known without parsing."""

    def __init__(self, lines: Sequence[str], values: Known) -> None:
        self._lines: dict[str, str] = {}
        self._made: dict[str, Step] = {}
        self._values = values
        self.kinds: dict[str, Any] = {}
        for line in lines:
            found = _LINE.match(line)
            if found is None:
                raise KeyError("kind and fingerprint")
            kind, fingerprint = found.groups()
            self._lines[fingerprint], self.kinds[fingerprint] = line, kind

    def __getitem__(self, fingerprint: str) -> Step:
        if fingerprint not in self._made:
            line = self._lines[fingerprint]
            with _malformed_refused():
                self._made[fingerprint] = _step(json.loads(line), self._values)
        return self._made[fingerprint]

    def __contains__(self, fingerprint: object) -> bool:
        return fingerprint in self._lines

    def __iter__(self) -> Iterator[str]:
        return iter(self._lines)

    def __len__(self) -> int:
        return len(self._lines)


def inputs_of(kind: str, spec: Mapping[str, object]) -> dict[str, str]:
    """The inputs of a step by role, from its spec. Raises KeyError or TypeError for an invalid spec."""
    return KINDS[kind].spec.of(spec).inputs()


def _head(plan: Plan) -> dict[str, Any]:
    """Everything in the plan except its steps."""
    numbers = {fingerprint: number for number, fingerprint in enumerate(plan.steps)}
    return {
        "format": FORMAT,
        "fingerprint": plan.fingerprint,
        "study": plan.study,
        "adaptation": list(plan.adaptation),
        "held_out": list(plan.held_out),
        "naive": plan.naive,
        "naive_gflops": plan.naive_gflops,
        "missing": list(plan.missing),
        "zero_shot_groups": plan.zero_shot_groups,
        "own_groups": plan.own_groups,
        "settings": plan.settings,
        "retrieval": list(plan.retrieval),
        "streams": plan.streams,
        "classes": _class_lists(plan.classes),
        "bases": [_step_body(base, Values()) for base in plan.bases.values()],
        "trajectories": [_trajectory_body(trajectory, numbers) for trajectory in plan.trajectories],
    }


def _lines(plan: Plan) -> Iterator[str]:
    head = _head(plan)
    trajectories = head.pop("trajectories")
    yield json.dumps(head)[:-1] + ',\n"trajectories": [\n'
    yield from _rows(map(json.dumps, trajectories))
    yield _NEXT + _STEPS
    values = Values()
    yield from _rows(json.dumps(_step_body(step, values)) for step in plan.steps.values())
    yield _NEXT + _VALUES
    yield from _rows(map(json.dumps, values.bodies))
    yield _END


def _rows(texts: Iterable[str]) -> Iterator[str]:
    """One line each, separated by commas."""
    before = ""
    for text in texts:
        yield before + text
        before = ",\n"
    yield "\n" if before else ""


def _until(stream: Iterator[str], end: str) -> Iterator[str]:
    """The rows before the line `end`. Raises ValueError if that line is missing."""
    for line in stream:
        if line == end:
            return
        yield line.removesuffix("\n").removesuffix(",")
    raise ValueError("it is cut")


def _step_body(step: Step, values: Values) -> dict[str, Any]:
    body = {name: getattr(step, name) for name in _FIELDS}
    plain = {key: value for key, value in step.spec.items() if not isinstance(value, list | dict)}
    more = {key: values.of(value) for key, value in step.spec.items() if key not in plain}
    return {**body, "spec": plain, "values": more}


def _step(entry: Mapping[str, Any], values: Known) -> Step:
    body = dict(entry)
    spec = {**body.pop("spec"), **{key: values[number] for key, number in body.pop("values").items()}}
    body["after"] = tuple(body["after"])
    return Step(**body, spec=spec, inputs=inputs_of(body["kind"], spec))


def _trajectory_body(trajectory: TrajectoryPlan, numbers: Mapping[str, int]) -> dict[str, Any]:
    points = []
    for point in trajectory.points:
        named = [getattr(point, name) for name in _REFERENCES]
        points.append([point.t, point.task, *(numbers.get(one, one) for one in named)])
    return {**vars(trajectory), "points": points}


def _trajectory(entry: Mapping[str, Any], fingerprints: Sequence[str]) -> TrajectoryPlan:
    points = []
    for t, task, *references in entry["points"]:
        found = [fingerprints[one] if type(one) is int else one for one in references]
        points.append(Point(t, task, **dict(zip(_REFERENCES, found, strict=True))))
    return TrajectoryPlan(**{**entry, "points": tuple(points), "stream": tuple(entry["stream"])})


def _plan(body: Mapping[str, Any], steps: Mapping[str, Step]) -> Plan:
    fingerprints = [*steps]
    return Plan(
        study=body["study"],
        bases={entry["fingerprint"]: _step(entry, Known(())) for entry in body["bases"]},
        steps=steps,
        trajectories=tuple(_trajectory(entry, fingerprints) for entry in body["trajectories"]),
        streams={
            key: {name: tuple(sets) for name, sets in one.items()} for key, one in body["streams"].items()
        },
        classes=_classes(body["classes"]),
        adaptation=tuple(body["adaptation"]),
        held_out=tuple(body["held_out"]),
        naive=dict(body["naive"]),
        naive_gflops=body["naive_gflops"],
        missing=tuple(body["missing"]),
        zero_shot_groups={key: tuple(sets) for key, sets in body.get("zero_shot_groups", {}).items()},
        own_groups=body.get("own_groups", False),
        settings=dict(body.get("settings", {})),
        retrieval=tuple(body.get("retrieval", ())),
    )


def _class_lists(classes: Mapping[str, Sequence[str]]) -> dict[str, object]:
    """The class names by digest; a list that extends another is {"extends": digest, "by": [...]}."""
    lists, found = Prefixes[str, str](), dict[str, object]()
    for digest, names in classes.items():
        known, rest = lists.add(names, digest)
        found[digest] = list(names) if known is None else {"extends": known, "by": list(rest)}
    return found


def _classes(body: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The decoded lists; each comes after the one that it extends."""
    found: dict[str, tuple[str, ...]] = {}
    for digest, names in body.items():
        found[digest] = (*found[names["extends"]], *names["by"]) if isinstance(names, dict) else tuple(names)
    return found


def _check_format(body: Mapping[str, Any]) -> None:
    if body["format"] != FORMAT:
        raise PlanError(f"the plan has format {body['format']!r}, this version reads {FORMAT}; run again")


@contextlib.contextmanager
def _malformed_refused() -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        if isinstance(error, PlanError | json.JSONDecodeError):
            raise
        raise PlanError(f"the plan is malformed ({error!r}); run the study again to rewrite it") from None
