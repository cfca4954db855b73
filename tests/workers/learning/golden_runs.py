"""Runs of the golden vectors' models: a learning at its beginning, whose losses and gradients a test can look at."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from safetensors.numpy import load_file

from tests.merge_service.statistics import golden
from workers.evidence.asked import Asked, Inputs
from workers.evidence.network import open_model, temperature_of
from workers.learning.learn import Run, Where, run_of, start
from workers.learning.members import opened
from workers.learning.trimmed import trimmed
from workers.learning.wanted import Wanted


def config(case: dict) -> str:
    """A file with the architecture."""
    return str(golden.FOLDER / case["config"])


def where(case: dict, out: Path | None = None, **more) -> Where:
    return Where(golden.files(case, "experts"), golden.FOLDER / case["base"], out, config(case), **more)


def inputs(case: dict) -> list[Inputs]:
    return [Inputs.of(load_file(file)) for file in golden.files(case, "inputs")]


@contextlib.contextmanager
def begun(case: dict, wanted: Wanted) -> Iterator[Run]:
    """The run before its first step, with the model filled."""
    files = where(case)
    model = open_model(files.base, Asked("gram"), files.config)
    with trimmed(wanted, files.base, files.experts) as experts, opened(files.base, experts, model) as members:
        tasks = start(wanted, members, inputs(case), temperature_of(files.base))
        run = run_of(wanted, files, members, tasks)
        run.blend.fill(0)
        yield run
