"""Thresholds of an expert's task vector, computed once and kept in a small file beside its weights.

They are a function of the expert's bytes, the base's bytes and the rule, and computing them is most of the cost of a TIES merge.
The file need not be trusted: it carries its own digest, and each entry names expert, base and rule. Entries that do not match are
computed again. If the file cannot be written, the merge continues without it and its report says so.

Invariant: a merge gives the same bytes whatever such files contain.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_service.blocks.questions import Findings, Key, Thresholds
from merge_service.checkpoints.admission import admit
from merge_service.checkpoints.checkpoint import Checkpoint
from merge_service.checkpoints.weights import Weights
from merge_service.engine.prepare import prepare
from merge_service.engine.survey import Surveyor
from merge_service.engine.task import Input, MergeTask
from merge_service.files.leftovers import sweep
from merge_service.files.whole import replace_whole
from merge_service.techniques.registry import get

FORMAT = 1
"""Increase it when the convention for thresholds changes."""
SUFFIX = ".limits.json"
MOST = 64
"""Most entries of one file; the oldest are dropped."""
_MOST_BYTES = 32 * 2**20

Keep = bool | Path | str
"""Whether thresholds are written: True for beside the weights, or a directory that holds them instead (also for reading)."""


@dataclass(frozen=True)
class Identity:
    """The identity of weights: a digest of samples, and their sha256 or else the files' sizes and times."""

    digest: str
    stat: list[list[int]]
    sha256: str | None

    @classmethod
    def of(cls, weights: Weights, sha256: str | None = None) -> "Identity":
        """The identity of an open checkpoint; `sha256` if the caller has it."""
        stats = [file.stat() for file in weights.files]
        return cls(weights.fingerprint(), [[s.st_size, s.st_mtime_ns] for s in stats], sha256)

    def fits(self, kept: Mapping[str, Any]) -> bool:
        """Whether `kept` is the identity of these weights."""
        if kept["digest"] != self.digest:
            return False
        if self.sha256 is not None and kept["sha256"] is not None:
            return bool(kept["sha256"] == self.sha256)
        return bool(kept["stat"] == self.stat)


class KeptThresholds:
    """The kept thresholds of every expert of one task."""

    def __init__(self, task: MergeTask, keep: Keep, sha256: Mapping[str, str] | None = None) -> None:
        self.task, self.keep, self.rule = task, keep, _rule(task)
        self._inputs = {expert.order: expert for expert in task.inputs}
        self._sha256 = sha256 or {}
        self._identities: dict[int, Identity] = {}
        self._found: set[int] = set()

    def recall(self) -> Findings:
        """The kept thresholds that match."""
        found: dict[Key, Thresholds] = {}
        for expert in self._kept():
            for entry in reversed(self._read(expert.order)):
                fitting = self._fitting(entry)
                if fitting is not None:
                    found |= {(group, expert.order): value for group, value in fitting.items()}
                    self._found.add(expert.order)
                    break
        return Findings(found)

    def store(self, found: Findings) -> tuple[str, ...]:
        """Write the thresholds that had to be computed, if requested; returns per expert why they could not be written."""
        problems = []
        for expert in self._kept() if self.keep else ():
            if expert.order not in self._found:
                try:
                    self._write(expert.order, found)
                except OSError as error:
                    problems.append(f"{expert.id}: thresholds were not kept: {error}")
        return tuple(problems)

    def _kept(self) -> list[Input]:
        """The experts whose thresholds may be kept: those in files, if the base is in files too."""
        if self.rule is None or (self.task.base is not None and not self.task.base.files):
            return []
        return [expert for expert in self.task.inputs if expert.weights.files]

    def _identity(self, order: int) -> Identity:
        """The identity of an expert, or of the base as number 0; computed on first use."""
        if order not in self._identities:
            expert = self._inputs.get(order)
            weights = expert.weights if expert else self.task.base
            assert weights is not None
            self._identities[order] = Identity.of(weights, self._sha256.get(expert.id) if expert else None)
        return self._identities[order]

    def _path(self, order: int) -> Path:
        if not isinstance(self.keep, bool):
            return Path(self.keep) / f"{self._identity(order).digest}{SUFFIX}"
        weights = self._inputs[order].weights.path
        return weights.with_name(weights.name + SUFFIX)

    def _read(self, order: int) -> list[dict[str, Any]]:
        """The entries of an expert's file; none if no file matches."""
        try:
            path = self._path(order)
            if not path.is_file() or path.stat().st_size > _MOST_BYTES:
                return []
            body = json.loads(path.read_bytes())
            stated = body.pop("content_sha256")
            if (
                body["format"] != FORMAT
                or stated != _digest(body)
                or not self._identity(order).fits(body["expert"])
            ):
                return []
            return list(body["entries"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return []

    def _fitting(self, entry: dict[str, Any]) -> dict[str, Thresholds] | None:
        try:
            if entry["rule"] != self.rule or not self._identity(0).fits(entry["base"]):
                return None
            kept = {group: Thresholds(*map(float.fromhex, ends)) for group, ends in entry["limits"].items()}
            return kept if kept.keys() == self.task.group_sizes.keys() else None
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def _write(self, order: int, found: Findings) -> None:
        ends = {group: found.thresholds[group, order] for group in self.task.group_sizes}
        written = {group: [kept.low.hex(), kept.high.hex()] for group, kept in ends.items()}
        entry = {"rule": self.rule, "base": vars(self._identity(0)), "limits": written}
        entries = [*self._read(order), entry][-MOST:]
        body: dict[str, Any] = {"format": FORMAT, "expert": vars(self._identity(order)), "entries": entries}
        body["content_sha256"] = _digest(body)
        path = self._path(order)
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        replace_whole(path, json.dumps(body, indent=1), sync=False)


def keep_thresholds(
    technique: str,
    params: Mapping[str, Any],
    base: Path | str,
    expert: Path | str,
    keep: Keep = True,
    *,
    sha256: str | None = None,
    threads: int = 1,
) -> tuple[str, ...]:
    """Compute and keep the thresholds that a merge by `technique` needs of this expert; does nothing if it needs none.

    Call it where an expert is trained, while its weights are still in memory. Returns why thresholds could not be kept, if so.
    Raises what `merge` raises for the base, the expert or the parameters.
    """
    plugin = get(technique)
    with Checkpoint.open(base) as anchor, Checkpoint.open(expert) as weights:
        task = MergeTask.of(plugin, plugin.resolve(params, "merge"), anchor, [Input("expert", 1, weights)])
        admit(anchor, weights, "the expert")
        memory = KeptThresholds(task, keep, {"expert": sha256} if sha256 else None)
        if memory.rule is None:
            return ()
        ask = Surveyor(task, task.combined, threads).answer
        return memory.store(prepare(task, ask, memory.recall()))


def thresholds_rule(technique: str, params: Mapping[str, Any]) -> dict[str, Any] | None:
    """The part of a merge's parameters that its thresholds depend on; None for a technique without thresholds."""
    return get(technique).thin(params).identity()


def _rule(task: MergeTask) -> dict[str, Any] | None:
    """That part, and a digest of the tensors that are ranked together; None if there is nothing to compute."""
    rule = task.thin.identity()
    if rule is None or not task.inputs:
        return None
    ranked = [(name, numel, task.group(name)) for name, numel in task.combined]
    return {**rule, "tensors": hashlib.sha256(repr(ranked).encode()).hexdigest()}


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
