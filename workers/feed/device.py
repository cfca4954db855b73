"""What copying and waiting mean where a model runs: on a CPU, or on a GPU with a second stream for copies.

Everything that overlaps with computing (batches, the numbers of a step, checkpoints) asks for it through `Host`, of which a GPU is
one kind; tests put a pretended GPU in its place. Invariant: nothing here bears on a result, and of all methods only
`Event.synchronize` waits.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import torch

_T = TypeVar("_T")


class Event(Protocol):
    """A point in a stream's work; `torch.cuda.Event` is one. An event that was never recorded counts as reached."""

    def record(self) -> None:
        """The point behind all that the current stream was given so far."""

    def wait(self) -> None:
        """What the current stream is given from now on begins after the event; the calling thread goes on."""

    def synchronize(self) -> None:
        """The calling thread waits for it."""


class Host:
    """A CPU: work is done when the call returns. Buffers and what they are copied to are one and the same memory."""

    place = torch.device("cpu")
    overlaps = False
    """Whether the device computes while threads of this process do other work."""
    slots = 1
    """Batches in memory at a time."""
    lag = 0
    """Steps by which the numbers of a step are read late."""

    def staging(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A buffer in main memory that can be copied to and from the device without waiting."""
        return torch.empty(tuple(shape), dtype=dtype)

    def mirror(self, staging: torch.Tensor) -> torch.Tensor:
        """Memory on the device to copy a buffer to."""
        return staging

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy between a buffer and the device, on the current stream."""
        if target is not source:
            target.copy_(source)

    def helpers(self, threads: int) -> Executor:
        """Threads for work beside computing. On a CPU the caller does it at once, since threads would only take the model's cores."""
        return ThreadPoolExecutor(threads) if self.overlaps else _AtOnce()

    def event(self) -> Event:
        """A new event."""
        return _Reached()

    def beside(self) -> AbstractContextManager[object]:
        """Within it the current stream is that for copies, not that for computing."""
        return nullcontext()


class _AtOnce(Executor):
    def submit(self, work: Callable[..., _T], /, *args: Any, **kwargs: Any) -> Future[_T]:
        done: Future[_T] = Future()
        try:
            done.set_result(work(*args, **kwargs))
        except Exception as error:
            done.set_exception(error)
        return done


class _Reached:
    def record(self) -> None: ...

    def wait(self) -> None: ...

    def synchronize(self) -> None: ...


class Cuda(Host):
    """The process's GPU. Buffers are page-locked."""

    place = torch.device("cuda")
    overlaps = True
    slots = 3
    lag = 16

    def __init__(self) -> None:
        self._copies = torch.cuda.Stream()

    def staging(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def mirror(self, staging: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(staging, device=self.place, pin_memory=False)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def event(self) -> Event:
        return torch.cuda.Event()

    def beside(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._copies)


DEVICES: dict[str, Callable[[], Host]] = {"cpu": Host, "cuda": Cuda}


def device_of(name: str) -> Host:
    """The device that jobs call `cpu` or `cuda`."""
    return DEVICES[name]()
