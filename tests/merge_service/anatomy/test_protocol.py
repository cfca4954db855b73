"""A merge uses the results of an anatomy, also those of a family's own implementation."""

import numpy as np
import pytest

from merge_service.anatomy import ByName, anatomy_of
from merge_service.blocks.questions import NOTHING
from merge_service.blocks.spans import Span
from merge_service.engine import task as engine
from merge_service.engine.compute import Compute, site_of
from merge_service.engine.task import Input, MergeTask
from merge_service.techniques import get
from tests.merge_service.views import Arrays


class Family(ByName):
    """A family with another name for the temperature of its CLIP, and two towers called a and b."""

    def is_scale(self, name: str) -> bool:
        return name == "temperature"

    def group(self, name: str, granularity: str) -> str:
        return name[0] if granularity == "tower" else super().group(name, granularity)


def task(logit_scale: str = "clamped") -> MergeTask:
    sizes = {"temperature": 1, "a.weight": 3, "b.weight": 2}
    base = {name: np.full(size, 4, np.float32) for name, size in sizes.items()}
    expert = Arrays({name: array + 2 for name, array in base.items()})
    params = {**get("average").resolve({}, "merge"), "granularity": "tower", "logit_scale": logit_scale}
    return MergeTask.of(get("average"), params, Arrays(base), [Input("one", 1, expert)], {})


def temperature(of: MergeTask) -> float:
    span = Span("temperature", 0, 1)
    made = Compute(of, NOTHING, site_of(None)).span(span, None, majority=1, finish=True, sums=0)
    return float(made.block[0])


def test_family_answers_instead_of_the_rules_over_names(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = task()
    assert temperature(plain) == 6.0 and plain.group_sizes == {"model": 6}
    monkeypatch.setattr(engine, "anatomy_of", lambda shapes: Family(**vars(anatomy_of(shapes))))
    own = task()
    assert temperature(own) == np.float32(np.log(100)) and own.group_sizes == {"t": 1, "a": 3, "b": 2}
    assert [name for name, _ in task("base").copied] == ["temperature"]
