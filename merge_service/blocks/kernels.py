# mypy: ignore-errors
"""The rules as fused, compiled loops over raw memory; most merges spend most of their time in them.

A span is processed in blocks that fit a core's first-level cache: every expert's part of a block is read, thinned out and added
to the state, then the block is finished and written. `engine.fused` fills the tables that control the loops.

This is what `blocks.machine` compiles; `blocks.loops` is what others call. Loops take no memory and raise nothing, so that their machine
code needs nothing of numba: scratch is handed in, and arrays are filled in loops.

Invariant: bit for bit what the array definitions in `rules.py` give (a test holds them against each other), and the same
for any span.
"""

import numba as nb
import numpy as np

from merge_service.blocks.loops import (
    GRAIN,
    JOB,
    LANES,
    LARGEST,
    MAX_OF_SIGN,
    MEAN,
    MEAN_OF_SIGN,
    SUM,
    TERM,
)
from merge_service.blocks.reading import (
    INFINITE,
    INFINITY,
    NOTHING,
    ZERO,
    jit,
    load,
    load_delta,
    pointer,
    width_of,
)

_ONE = np.float32(1)


@jit
def _hash(counter, key):
    """SplitMix64 at a counter, see `masks.py`."""
    z = key + (counter + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@jit
def _drop(x, key, start, limit, gain, hashes, size):
    """DARE: keep what hashes below `limit`, times `gain`."""
    first = start >> 1
    pairs = ((start + size + 1) >> 1) - first
    for i in range(pairs):
        hashes[i] = _hash(np.uint64(first + i), key)
    halves = nb.carray(pointer(hashes.ctypes.data), (2 * pairs,), np.uint32)
    odd = start & 1
    for i in range(size):
        x[i] = x[i] * gain if halves[i + odd] < limit else ZERO


@jit
def _add_mean(mean, x, term, size):
    if term.turns:
        kept, turned = term.kept, term.turned
        for i in range(size):
            mean[i] = mean[i] * kept + x[i] * turned
    elif term.first or term.share == _ONE:
        for i in range(size):
            mean[i] = x[i]
    elif term.share != ZERO:
        share = term.share
        for i in range(size):
            mean[i] = mean[i] - (mean[i] - x[i]) * share


@jit
def _add_sum(total, x, size):
    for i in range(size):
        total[i] = total[i] + x[i]


@jit
def _add_largest(held, x, size):
    for i in range(size):
        held[i] = x[i] if abs(x[i]) >= abs(held[i]) else held[i]


@jit
def _add_signs(plus, minus, x, size):
    for i in range(size):
        plus[i] = plus[i] + (x[i] if x[i] > ZERO else ZERO)
        minus[i] = minus[i] + (x[i] if x[i] < ZERO else ZERO)


@jit
def _add_votes(plus, minus, votes, x, size):
    for i in range(size):
        value = x[i]
        up, down = value > ZERO, value < ZERO
        plus[i] = plus[i] + (value if up else ZERO)
        minus[i] = minus[i] + (value if down else ZERO)
        votes[i] = votes[i] + (np.uint32(up) | (np.uint32(down) << np.uint32(16)))


@jit
def _extremes(top, bottom, x, size):
    for i in range(size):
        top[i] = x[i] if x[i] > top[i] else top[i]
    for i in range(size):
        bottom[i] = x[i] if x[i] < bottom[i] else bottom[i]


@jit
def _add(rule, term, x, held, minus, top, bottom, ballots, size):
    """Add one expert's numbers to the state of a block."""
    if rule == MEAN:
        _add_mean(held, x, term, size)
    elif rule == SUM:
        _add_sum(held, x, size)
    elif rule == LARGEST:
        _add_largest(held, x, size)
    elif rule == MEAN_OF_SIGN:
        _add_votes(held, minus, ballots, x, size)
    else:
        _add_signs(held, minus, x, size)
        if rule == MAX_OF_SIGN:
            _extremes(top, bottom, x, size)


@jit
def _elect(plus, minus, high, low, majority, out, size):
    """Keep the values that agree with the elected sign; returns the balance of the votes, and whether a vote cancelled exactly."""
    balance = 0
    contested = 0
    for i in range(size):
        total = plus[i] + minus[i]
        tied = (total == ZERO) & (plus[i] > ZERO)
        up = (total > ZERO) | (tied & (majority > 0))
        down = (total < ZERO) | (tied & (majority < 0))
        out[i] = high[i] if up else (low[i] if down else ZERO)
        balance += np.int32(total > ZERO) - np.int32(total < ZERO)
        contested += np.int32(tied)
    return balance, contested


@jit
def _per_vote(out, votes, size):
    """Divide elected values by the number of experts that were summed."""
    for i in range(size):
        count = votes[i] & np.uint32(0xFFFF) if out[i] > ZERO else votes[i] >> np.uint32(16)
        out[i] = out[i] / np.float32(max(count, np.uint32(1)))


@jit
def _onto_base(base, out, factor, size):
    """base + factor * out, as base - (0 - factor * out): see rules on the sign of zero."""
    if factor == _ONE:
        for i in range(size):
            out[i] = base[i] - (ZERO - out[i])
    else:
        for i in range(size):
            out[i] = base[i] - (ZERO - out[i] * factor)


@jit
def _moment(one, other, base, sums, size):
    """Sum of (one - base) * (other - base) in float64; `sums` is scratch of LANES numbers."""
    for i in range(size):
        zero = np.float64(base[i])
        sums[i] = (np.float64(one[i]) - zero) * (np.float64(other[i]) - zero)
    return _tree(sums, size)


@jit
def _add_moments(moments, wanted, newest, begin, done, base, x, sums, size):
    moments[0] += _moment(done, done, base, sums, size)
    if wanted > 1:
        load(newest.address, newest.kind, begin, size, x, NOTHING)
        moments[1] += _moment(x, x, base, sums, size)
        moments[2] += _moment(done, x, base, sums, size)


@jit
def _after(job, terms, k, begin):
    """What is read after expert k of a block, as of `load`."""
    if k + 1 < len(terms):
        term = terms[k + 1]
        return np.int64(term.address) + begin * width_of(term.kind), width_of(term.kind)
    if job.delta or job.sums:
        following = begin + LANES if job.delta else begin
        return np.int64(job.base) + following * width_of(job.kind), width_of(job.kind)
    term = terms[0]
    return np.int64(term.address) + (begin + LANES) * width_of(term.kind), width_of(term.kind)


@jit
def _clear(state, rows, ballots, size):
    for k in range(rows):
        for i in range(size):
            state[k, i] = ZERO
    for i in range(ballots.size):
        ballots[i] = np.uint32(0)


@jit
def _tree(sums, size):
    """The sum of the first `size` of LANES numbers, by a fixed tree over a whole block."""
    for i in range(size, LANES):
        sums[i] = 0.0
    width = LANES // 2
    while width:
        for i in range(width):
            sums[i] += sums[i + width]
        width //= 2
    return sums[0]


def products(jobs, terms, count, partial, grains, work):
    """As of `loops.products`; `work`: (8 + 4 + 4 * count) * LANES bytes."""
    jobs, terms = nb.carray(pointer(jobs), (1,), JOB), nb.carray(pointer(terms), (count,), TERM)
    partial = nb.carray(pointer(partial), (grains, count, count), np.float64)
    sums = nb.carray(pointer(work), (LANES,), np.float64)
    base = nb.carray(pointer(work + 8 * LANES), (LANES,), np.float32)
    x = nb.carray(pointer(work + 12 * LANES), (count, LANES), np.float32)
    job = jobs[0]
    for begin in range(0, job.size, LANES):
        size = min(LANES, job.size - begin)
        coming = _after(job, terms, -1, begin)
        if job.delta and load(job.base, job.kind, begin, size, base, coming) >= INFINITE:
            jobs[0].bad = 1
        for k in range(count):
            address, kind, coming = terms[k].address, terms[k].kind, _after(job, terms, k, begin)
            if job.delta:
                worst = load_delta(address, kind, begin, size, base, ZERO, INFINITY, x[k], coming)
            else:
                worst = load(address, kind, begin, size, x[k], coming)
            if worst >= INFINITE:
                terms[k].bad = 1
        for k in range(count):
            for m in range(k, count):
                one, other = x[k], x[m]
                for i in range(size):
                    sums[i] = np.float64(one[i]) * np.float64(other[i])
                partial[begin // GRAIN, k, m] += _tree(sums, size)


def blend(jobs, terms, count, state, rows, width, votes, voted, out, room, moments, grains, work):
    """As of `loops.blend`; `work`: 21 * LANES bytes."""
    jobs, terms = nb.carray(pointer(jobs), (1,), JOB), nb.carray(pointer(terms), (count,), TERM)
    state = nb.carray(pointer(state), (rows, width), np.float32)
    votes = nb.carray(pointer(votes), (voted,), np.uint32)
    out = nb.carray(pointer(out), (room,), np.float32)
    moments = nb.carray(pointer(moments), (grains, 3), np.float64)
    sums = nb.carray(pointer(work), (LANES,), np.float64)
    base = nb.carray(pointer(work + 8 * LANES), (LANES,), np.float32)
    x = nb.carray(pointer(work + 12 * LANES), (LANES,), np.float32)
    hashes = nb.carray(pointer(work + 16 * LANES), (LANES // 2 + 1,), np.uint64)
    job = jobs[0]
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
            _clear(state, rows, ballots, size)
        coming = _after(job, terms, -1, begin)
        if job.delta and load(job.base, job.kind, begin, size, base, coming) >= INFINITE:
            jobs[0].bad = 1
        for k in range(len(terms)):
            term, coming = terms[k], _after(job, terms, k, begin)
            if job.delta:
                worst = load_delta(term.address, term.kind, begin, size, base, term.low, term.high, x, coming)
                if worst >= INFINITE:
                    terms[k].bad = 1
                if term.limit:
                    _drop(x, term.key, job.start + begin, term.limit, term.gain, hashes, size)
            elif load(term.address, term.kind, begin, size, x, coming) >= INFINITE:
                terms[k].bad = 1
            _add(rule, term, x, held, minus, top, bottom, ballots, size)
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
            for i in range(size):
                done[i] = held[i]
        if job.delta:
            _onto_base(base, done, job.factor, size)
        elif job.sums:
            coming = _after(job, terms, -1, begin + LANES)
            if load(job.base, job.kind, begin, size, base, coming) >= INFINITE:
                jobs[0].bad = 1
        if job.sums:
            _add_moments(
                moments[begin // GRAIN], job.sums, terms[count - 1], begin, done, base, x, sums, size
            )


LOOPS = {loop.__name__: loop for loop in (products, blend)}
"""What is compiled: functions of addresses and sizes, int64 all of them."""
