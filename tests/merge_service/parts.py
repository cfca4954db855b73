"""Workers of a merge in parts, in this process; arguments and results are copied as if sent over a network."""

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from merge_service.engine import Part, PartWorker


@contextmanager
def here(parts: Sequence[Part]) -> Iterator[Callable[..., list[Any]]]:
    """A worker for each part, and how to call all of them."""
    workers = [PartWorker(sent(part)) for part in parts]

    def call(method: str, *arguments: Any) -> list[Any]:
        return [sent(getattr(worker, method)(*sent(arguments))) for worker in workers]

    yield call


def sent(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))
