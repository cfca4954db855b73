"""Pinned results of merges: sha256 of toy checkpoints, for every way to carry a merge out.

A technique is pinned in each of its forms; the ways (threads, blocks, parts, device) must all give the pinned bytes. Bytes that
depend on the processor are not pinned; there the ways are compared with the first of them. `python -m tests.pins.merges` writes
the pins again, for a change that moves them on purpose.

Invariant: only arithmetic that every machine rounds alike is pinned.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from merge_service import techniques
from merge_service.checkpoints import sha256_of
from merge_service.engine import Split
from merge_service.merge import advance, fold, merge
from tests.merge_service import measured
from tests.merge_service.parts import here
from tests.merge_service.rounding import BY_LIBRARY, BY_MACHINE
from tests.merge_service.toys import dyadic, moved, save, towers

PINNED = Path(__file__).parent / "merges.json"
STORED = {
    "transformer.resblocks.1.mlp.weight": "BF16",
    "visual.transformer.resblocks.0.mlp.weight": "F16",
    "visual.transformer.resblocks.2.mlp.weight": "F8_E4M3",
}


@dataclass(frozen=True)
class Case:
    """A technique with some parameters, in its three forms as far as it has them."""

    technique: str
    params: Mapping[str, Any]

    @property
    def name(self) -> str:
        said = ",".join(f"{key}={json.dumps(value)}" for key, value in self.params.items())
        return f"{self.technique}({said})"

    @property
    def is_pinned(self) -> bool:
        return self.technique not in BY_MACHINE


FURTHER: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("average", {"schedule": "linear", "logit_scale": "base"}),
    ("average", {"weights": [0.5, 0.0, 2.0], "logit_scale": "unclamped"}),
    ("ties", {"density": 0.5, "granularity": "model", "count_frozen": False}),
    ("ties", {"density": 0.9, "granularity": "tensor", "consensus": "max"}),
    ("breadcrumbs_ties", {"density": 0.6, "outliers": 0.1, "consensus": "sum"}),
    ("breadcrumbs", {"granularity": "model"}),
    ("dare", {"rescale": "l1"}),
    ("dare_ties", {"trim": 0.2, "granularity": "model"}),
    ("della", {"rescale": "l1", "consensus": "max"}),
    ("sce", {"density": 1.0}),
    ("sce", {"erase_unselected": False}),
    ("lines_ties", {"lines_shape": "sqrt", "lines_alpha": 0.25}),
    ("pcb", {"inter_balance": "pairs"}),
    ("karcher", {"space": "task_vectors", "weights": [1.0, 2.0, 3.0]}),
    ("iso_c", {"attention": "whole", "text_projection": "mean"}),
)
CASES = tuple(
    Case(name, params)
    for name, params in (*((name, {}) for name in measured.GIVEN), *FURTHER)
    if techniques.get(name).origin is None
)
WAYS: Mapping[str, Mapping[str, Any]] = {
    "one-thread": {},
    "three-threads-small-blocks": {"threads": 3, "block": 1},
    "two-parts": {"threads": 2, "split": Split(2, here)},
    "torch-on-cpu": {"threads": 2, "device": "cpu"},
}


def allows(case: Case, way: str) -> bool:
    """Whether a technique supports a way, and must give the same bytes."""
    if way == "two-parts":
        return not techniques.get(case.technique).ordered
    return way != "torch-on-cpu" or case.technique not in BY_LIBRARY


class Files:
    """A base and three experts: towers, several blocks, narrow formats, integers, statistics, votes that cancel."""

    def __init__(self, room: Path) -> None:
        rng = np.random.default_rng(11)
        self.room, base = room, towers(rng)
        base["visual.proj"] = dyadic(rng, (260, 600), 64)
        base["visual.bn1.running_mean"] = dyadic(rng, (9,), 64)
        base["visual.bn1.running_var"] = np.abs(dyadic(rng, (9,), 64))
        self.base = save(room / "base.safetensors", base, dtypes=STORED)
        frozen = ("visual.ln_pre.bias",)
        models = [moved(rng, base, spread=4, frozen=frozen) for _ in range(3)]
        self.experts = [
            save(room / f"e{i}.safetensors", model, dtypes=STORED) for i, model in enumerate(models)
        ]
        self.ids = [f"{i:064x}" for i in range(1, 4)]
        self.sha256 = {name: sha256_of(path) for name, path in zip(self.ids, self.experts)}

    def merged(self, case: Case, way: Mapping[str, Any]) -> dict[str, str]:
        """sha256 of the merges of a study in every form: merge, fold, and the last arrival of a stream."""
        plugin = techniques.get(case.technique)
        out, common = self.room / "out.safetensors", {"sha256": self.sha256, **way}
        count, found = plugin.arity or 3, {}
        ids = self.ids[:count]
        for path in (self.base, *self.experts):
            measured.of_technique(plugin.name, path)
        merge(plugin.name, _of(case, "merge"), self.base, self.experts[:count], out, ids=ids, **common)
        found["merge"] = sha256_of(out)
        if "fold" in plugin.forms:
            pair = (self.ids[0], self.ids[1])
            fold(
                plugin.name, _of(case, "fold"), self.base, self.experts[0], self.experts[1], out, ids=pair, **common
            )  # fmt: skip
            found["fold"] = sha256_of(out)
        if "stream" in plugin.forms and "split" not in way:
            state = None
            for number, (name, path) in enumerate(zip(self.ids, self.experts)):
                after = self.room / f"state-{number}.safetensors"
                advance(
                    plugin.name, _of(case, "merge"), self.base, path, out, expert_id=name, state_in=state,
                    state_out=after, **common,
                )  # fmt: skip
                state = after
            found["stream"] = sha256_of(out)
        return {form: value[:32] for form, value in found.items()}


def _of(case: Case, form: str) -> dict[str, Any]:
    """The parameters that one form takes."""
    plugin = techniques.get(case.technique)
    return {name: value for name, value in case.params.items() if form in plugin.param(name).forms}


def pinned(files: Files) -> dict[str, dict[str, str]]:
    return {case.name: files.merged(case, {}) for case in CASES if case.is_pinned}


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        PINNED.write_text(json.dumps(pinned(Files(Path(place))), indent=1, sort_keys=True) + "\n")
