# mypy: ignore-errors
"""Loops that count magnitudes, for exact ranks: how many lie below a window, and which lie inside it.

The other half of `kernels`, under the same rules. Invariant: counts are integers, so they depend on no order of blocks.
"""

import numba as nb
import numpy as np

from merge_service.blocks.loops import F32, JOB, LANES, TERM
from merge_service.blocks.reading import INFINITE, INFINITY, NOTHING, jit, load, pointer

_COLUMNS = 256
_ROWS = LANES // _COLUMNS


@jit
def _magnitudes(job, terms, begin, size, base, x, bits):
    moved = nb.carray(pointer(bits.ctypes.data), (size,), np.float32)
    origin, kind = job[0].base, job[0].kind
    address, other = terms[0].address, terms[0].kind
    if kind == F32 and other == F32:
        first = nb.carray(pointer(origin + begin * 4), (size,), np.float32)
        second = nb.carray(pointer(address + begin * 4), (size,), np.float32)
        bad = np.int32(0)
        for i in range(size):
            moved[i] = abs(second[i] - first[i])
            bad = np.int32(bad | np.int32(not moved[i] < INFINITY))
        if not bad:  # a finite difference has finite parts
            return
    if load(origin, kind, begin, size, base, NOTHING) >= INFINITE:
        job[0].bad = 1
    if load(address, other, begin, size, x, NOTHING) >= INFINITE:
        terms[0].bad = 1
    for i in range(size):
        moved[i] = abs(x[i] - base[i])


def sift_span(job, terms, count, lows, highs, rows, windows, below, chosen, owners, room, answer, work):
    """As of `loops.sift_span`; answer: int64 [2], where to begin, then where it stopped and how many were chosen; `work`: 13 * LANES
    bytes."""
    job, terms = nb.carray(pointer(job), (1,), JOB), nb.carray(pointer(terms), (count,), TERM)
    lows = nb.carray(pointer(lows), (windows,), np.uint32)
    highs = nb.carray(pointer(highs), (windows,), np.uint32)
    rows = nb.carray(pointer(rows), (windows,), np.int64)
    below = nb.carray(pointer(below), (windows,), np.int64)
    chosen = nb.carray(pointer(chosen), (room,), np.uint32)
    owners = nb.carray(pointer(owners), (room,), np.uint16)
    answer = nb.carray(pointer(answer), (2,), np.int64)
    base = nb.carray(pointer(work), (LANES,), np.float32)
    x = nb.carray(pointer(work + 4 * LANES), (LANES,), np.float32)
    bits = nb.carray(pointer(work + 8 * LANES), (LANES,), np.uint32)
    flags = nb.carray(pointer(work + 12 * LANES), (_COLUMNS,), np.int32)
    columns = nb.carray(pointer(work + 12 * LANES + 4 * _COLUMNS), (_COLUMNS,), np.int32)
    found, at = 0, answer[0]
    while at < job[0].size and found + LANES * windows <= room:
        size = min(LANES, job[0].size - at)
        for k in range(windows):
            if k == 0 or rows[k] != rows[k - 1]:
                one = terms[rows[k] : rows[k] + 1]
                _magnitudes(job, one, at, size, base, x, bits[:size])
            if size == LANES:
                less, more = _sift_block(
                    bits, np.int32(lows[k]), np.int32(highs[k]), chosen[found:], flags, columns
                )
            else:
                less, more = _sift(bits[:size], lows[k], highs[k], chosen[found:])
            below[k] += less
            for i in range(found, found + more):
                owners[i] = k
            found += more
        at += size
    answer[0], answer[1] = at, found


@jit
def _sift_block(bits, low, high, chosen, flags, columns):
    """As `_sift`, of LANES magnitudes, which have no sign: twice as fast.

    A block is looked at as `_ROWS` rows. Which columns hold an element of the window is found for whole rows at once, and only these columns
    are looked at closely; no branch depends on where elements are, which is as good as random.
    """
    words = nb.carray(pointer(bits.ctypes.data), (LANES,), np.int32)
    less, width = np.int32(0), np.uint32(high - low)
    for i in range(LANES):
        less = np.int32(less + np.int32(words[i] < low))
    for j in range(_COLUMNS):
        flags[j] = np.int32(0)
    for k in range(_ROWS):
        row = nb.carray(pointer(bits.ctypes.data + 4 * k * _COLUMNS), (_COLUMNS,), np.int32)
        for j in range(_COLUMNS):
            flags[j] = np.int32(flags[j] | np.int32(np.uint32(row[j] - low) <= width))
    flagged, found = 0, 0
    for j in range(_COLUMNS):
        columns[flagged] = j
        flagged += np.int64(flags[j])
    for m in range(flagged):
        for k in range(_ROWS):
            word = words[k * _COLUMNS + columns[m]]
            chosen[found] = word
            found += np.int64(np.uint32(word - low) <= width)
    return np.int64(less), found


def sift32(bits, size, low, high, chosen, answer):
    """As of `loops.sift`; answer: int64 [2]."""
    bits = nb.carray(pointer(bits), (size,), np.uint32)
    chosen = nb.carray(pointer(chosen), (size,), np.uint32)
    answer = nb.carray(pointer(answer), (2,), np.int64)
    answer[0], answer[1] = _sift(bits, np.uint32(low), np.uint32(high), chosen)


def sift64(bits, size, low, high, chosen, answer):
    """The same for 64 bits."""
    bits = nb.carray(pointer(bits), (size,), np.uint64)
    chosen = nb.carray(pointer(chosen), (size,), np.uint64)
    answer = nb.carray(pointer(answer), (2,), np.int64)
    answer[0], answer[1] = _sift(bits, np.uint64(low), np.uint64(high), chosen)


@jit
def _sift(bits, low, high, chosen):
    """How many of `bits` are below `low`, and how many in low..high, which are left in `chosen`."""
    below, found = 0, 0
    for begin in range(0, bits.size, LANES):
        part = bits[begin : begin + LANES]
        less = np.uint32(0)
        for i in range(part.size):
            less = np.uint32(less + np.uint32(part[i] < low))
        below += less
        for at in range(0, part.size, 32):
            few = part[at : at + 32]
            inside = np.uint32(0)
            for i in range(few.size):
                inside = np.uint32(inside | np.uint32((few[i] >= low) & (few[i] <= high)))
            if inside:
                for i in range(few.size):  # no branch: which ones are inside is as good as random
                    chosen[found] = few[i]
                    found += np.int64((few[i] >= low) & (few[i] <= high))
    return below, found


def tally(chosen, owners, size, lows, shifts, starts, windows, bins, room):
    """As of `loops.tally`."""
    chosen = nb.carray(pointer(chosen), (size,), np.uint32)
    owners = nb.carray(pointer(owners), (size,), np.uint16)
    lows = nb.carray(pointer(lows), (windows,), np.uint32)
    shifts = nb.carray(pointer(shifts), (windows,), np.uint32)
    starts = nb.carray(pointer(starts), (windows,), np.int64)
    bins = nb.carray(pointer(bins), (room,), np.int64)
    for i in range(size):
        k = owners[i]
        bins[starts[k] + np.int64((chosen[i] - lows[k]) >> shifts[k])] += 1


LOOPS = {loop.__name__: loop for loop in (sift_span, sift32, sift64, tally)}
"""What is compiled, as of `kernels.LOOPS`."""
