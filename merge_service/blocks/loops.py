"""The compiled loops as functions of arrays, and the tables that they read.

`kernels` and `counting` hold them as they are written, `machine` has them compiled. Nothing here imports a compiler: loops that were
compiled once start in milliseconds.

Invariant: arrays are handed over where they lie, and every one of them is contiguous.
"""

from dataclasses import dataclass

import numpy as np

from merge_service.blocks.machine import loop

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
        ("majority", "i4"), ("whole", "i4"), ("finish", "i4"), ("factor", "f4"), ("sums", "i4"), ("bad", "i4"),
        ("balance", "i8"), ("contested", "i4"),
    ],
    align=True,
)  # fmt: skip
"""A span. `delta`: work on differences from `base`; `whole`: the state is kept for the whole span; `finish`: write the
result; `sums`: how many of the moments to add up (`moments.Moments`), none, 1 or all 3. `balance` and `contested` are answers, see `place.Election`."""


def blend(
    job: np.ndarray,
    terms: np.ndarray,
    state: np.ndarray,
    votes: np.ndarray,
    out: np.ndarray,
    moments: np.ndarray,
) -> None:
    """Work through one span: `job` holds one JOB, `terms` [experts] its experts in order.

    state: float32 [arrays, size or LANES], votes: uint32 [same or 0]; as they were left when `whole`, else scratch. out: float32
    [size], moments: float64 [grains, 3], zero before. Answers are left in `job` and `terms`.
    """
    work = np.empty(3 * LANES)
    loop("blend")(
        _at(job), _at(terms), terms.size, _at(state), *state.shape, _at(votes), votes.size,
        _at(out), out.size, _at(moments), len(moments), _at(work),
    )  # fmt: skip


def products(job: np.ndarray, terms: np.ndarray, partial: np.ndarray) -> None:
    """Inner products of all pairs of experts (of task vectors where `delta`) over a span, in float64.

    partial: float64 [grains, experts, experts], zero before; its upper triangle is filled, per grain.
    """
    work = np.empty((2 + terms.size) * LANES)
    loop("products")(_at(job), _at(terms), terms.size, _at(partial), len(partial), _at(work))


def sift_span(
    job: np.ndarray, terms: np.ndarray, windows: "Windows", begin: int, chosen: np.ndarray, owners: np.ndarray
) -> tuple[int, int, np.ndarray]:
    """`sift` of the magnitudes of many experts against windows, without storing them, from element `begin` of a span on.

    chosen: uint32 [room], owners: uint16 [room], which window each is from. Stops when `room` may not do for another block: where
    it stopped, how many were chosen, and how many lie below each window, int64 [windows].
    """
    below, answer, work = np.zeros(windows.rows.size, np.int64), np.array([begin, 0]), np.empty(2 * LANES)
    loop("sift_span")(
        _at(job), _at(terms), terms.size, _at(windows.lows), _at(windows.highs), _at(windows.rows), windows.rows.size,
        _at(below), _at(chosen), _at(owners), chosen.size, _at(answer), _at(work),
    )  # fmt: skip
    return int(answer[0]), int(answer[1]), below


def sift(bits: np.ndarray, low: int, high: int, chosen: np.ndarray) -> tuple[int, int]:
    """How many of `bits` are below `low`, and how many in low..high, which are left in `chosen`.

    bits, chosen: uint32 or uint64 [size]; low and high below 2^32 or 2^64.
    """
    answer = np.empty(2, np.int64)
    loop(f"sift{8 * bits.itemsize}")(_at(bits), bits.size, low, high, _at(chosen), _at(answer))
    return int(answer[0]), int(answer[1])


def tally(chosen: np.ndarray, owners: np.ndarray, windows: "Windows", bins: np.ndarray) -> None:
    """Count every number chosen in the bins of its window, which begin at `windows.starts` of `bins` (int64)."""
    loop("tally")(
        _at(chosen), _at(owners), chosen.size, _at(windows.lows), _at(windows.shifts), _at(windows.starts),
        windows.rows.size, _at(bins), bins.size,
    )  # fmt: skip


@dataclass(frozen=True)
class Windows:
    """Windows for `sift_span`: their ends and bin widths, uint32, the row of the expert in `terms` that each is about (ascending) and
    where its bins begin, int64."""

    lows: np.ndarray
    highs: np.ndarray
    shifts: np.ndarray
    rows: np.ndarray
    starts: np.ndarray


def _at(array: np.ndarray) -> int:
    assert array.flags.c_contiguous
    return int(array.ctypes.data)
