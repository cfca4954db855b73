"""Packed weights: byte-exact unpacking of any content, and refusal of altered files."""

import json
from pathlib import Path

import numpy as np
import pytest

from merge_service.checkpoints.dtypes import DTYPES
from merge_service.checkpoints.packed import MAGIC, PIECE, pack, unpack
from merge_service.errors import CorruptCheckpoint
from tests.merge_service.toys import save


def file_of(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> Path:
    """A safetensors file from raw bytes: any dtype, any bits, tensors in the given order."""
    header, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps({"__metadata__": {"who": "a test"}, **header}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def there_and_back(weights: Path, base: Path) -> int:
    packed, again = weights.with_name("packed"), weights.with_name("again")
    pack(weights, base, packed)
    unpack(packed, base, again)
    assert again.read_bytes() == weights.read_bytes()
    assert sorted(path.name for path in weights.parent.iterdir()) == sorted(
        {"packed", "again", weights.name, base.name}
    )
    return packed.stat().st_size


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_any_bits_of_any_dtype_come_back(dtype: str, tmp_path: Path) -> None:
    width, rng = DTYPES[dtype].itemsize, np.random.default_rng(1)
    shapes = {"a": (3, 5), "none": (0, 4), "one": ()}
    one, two = (
        {
            name: (dtype, shape, rng.bytes(width * int(np.prod(shape))))
            for name, shape in shapes.items()
        }
        for _ in range(2)
    )  # fmt: skip
    there_and_back(file_of(tmp_path / "w.safetensors", one), file_of(tmp_path / "b.safetensors", two))


def test_nan_payloads_negative_zero_and_denormals_come_back(tmp_path: Path) -> None:
    bits = np.array([0x7FC00001, 0xFFC12345, 0x80000000, 1, 0x7F800000, 0x007FFFFF], "<u4").tobytes()
    weights = file_of(tmp_path / "w.safetensors", {"a": ("F32", (6,), bits)})
    there_and_back(weights, file_of(tmp_path / "b.safetensors", {"a": ("F32", (6,), bytes(24))}))


def test_tensor_that_the_base_lacks_or_has_otherwise_comes_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    weights = {name: ("BF16", (4, 2), rng.bytes(16)) for name in ("new", "reshaped", "same")} | {
        "odd": ("U8", (3,), b"abc")
    }
    base = {
        "same": weights["same"],
        "reshaped": ("BF16", (2, 4), rng.bytes(16)),
        "left": ("F32", (1,), bytes(4)),
    }
    there_and_back(file_of(tmp_path / "w.safetensors", weights), file_of(tmp_path / "b.safetensors", base))


def test_expert_near_its_base_is_smaller_and_longer_than_a_piece(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    base = rng.standard_normal(PIECE // 2).astype(np.float32)
    save(tmp_path / "b.safetensors", {"w": base})
    save(tmp_path / "w.safetensors", {"w": base + 1e-3 * rng.standard_normal(base.size).astype(np.float32)})
    size = there_and_back(tmp_path / "w.safetensors", tmp_path / "b.safetensors")
    assert size < 0.75 * (tmp_path / "w.safetensors").stat().st_size


def test_altered_or_cut_files_and_another_base_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    names = ("w", "b", "other")
    weights, base, other = (
        file_of(tmp_path / f"{name}.safetensors", {"a": ("F32", (500,), rng.bytes(2000))}) for name in names
    )
    packed, out = tmp_path / "packed", tmp_path / "out"
    pack(weights, base, packed)
    whole = packed.read_bytes()
    with pytest.raises(CorruptCheckpoint, match="sha256"):
        unpack(packed, other, out)
    for place in (0, len(MAGIC) + 2, len(MAGIC) + 30, len(whole) - 5):
        packed.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        with pytest.raises(CorruptCheckpoint):
            unpack(packed, base, out)
    for size in (0, 5, 30, len(whole) - 1):
        packed.write_bytes(whole[:size])
        with pytest.raises(CorruptCheckpoint):
            unpack(packed, base, out)
