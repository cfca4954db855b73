"""The tar reader returns every member or raises an error, whatever damage a file has."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workers.data.tarscan import Member, ShardError, members
from workers.data.writer import Sample, write_shard

RELAXED = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def shard(tmp_path: Path) -> tuple[Path, bytes, list[Member]]:
    path = tmp_path / "0.tar"
    write_shard(path, [Sample(np.full((4, 4, 3), number, np.uint8), number) for number in range(6)])
    return path, path.read_bytes(), list(members(path))


def survivors(path: Path, data: bytes) -> list[Member] | None:
    """The members of a damaged file, or None if it was refused."""
    path.write_bytes(data)
    try:
        return list(members(path))
    except ShardError:
        return None


@pytest.mark.fault("F24")
@RELAXED
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_flipped_bit_is_refused_or_leaves_every_member(
    shard: tuple[Path, bytes, list[Member]], place: float, bit: int
) -> None:
    path, data, whole = shard
    damaged = bytearray(data)
    damaged[int(place * len(data))] ^= 1 << bit
    assert survivors(path, bytes(damaged)) in (None, whole)


@pytest.mark.fault("F24")
@RELAXED
@given(share=st.floats(0, 1, exclude_max=True))
def test_cut_file_is_refused_or_has_lost_padding_only(
    shard: tuple[Path, bytes, list[Member]], share: float
) -> None:
    path, data, whole = shard
    assert survivors(path, data[: int(share * len(data))]) in (None, whole)


@pytest.mark.fault("F24")
@RELAXED
@given(start=st.integers(0, 40), count=st.integers(1, 6))
def test_lost_blocks_are_refused_or_were_no_part_of_a_member(
    shard: tuple[Path, bytes, list[Member]], start: int, count: int
) -> None:
    path, data, whole = shard
    found = survivors(path, data[: start * 512] + data[(start + count) * 512 :])
    names = {member.name for member in whole}
    assert found is None or {member.name for member in found} <= names
    if found is not None and len(found) < len(whole):
        lost = [member for member in whole if member.name not in {other.name for other in found}]
        assert all(start * 512 <= member.offset - 512 < (start + count) * 512 for member in lost)


@pytest.mark.fault("F24")
@pytest.mark.parametrize("data", [b"", b"x" * 511, b"\x1f\x8b" + b"\0" * 2000, b"\xff" * 4096])
def test_file_that_is_no_tar_is_refused(tmp_path: Path, data: bytes) -> None:
    assert survivors(tmp_path / "0.tar", data) is None


@pytest.mark.fault("F24")
def test_negative_size_is_refused_and_does_not_loop(shard: tuple[Path, bytes, list[Member]]) -> None:
    path, data, _ = shard
    header = bytearray(data[:512])
    header[124:136] = b"-0000001000\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    assert survivors(path, bytes(header) + data[512:]) is None


def test_name_with_several_dots_is_refused_with_the_rule(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as shard:
        shard.addfile(tarfile.TarInfo("22.05.png"))
    with pytest.raises(ShardError, match=r"begins at the first dot of a file's name: write names without"):
        list(members(path))
