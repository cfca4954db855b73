"""What one more arrival costs does not grow with the arrivals before it: instructions of Python, and bytes, are counted."""

import sys
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.service.home import Home
from pipeline.service.operations import Operations
from pipeline.service.scoring import NoScorer
from tests.pipeline.service import toys
from tests.pipeline.service.test_thousand import unlike

EARLY, LATE = 20, 90
MORE_INSTRUCTIONS = 20
"""Instructions for one more expert that came before. A search through all arrivals by one comparison takes more."""
MORE_BYTES = 130
"""An id and a sha256, in the header of a file."""


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


def sizes(service: Home) -> tuple[int, int]:
    """Bytes of the newest model and of the streaming state it was made from."""
    state = service.log.state
    record = service.store.find(state.served.fingerprint)
    assert record is not None
    (kept,) = (service.place / "states").glob(f"{state.chain[:32]}*.safetensors")
    return record.bytes, kept.stat().st_size


def test_arrival_executes_as_much_and_writes_no_more_but_a_name_after_seventy_others(tmp_path: Path) -> None:
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
            with Instructions() as instructions:
                operations.arrive(path, sender)
                worker.run()
            counted.append(instructions.count)
            written.append(sizes(service))
    more = LATE - EARLY
    assert service.log.state.t == LATE + 1
    assert counted[0] > 50_000
    assert counted[1] - counted[0] < MORE_INSTRUCTIONS * more, counted
    assert all(late - early < MORE_BYTES * more for early, late in zip(*written)), written
