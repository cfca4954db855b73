"""What one more arrival costs does not grow with the arrivals before it: instructions of Python, and bytes, are counted."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from merge_service.live import Draft, Received, Refused, ServiceStarted, State, Version, apply, entry_of
from pipeline.service.home import Home
from pipeline.service.operations import DAY_MS, Operations, Quota
from pipeline.service.scoring import NoScorer
from tests.pipeline.service import toys
from tests.pipeline.service.test_thousand import unlike

EARLY, LATE = 20, 90
MORE_INSTRUCTIONS = 20
"""Instructions for one more expert that came before. A search through all arrivals by one comparison takes more."""
MORE_BYTES = 130
"""An id and a sha256, in the header of a file."""
PASSES = 1
"""How often an arrival passes over the names with JSON: they are a text within the text of the model's header."""


class Instructions:
    """Instructions of Python that are executed meanwhile, in this thread."""

    def __init__(self) -> None:
        self.count = 0

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        self.count += event == "opcode"
        return self._trace

    def __enter__(self) -> "Instructions":
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)


class Texts:
    """Characters of JSON that are read or written meanwhile, which C does, so `Instructions` does not see it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        dumps, loads = json.dumps, json.loads

        def written(*given: Any, **options: Any) -> str:
            text = dumps(*given, **options)
            self.count += len(text)
            return text

        def read(text: str | bytes, *given: Any, **options: Any) -> Any:
            self.count += len(text)
            return loads(text, *given, **options)

        monkeypatch.setattr(json, "dumps", written)
        monkeypatch.setattr(json, "loads", read)


def sizes(service: Home) -> tuple[int, int]:
    """Bytes of the newest model and of the streaming state it was made from."""
    state = service.log.state
    record = service.store.find(state.served.fingerprint)
    assert record is not None
    (kept,) = (service.place / "states").glob(f"{state.chain[:32]}*.safetensors")
    return record.bytes, kept.stat().st_size


def test_arrival_executes_as_much_and_writes_no_more_but_a_name_after_seventy_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, passed = Texts(monkeypatch), list[int]()
    strategy = {"init": "base", "deploy": "all", "technique": "average"}
    service = toys.home(tmp_path / "out", strategy, same_task="add")
    operations, counted, written = Operations(service), list[int](), list[tuple[int, int]]()
    with service.working():
        worker = service.worker(NoScorer())
        for number in range(LATE + 1):
            path, sender = unlike(tmp_path, number), toys.Sender(f"task{number}", "tests")
            if number not in (EARLY, LATE):
                operations.arrive(path, sender)
                worker.run()
                continue
            before = texts.count
            with Instructions() as instructions:
                operations.arrive(path, sender)
                worker.run()
            counted.append(instructions.count)
            passed.append(texts.count - before)
            written.append(sizes(service))
    more = LATE - EARLY
    assert service.log.state.t == LATE + 1
    assert counted[0] > 50_000
    assert counted[1] - counted[0] < MORE_INSTRUCTIONS * more, counted
    assert all(late - early < MORE_BYTES * more for early, late in zip(*written)), written
    assert passed[1] - passed[0] < PASSES * MORE_BYTES * more, passed


def test_quota_counts_as_far_as_it_allows_however_many_came_before() -> None:
    state, counted = State(), list[int]()
    start = ServiceStarted("toy", Version(0, "f", "s"), {}, 1)
    state = apply(state, entry_of(Draft(start), 1, state.head, 0))
    quota = Quota(owner=5, token=None, now_ms=2 * DAY_MS)
    for number in range(200):
        data = Received(f"task{number}", f"{number}", 1, "base", "ann")
        if number in (9, 10, 199):  # the first time compiles the pattern
            with Instructions() as instructions, pytest.raises(Refused, match="5 are allowed"):
                quota.check(state, data, "t-1")
            counted.append(instructions.count)
            assert replace(quota, now_ms=4 * DAY_MS).left(state, data, "t-1") == 5
        state = apply(state, entry_of(Draft(data, actor="t-1"), state.seq + 1, state.head, 2 * DAY_MS))
    assert counted[1] == counted[2]
