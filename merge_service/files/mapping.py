"""A memory map of a file that keeps no descriptor open.

`mmap.mmap` of Python 3.11 duplicates the descriptor for the lifetime of the map, so a merge of a hundred experts would need more
than a hundred open files. The system call itself needs no descriptor once the map exists.

Invariant: the memory stays mapped as long as an array views it, and is never writable.
"""

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np

_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class _Map:
    """A mapped file with numpy's array interface; an array that views it keeps it mapped."""

    def __init__(self, address: int, size: int) -> None:
        self.address, self.size = address, size
        read_only = True
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (size,),
            "data": (address, read_only),
        }

    def __del__(self) -> None:
        _libc.munmap(self.address, self.size)


def mapped(file: Path) -> np.ndarray:
    """The bytes of a file, uint8 [size], read-only. Raises OSError naming the file."""
    with file.open("rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        if size == 0:
            return np.empty(0, np.uint8)
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, handle.fileno(), 0)
    if address in (None, _FAILED):
        number = ctypes.get_errno()
        raise OSError(number, f"cannot be mapped: {os.strerror(number)}", str(file))
    return np.asarray(_Map(address, size))
