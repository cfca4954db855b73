# mypy: ignore-errors
"""How compiled loops read numbers: from raw memory, with what comes next requested beside the work.

Part of what `blocks.machine` compiles. Invariant: every stored type becomes float32 of the same value, and the largest magnitude of all
that was read is known, so that no number that is not finite passes.
"""

import numba as nb
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from merge_service.blocks.loops import BF16, F32, F64

PART, _LINE = 256, 64
"""Numbers that are processed between two requests for what is read next, and bytes of a line of the processor's caches."""
ZERO, INFINITY = np.float32(0), np.float32(np.inf)
_MAGNITUDE, INFINITE = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
NOTHING = (0, 0)
"""Of `load`, where nothing more is read, or it is there already."""
jit = nb.njit(error_model="numpy", boundscheck=False, no_cpython_wrapper=True, no_cfunc_wrapper=True)


@intrinsic
def pointer(typingctx, address):
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@intrinsic
def _prefetch(typingctx, address):
    def generate(context, builder, signature, arguments):
        place, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [place], kind)
        where = builder.inttoptr(arguments[0], place)
        read, second_level, data = (ir.Constant(number, value) for value in (0, 2, 1))
        builder.call(function, [where, read, second_level, data])
        return context.get_dummy_value()

    return types.void(address), generate


@jit
def width_of(kind):
    return 4 if kind == F32 else (8 if kind == F64 else 2)


@jit
def _request(coming, first, stop):
    """Have numbers `first` to `stop` of what is read next brought into the core's second-level cache, beside the work."""
    address, width = coming
    for at in range(first * width, stop * width, _LINE):
        _prefetch(address + at)


@jit
def _copy(address, target, size):
    """Copy `size` words; the largest magnitude among them."""
    source = nb.carray(pointer(address), (size,), np.uint32)
    words = nb.carray(pointer(target), (size,), np.uint32)
    worst = np.uint32(0)
    for i in range(size):
        words[i] = source[i]
        worst = max(worst, np.uint32(source[i] & _MAGNITUDE))
    return worst


@jit
def _subtract(address, base, out):
    """Numbers at `address` less `base`; the largest magnitude among them before."""
    source = nb.carray(pointer(address), (out.size,), np.float32)
    words = nb.carray(pointer(address), (out.size,), np.uint32)
    worst = np.uint32(0)  # numba widens to 64 bits unless the type is given, which takes four times as long
    for i in range(out.size):
        out[i] = source[i] - base[i]
        worst = max(worst, np.uint32(words[i] & _MAGNITUDE))
    return worst


@jit
def load(address, kind, at, size, out, coming):
    """`size` numbers from element `at` on, as float32; the largest magnitude among them, by its bits.

    `coming` are the address of what is read next, and the bytes of a number there. Nothing faults if nothing is there. Without it a core
    waits at the beginning of every page: processors look ahead within a page only.
    """
    if kind == F32:
        worst = np.uint32(0)
        for first in range(0, size, PART):
            stop = min(first + PART, size)
            _request(coming, first, stop)
            part = _copy(address + (at + first) * 4, out.ctypes.data + first * 4, stop - first)
            worst = max(worst, part)
        return worst
    words = nb.carray(pointer(out.ctypes.data), (size,), np.uint32)
    worst = np.uint32(0)
    _request(coming, 0, size)
    if kind == F64:
        doubles = nb.carray(pointer(address + at * 8), (size,), np.float64)
        for i in range(size):
            out[i] = np.float32(doubles[i])
    else:
        halves = nb.carray(pointer(address + at * 2), (size,), np.uint16)
        if kind == BF16:
            for i in range(size):
                words[i] = np.uint32(halves[i]) << np.uint32(16)
        else:
            for i in range(size):
                words[i] = _widened(np.uint32(halves[i]))
    for i in range(size):
        worst = max(worst, np.uint32(words[i] & _MAGNITUDE))
    return worst


@jit
def load_delta(address, kind, at, size, base, low, high, out, coming):
    """As `load`, with `base` subtracted afterwards, and zero where the magnitude is not in `low`..`high`."""
    if kind == F32:
        worst = np.uint32(0)
        for first in range(0, size, PART):
            stop = min(first + PART, size)
            _request(coming, first, stop)
            part = _subtract(address + (at + first) * 4, base[first:stop], out[first:stop])
            worst = max(worst, part)
    else:
        worst = load(address, kind, at, size, out, coming)
        for i in range(size):
            out[i] = out[i] - base[i]
    if low > ZERO or high < INFINITY:
        for i in range(size):
            out[i] = out[i] if (abs(out[i]) >= low) & (abs(out[i]) <= high) else ZERO
    return worst


@jit
def _widened(half):
    """The bits of a float16 as those of the float32 of the same value."""
    sign = (half & np.uint32(0x8000)) << np.uint32(16)
    exponent = (half >> np.uint32(10)) & np.uint32(31)
    fraction = half & np.uint32(0x3FF)
    if exponent == np.uint32(31):
        return sign | np.uint32(0x7F800000) | (fraction << np.uint32(13))
    if exponent != np.uint32(0):
        return sign | ((exponent + np.uint32(112)) << np.uint32(23)) | (fraction << np.uint32(13))
    if fraction == np.uint32(0):
        return sign
    shift = np.uint32(0)
    while fraction < np.uint32(0x400):
        fraction = fraction << np.uint32(1)
        shift = shift + np.uint32(1)
    return (
        sign | ((np.uint32(113) - shift) << np.uint32(23)) | ((fraction & np.uint32(0x3FF)) << np.uint32(13))
    )
