"""Which worker of `pytest -n` runs which file: those that need the session's Ray head go to one worker as long as there are any.

A head, and the undisturbed run that files compare with, is made once in every worker that needs it, and takes half a minute of
CPU; two heads at work on two cores are also slow enough for Ray's own time limits.

Invariant: the tests of a file run in one worker and in their order, as `--dist loadfile` has them.
"""

import re
from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from xdist.workermanage import WorkerController

NEEDS_HEAD = re.compile(r"\b(?:cluster: Cluster|undisturbed: Path)\b")
"""How a file names the fixtures that start a head."""


def next_file(files: Collection[str], with_head: bool, text_of: Callable[[str], str]) -> str:
    """The file that a worker takes next: the worker with the head those that need it, another one the rest, and each what the
    other has left once its own are done.

    Files with tests marked slow come first, so that no long one is left at the end; of what another worker has left, the last.
    """
    mine = [file for file in files if bool(NEEDS_HEAD.search(text_of(file))) == with_head]
    slow_first = sorted(mine or files, key=lambda file: "pytest.mark.slow" not in text_of(file))
    return slow_first[0 if mine else -1]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `--dist loadfile`, a scheduler that goes by `next_file`."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    @cache
    def text_of(file: str) -> str:
        return (Path(config.rootpath) / file).read_text()

    class Lanes(LoadFileScheduling):
        with_head: "WorkerController | None" = None

        def _assign_work_unit(self, node: "WorkerController") -> None:
            if self.with_head not in self.assigned_work:  # none yet, or it crashed
                self.with_head = node
            file = next_file(self.workqueue, node is self.with_head, text_of)
            self.workqueue.move_to_end(file, last=False)
            super()._assign_work_unit(node)

    return Lanes(config, log)
