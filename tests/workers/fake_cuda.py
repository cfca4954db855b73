"""A simulated GPU: its memory is main memory, and its streams execute copies as late as they may.

A copy takes place when something waits for it and not before. So a read without a wait returns old content, and a buffer that is
overwritten too early corrupts the copy. `log` holds the calls in their order. Computation takes place at once, in the order of the calls,
as on one stream of a GPU.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from workers.feed.device import Host


class Call(NamedTuple):
    """`record`, `wait` and `synchronize` of an event, or a `copy` to an address; on the stream `compute` or `copies`."""

    what: str
    stream: str
    of: int
    thread: int


class FakeCuda(Host):
    """Three batches on their way, numbers read `lag` steps late."""

    overlaps = True
    slots = 3
    lag = 4

    def __init__(self) -> None:
        self.log: list[Call] = []
        self.stagings: set[int] = set()
        self._own, self._lock = threading.local(), threading.RLock()
        self._todo: dict[str, list[Callable[[], None]]] = {"compute": [], "copies": []}
        self._kept: list[torch.Tensor] = []  # addresses stay those of one tensor

    def staging(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        made = torch.full(tuple(shape), 77, dtype=dtype)
        self._kept.append(made)
        self.stagings.add(made.untyped_storage().data_ptr())
        return made

    def mirror(self, staging: torch.Tensor) -> torch.Tensor:
        self._kept.append(torch.full_like(staging, 99))
        return self._kept[-1]

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        with self._lock:
            self.note("copy", target.untyped_storage().data_ptr())
            if (
                self.stream == "compute"
            ):  # the source may be computed anew by the next call: its value is that of now
                source = source.clone()
            self._todo[self.stream].append(lambda: target.copy_(source))

    def event(self) -> "FakeEvent":
        return FakeEvent(self)

    @contextmanager
    def beside(self) -> Iterator[None]:
        self._own.stream = "copies"
        try:
            yield
        finally:
            self._own.stream = "compute"

    @property
    def stream(self) -> str:
        return getattr(self._own, "stream", "compute")

    def note(self, what: str, of: int) -> None:
        self.log.append(Call(what, self.stream, of, threading.get_ident()))

    def queued(self, stream: str) -> int:
        return len(self._todo[stream])

    def run(self, stream: str, until: int) -> None:
        """Do what a stream was given, up to a number of calls."""
        for at, work in enumerate(self._todo[stream][:until]):
            self._todo[stream][at] = _nothing
            work()

    def given(self, stream: str, work: Callable[[], None]) -> None:
        self._todo[stream].append(work)


class FakeEvent:
    """Of `FakeCuda`."""

    def __init__(self, device: FakeCuda) -> None:
        self._device, self._place = device, ("compute", 0)

    def record(self) -> None:
        with self._device._lock:
            self._device.note("record", id(self))
            stream = self._device.stream
            self._place = (stream, self._device.queued(stream))

    def wait(self) -> None:
        with self._device._lock:
            self._device.note("wait", id(self))
            if self._device.stream == "compute":
                self._device.run(*self._place)
            else:
                place = self._place
                self._device.given("copies", lambda: self._device.run(*place))

    def synchronize(self) -> None:
        with self._device._lock:
            self._device.note("synchronize", id(self))
            self._device.run(*self._place)


def _nothing() -> None: ...


class Waited(AssertionError):
    """A call that, on a GPU, would wait for it."""


WAITING_CALLS = {"item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__", "__index__", "nonzero", "masked_select"}  # fmt: skip
WAITING_OPERATIONS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive"}  # fmt: skip


@contextmanager
def no_waiting(device: FakeCuda) -> Iterator[None]:
    """Raise Waited where this thread asks for the value of a tensor that is not in a staging buffer, or for a shape that depends on
    values."""

    class Calls(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = getattr(func, "__name__", "")
            if name in WAITING_CALLS and args[0].untyped_storage().data_ptr() not in device.stagings:
                raise Waited(name)
            return func(*args, **(kwargs or {}))

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ in WAITING_OPERATIONS:
                raise Waited(str(func))
            return func(*args, **(kwargs or {}))

    with Calls(), Operations():
        yield
