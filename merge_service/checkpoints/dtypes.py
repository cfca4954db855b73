"""Stored number formats, and their conversion from and to the types of arithmetic.

numpy has no bfloat16, so its bits are converted: reading shifts the 16 bits into the upper half of a float32, writing rounds to
nearest, ties to even. The two 8-bit floats have 256 values each, which are looked up. Sources: FP8 Formats for Deep Learning,
arXiv 2209.05433; E4M3 without infinity, as torch.float8_e4m3fn.

Invariant: reading is exact for every format, and `encode` rounds once.
"""

from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class DType:
    """A safetensors dtype: its numpy storage type, and the type of sums (None: never used in arithmetic)."""

    name: str
    storage: np.dtype
    compute: np.dtype | None

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return self.storage.itemsize

    @property
    def is_float(self) -> bool:
        """Whether arithmetic is done on it."""
        return self.compute is not None


_F32, _F64 = np.dtype("<f4"), np.dtype("<f8")
DTYPES: dict[str, DType] = {
    name: DType(name, np.dtype(storage), compute)
    for name, storage, compute in (
        ("F64", "<f8", _F64),
        ("F32", "<f4", _F32),
        ("F16", "<f2", _F32),
        ("BF16", "<u2", _F32),
        ("F8_E4M3", "u1", _F32),
        ("F8_E5M2", "u1", _F32),
        ("I64", "<i8", None),
        ("U64", "<u8", None),
        ("I32", "<i4", None),
        ("U32", "<u4", None),
        ("I16", "<i2", None),
        ("U16", "<u2", None),
        ("I8", "i1", None),
        ("U8", "u1", None),
        ("BOOL", "?", None),
    )
}


QUANTISED = {
    "F4": "4-bit floats of the MX formats",
    "F6_E2M3": "6-bit floats of the MX formats",
    "F6_E3M2": "6-bit floats of the MX formats",
    "F8_E8M0": "scales of the MX formats",
    "C64": "complex numbers",
}
"""Dtypes of safetensors that a merge cannot sum: parts of packed numbers, scales, and complex numbers."""


def _eight_bits(exponent_bits: int, *, infinite: bool) -> Array:
    """All 256 values of an 8-bit float, by their bits."""
    bits = np.arange(256)
    fraction_bits = 7 - exponent_bits
    bias = 2 ** (exponent_bits - 1) - 1
    exponent, fraction = bits >> fraction_bits & (2**exponent_bits - 1), bits & (2**fraction_bits - 1)
    leading = np.minimum(exponent, 1)
    values = (leading + fraction / 2**fraction_bits) * 2.0 ** (exponent - bias + 1 - leading)
    top = exponent == 2**exponent_bits - 1
    values[top & (fraction == 2**fraction_bits - 1)] = np.nan
    if infinite:
        values[top] = np.where(fraction[top] == 0, np.inf, np.nan)
    return np.where(bits < 128, values, -values).astype(_F32)


EIGHT_BITS = {"F8_E4M3": _eight_bits(4, infinite=False), "F8_E5M2": _eight_bits(5, infinite=True)}
"""The values of 8-bit floats by their bits."""


def decode(raw: Array, dtype: DType) -> Array:
    """Stored values as numbers, exactly: float32 or float64 for floats (a view where the bits allow), ints as they are."""
    if dtype.name == "BF16":
        wide = raw.astype(np.uint32)
        wide <<= 16
        return wide.view(_F32)
    if dtype.name == "F16":
        return raw.astype(_F32)
    if dtype.name in EIGHT_BITS:
        return EIGHT_BITS[dtype.name][raw]
    return raw


def encode(values: Array, dtype: DType) -> Array:
    """Numbers as stored values, rounded once (nearest, ties to even); values out of range become infinite."""
    if dtype.name == "BF16":
        return _to_bf16(np.ascontiguousarray(values, dtype=_F32))
    if dtype.name in EIGHT_BITS:
        return _to_eight_bits(values.astype(_F32, copy=False), EIGHT_BITS[dtype.name])
    if dtype.is_float:
        return values.astype(dtype.storage, copy=False)
    if values.dtype != dtype.storage:
        raise TypeError(f"{values.dtype} values for a {dtype.name} tensor; integers are only ever copied")
    return values


def _to_bf16(values: Array) -> Array:
    bits = values.view(np.uint32)
    odd = (bits >> 16) & 1
    rounded = ((bits + (odd + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    lost = np.isnan(values)
    if lost.any():
        rounded[lost] = 0x7FC0
    return rounded


def _to_eight_bits(values: Array, table: Array) -> Array:
    """Bits of the nearest values, ties to even bits; what lies beyond the last finite one is NaN (or infinite)."""
    finite = table[:128][np.isfinite(table[:128])].astype(np.float64)
    step = finite[-1] - finite[-2]
    steps = np.append(finite, finite[-1] + step)  # where rounding would go next decides what is too large
    middles = (steps[:-1] + steps[1:]) / 2
    sizes = np.abs(values).astype(np.float64)
    bits = np.searchsorted(middles, sizes, side="left")
    tie = sizes == middles[np.minimum(bits, middles.size - 1)]
    bits += tie & (bits % 2 == 1)
    bits[np.isnan(sizes)] = 127
    return (bits.astype(np.uint8) | (np.signbit(values).astype(np.uint8) << 7)).astype(np.uint8)


def all_finite(values: Array) -> bool:
    """Whether no value is NaN or infinite; usually one read of the data.

    A finite sum proves it. A sum that is not finite may have overflowed, so only then is every value checked.
    """
    with np.errstate(all="ignore"):
        return bool(np.isfinite(np.add.reduce(values))) or bool(np.isfinite(values).all())


def stored_finite(stored: Array, dtype: DType) -> bool:
    """Whether no *stored* value is NaN or infinite (rounding to a narrow format may have overflowed)."""
    if dtype.name == "BF16":
        return not bool(((stored & 0x7F80) == 0x7F80).any())
    return all_finite(stored if dtype.itemsize > 2 else decode(stored, dtype))
