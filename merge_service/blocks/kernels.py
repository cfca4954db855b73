# mypy: ignore-errors
"""The rules of `rules.py` once more, as fused loops over raw memory: what most merges spend their time in.

A span is worked through in blocks that stay in a core's first cache: every expert's part of a block is read, thinned out and
added to the state, then the block is finished and written. Nothing here decides anything; `engine.fused` fills the tables.

Invariant: bit for bit what the array definitions in `rules.py` give (a test holds them against each other), and the same
for any span. Compiled at first use and cached on disk; see docs/performance.md for what that costs.
"""

import numba as nb
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 2048
"""Elements per block."""
GRAIN = 1 << 16
"""Elements per partial sum of squares; the same as `spans.GRAIN`."""

MEAN, SUM, LARGEST, MEAN_OF_SIGN, SUM_OF_SIGN, MAX_OF_SIGN = range(6)
"""How experts come together (`Job.rule`)."""
F32, F16, BF16, F64 = range(4)
"""How numbers are stored (`Term.kind`)."""

TERM = np.dtype(
    [
        ("address", "u8"), ("key", "u8"), ("kind", "i4"), ("first", "i4"), ("turns", "i4"), ("share", "f4"),
        ("kept", "f4"), ("turned", "f4"), ("low", "f4"), ("high", "f4"), ("gain", "f4"), ("limit", "u4"), ("bad", "i4"),
    ],
    align=True,
)  # fmt: skip
"""One expert's part in a span. `first`: it starts the state; `turns`: factors `kept` and `turned` replace `share`;
`low`..`high`: magnitudes kept; `key`, `limit`, `gain`: its random mask and the rescaling; `bad` is set where it is not finite."""

JOB = np.dtype(
    [
        ("base", "u8"), ("kind", "i4"), ("rule", "i4"), ("start", "i8"), ("size", "i8"), ("delta", "i4"),
        ("majority", "i4"), ("whole", "i4"), ("finish", "i4"), ("factor", "f4"), ("squares", "i4"), ("bad", "i4"),
        ("balance", "i8"), ("contested", "i4"),
    ],
    align=True,
)  # fmt: skip
"""A span. `delta`: work on differences from `base`; `whole`: the state is kept for the whole span; `finish`: write the
result; `squares`: add up (result - base)^2 per grain. `balance` and `contested` are answers, see `place.Election`."""

_ZERO, _ONE = np.float32(0), np.float32(1)
_INFINITY = np.float32(np.inf)
_MAGNITUDE, _INFINITE = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
_jit = nb.njit(cache=True, nogil=True, error_model="numpy", boundscheck=False)


@intrinsic
def _pointer(typingctx, address):
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@_jit
def _load(address, kind, at, size, out):
    """`size` numbers from element `at` on, as float32; the largest magnitude among them, by its bits."""
    words = out.view(np.uint32)
    worst = np.uint32(0)
    if kind == F32:
        source = nb.carray(_pointer(address + at * 4), (size,), np.uint32)
        for i in range(size):
            words[i] = source[i]
            worst = max(worst, np.uint32(source[i] & _MAGNITUDE))
        return worst
    if kind == F64:
        doubles = nb.carray(_pointer(address + at * 8), (size,), np.float64)
        for i in range(size):
            out[i] = np.float32(doubles[i])
    else:
        halves = nb.carray(_pointer(address + at * 2), (size,), np.uint16)
        if kind == BF16:
            for i in range(size):
                words[i] = np.uint32(halves[i]) << np.uint32(16)
        else:
            for i in range(size):
                words[i] = _widened(np.uint32(halves[i]))
    for i in range(size):
        worst = max(worst, np.uint32(words[i] & _MAGNITUDE))
    return worst


@_jit
def _load_delta(address, kind, at, size, base, low, high, out):
    """As `_load`, with `base` subtracted afterwards, and zero where the magnitude is not in `low`..`high`."""
    if kind == F32:
        source = nb.carray(_pointer(address + at * 4), (size,), np.float32)
        words = nb.carray(_pointer(address + at * 4), (size,), np.uint32)
        worst = np.uint32(0)
        for i in range(
            size
        ):  # numba widens to 64 bits where it is not told to stay, which costs four times the time
            out[i] = source[i] - base[i]
            worst = max(worst, np.uint32(words[i] & _MAGNITUDE))
    else:
        worst = _load(address, kind, at, size, out)
        for i in range(size):
            out[i] = out[i] - base[i]
    if low > _ZERO or high < _INFINITY:
        for i in range(size):
            out[i] = out[i] if (abs(out[i]) >= low) & (abs(out[i]) <= high) else _ZERO
    return worst


@_jit
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


@_jit
def _hash(counter, key):
    """SplitMix64 at a counter, see `masks.py`."""
    z = key + (counter + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@_jit
def _drop(x, key, start, limit, gain, hashes, size):
    """DARE: keep what hashes below `limit`, times `gain`."""
    first = start >> 1
    pairs = ((start + size + 1) >> 1) - first
    for i in range(pairs):
        hashes[i] = _hash(np.uint64(first + i), key)
    halves = hashes.view(np.uint32)
    odd = start & 1
    for i in range(size):
        x[i] = x[i] * gain if halves[i + odd] < limit else _ZERO


@_jit
def _add_mean(mean, x, term, size):
    if term.turns:
        kept, turned = term.kept, term.turned
        for i in range(size):
            mean[i] = mean[i] * kept + x[i] * turned
    elif term.first or term.share == _ONE:
        for i in range(size):
            mean[i] = x[i]
    elif term.share != _ZERO:
        share = term.share
        for i in range(size):
            mean[i] = mean[i] - (mean[i] - x[i]) * share


@_jit
def _add_sum(total, x, size):
    for i in range(size):
        total[i] = total[i] + x[i]


@_jit
def _add_largest(held, x, size):
    for i in range(size):
        held[i] = x[i] if abs(x[i]) >= abs(held[i]) else held[i]


@_jit
def _add_signs(plus, minus, x, size):
    for i in range(size):
        plus[i] = plus[i] + (x[i] if x[i] > _ZERO else _ZERO)
        minus[i] = minus[i] + (x[i] if x[i] < _ZERO else _ZERO)


@_jit
def _add_votes(plus, minus, votes, x, size):
    for i in range(size):
        value = x[i]
        up, down = value > _ZERO, value < _ZERO
        plus[i] = plus[i] + (value if up else _ZERO)
        minus[i] = minus[i] + (value if down else _ZERO)
        votes[i] = votes[i] + (np.uint32(up) | (np.uint32(down) << np.uint32(16)))


@_jit
def _extremes(top, bottom, x, size):
    for i in range(size):
        top[i] = x[i] if x[i] > top[i] else top[i]
    for i in range(size):
        bottom[i] = x[i] if x[i] < bottom[i] else bottom[i]


@_jit
def _elect(plus, minus, high, low, majority, out, size):
    """What agrees with the elected sign; the balance of the votes, and whether one cancelled exactly."""
    balance = 0
    contested = 0
    for i in range(size):
        total = plus[i] + minus[i]
        tied = (total == _ZERO) & (plus[i] > _ZERO)
        up = (total > _ZERO) | (tied & (majority > 0))
        down = (total < _ZERO) | (tied & (majority < 0))
        out[i] = high[i] if up else (low[i] if down else _ZERO)
        balance += np.int32(total > _ZERO) - np.int32(total < _ZERO)
        contested += np.int32(tied)
    return balance, contested


@_jit
def _per_vote(out, votes, size):
    """What was elected, divided by the number of experts that make it up."""
    for i in range(size):
        count = votes[i] & np.uint32(0xFFFF) if out[i] > _ZERO else votes[i] >> np.uint32(16)
        out[i] = out[i] / np.float32(max(count, np.uint32(1)))


@_jit
def _onto_base(base, out, factor, size):
    """base + factor * out, as base - (0 - factor * out): see rules on the sign of zero."""
    if factor == _ONE:
        for i in range(size):
            out[i] = base[i] - (_ZERO - out[i])
    else:
        for i in range(size):
            out[i] = base[i] - (_ZERO - out[i] * factor)


@_jit
def _squares(out, base, sums, size):
    """Sum of (out - base)^2 in float64; `sums` is scratch of LANES numbers."""
    for i in range(size):
        moved = np.float64(out[i] - base[i])
        sums[i] = moved * moved
    return _tree(sums, size)


@_jit
def _tree(sums, size):
    """The sum of the first `size` of LANES numbers, by a fixed tree over a whole block."""
    sums[size:] = 0.0
    width = LANES // 2
    while width:
        for i in range(width):
            sums[i] += sums[i + width]
        width //= 2
    return sums[0]


@_jit
def products(jobs, terms, partial):
    """Inner products of all pairs of experts (of task vectors where `delta`) over a span, in float64.

    partial: float64 [grains, experts, experts], zero before; its upper triangle is filled, per grain.
    """
    job, count = jobs[0], len(terms)
    base, sums = np.empty(LANES, np.float32), np.empty(LANES, np.float64)
    x = np.empty((count, LANES), np.float32)
    for begin in range(0, job.size, LANES):
        size = min(LANES, job.size - begin)
        if job.delta and _load(job.base, job.kind, begin, size, base) >= _INFINITE:
            jobs[0].bad = 1
        for k in range(count):
            if job.delta:
                worst = _load_delta(
                    terms[k].address, terms[k].kind, begin, size, base, _ZERO, _INFINITY, x[k]
                )
            else:
                worst = _load(terms[k].address, terms[k].kind, begin, size, x[k])
            if worst >= _INFINITE:
                terms[k].bad = 1
        for k in range(count):
            for m in range(k, count):
                one, other = x[k], x[m]
                for i in range(size):
                    sums[i] = np.float64(one[i]) * np.float64(other[i])
                partial[begin // GRAIN, k, m] += _tree(sums, size)


@_jit
def blend(jobs, terms, state, votes, out, squares):
    """Work through one span: `jobs` holds one JOB, `terms` its experts in order.

    state: float32 [arrays, size or LANES], votes: uint32 [same or 0]; as they were left when `whole`, else scratch. out: float32 [size], squares: float64, one per grain. Answers are left in `jobs` and `terms`.
    """
    job = jobs[0]
    base, x = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    hashes, sums = np.empty(LANES // 2 + 1, np.uint64), np.empty(LANES, np.float64)
    rule = job.rule
    elected = rule >= MEAN_OF_SIGN
    counted = rule == MEAN_OF_SIGN
    for begin in range(0, job.size, LANES):
        size = min(LANES, job.size - begin)
        at = begin if job.whole else 0
        held = state[0, at : at + size]
        minus = state[1 if elected else 0, at : at + size]
        top = state[2, at : at + size] if rule == MAX_OF_SIGN else held
        bottom = state[3, at : at + size] if rule == MAX_OF_SIGN else minus
        ballots = votes[at : at + size] if counted else votes[:0]
        if not job.whole:
            for k in range(state.shape[0]):
                state[k, :size] = _ZERO
            ballots[:] = 0
        if job.delta and _load(job.base, job.kind, begin, size, base) >= _INFINITE:
            jobs[0].bad = 1
        for k in range(len(terms)):
            term = terms[k]
            if job.delta:
                worst = _load_delta(term.address, term.kind, begin, size, base, term.low, term.high, x)
                if worst >= _INFINITE:
                    terms[k].bad = 1
                if term.limit:
                    _drop(x, term.key, job.start + begin, term.limit, term.gain, hashes, size)
            elif _load(term.address, term.kind, begin, size, x) >= _INFINITE:
                terms[k].bad = 1
            if rule == MEAN:
                _add_mean(held, x, term, size)
            elif rule == SUM:
                _add_sum(held, x, size)
            elif rule == LARGEST:
                _add_largest(held, x, size)
            elif counted:
                _add_votes(held, minus, ballots, x, size)
            else:
                _add_signs(held, minus, x, size)
                if rule == MAX_OF_SIGN:
                    _extremes(top, bottom, x, size)
        if not job.finish:
            continue
        done = out[begin : begin + size]
        if elected:
            balance, contested = _elect(held, minus, top, bottom, job.majority, done, size)
            if counted:
                _per_vote(done, ballots, size)
            jobs[0].balance += balance
            jobs[0].contested |= contested > 0
        else:
            done[:] = held
        if job.delta:
            _onto_base(base, done, job.factor, size)
        elif job.squares and _load(job.base, job.kind, begin, size, base) >= _INFINITE:
            jobs[0].bad = 1
        if job.squares:
            squares[begin // GRAIN] += _squares(done, base, sums, size)


@_jit
def _magnitudes(job, terms, begin, size, base, x, bits):
    moved = bits.view(np.float32)
    origin, kind = job[0].base, job[0].kind
    address, other = terms[0].address, terms[0].kind
    if kind == F32 and other == F32:
        first = nb.carray(_pointer(origin + begin * 4), (size,), np.float32)
        second = nb.carray(_pointer(address + begin * 4), (size,), np.float32)
        for i in range(size):
            moved[i] = abs(second[i] - first[i])
        if _highest(bits, size) < _INFINITE:  # a finite difference has finite parts
            return
    if _load(origin, kind, begin, size, base) >= _INFINITE:
        job[0].bad = 1
    if _load(address, other, begin, size, x) >= _INFINITE:
        terms[0].bad = 1
    for i in range(size):
        moved[i] = abs(x[i] - base[i])


@_jit
def _highest(bits, size):
    worst = np.uint32(0)
    for i in range(size):
        worst = max(worst, np.uint32(bits[i]))
    return worst


@_jit
def sift_span(job, terms, lows, highs, rows, begin, below, chosen, owners):
    """`sift` of the magnitudes of many experts against windows, without storing them, from element `begin` of a span on.

    lows, highs: uint32 [windows]; rows: int64 [windows], the expert in `terms` that each is about, ascending; below: int64
    [windows], to be added to; chosen: uint32 [room], owners: uint16 [room], which window each is from. Stops when `room`
    may not do for another block; where it stopped, and how many were chosen.
    """
    base, x, bits = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.uint32)
    found, at = 0, begin
    while at < job[0].size and found + LANES * rows.size <= chosen.size:
        size = min(LANES, job[0].size - at)
        for k in range(rows.size):
            if k == 0 or rows[k] != rows[k - 1]:
                one = terms[rows[k] : rows[k] + 1]
                _magnitudes(job, one, at, size, base, x, bits[:size])
            less, more = sift(bits[:size], lows[k], highs[k], chosen[found:])
            below[k] += less
            owners[found : found + more] = k
            found += more
        at += size
    return at, found


@_jit
def sift(bits, low, high, chosen):
    """How many of `bits` are below `low`, and how many in low..high, which are left in `chosen`.

    bits, chosen: uint32 or uint64 [size]; low and high of the same type.
    """
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


@_jit
def tally(chosen, owners, lows, shifts, starts, bins):
    """Count every number chosen in the bins of its window, which begin at `starts` [windows] of `bins`."""
    for i in range(chosen.size):
        k = owners[i]
        bins[starts[k] + np.int64((chosen[i] - lows[k]) >> shifts[k])] += 1
