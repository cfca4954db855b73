"""The digest of a file that is still being written is that of its bytes, for any order of writing."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from merge_service.files import digest
from merge_service.files.digest import Checksum, Digest, checksum_of

PARTS = 64


@pytest.fixture
def body() -> bytes:
    return np.random.default_rng(0).bytes(PARTS * 1000)


def fed(path: Path, body: bytes, order: list[int], threads: int = 1) -> str:
    """The digest of a file whose parts are written in this order."""
    path.write_bytes(bytes(len(body)))
    file, found = os.open(path, os.O_RDWR), Digest()

    def put(part: int) -> None:
        data = memoryview(body)[part * 1000 : (part + 1) * 1000]
        os.pwrite(file, data, part * 1000)
        found.add(part * 1000, data)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(put, order))
    try:
        return found.finish(file, len(body))
    finally:
        os.close(file)


@pytest.mark.parametrize("waiting", [0, 5000, 1 << 20])
@pytest.mark.parametrize("threads", [1, 4])
def test_digest_does_not_depend_on_the_order_of_parts(
    waiting: int, threads: int, tmp_path: Path, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest, "WAITING", waiting)
    expected, forwards = hashlib.sha256(body).hexdigest(), list(range(PARTS))
    for order in (forwards, forwards[::-1], [*np.random.default_rng(1).permutation(PARTS)]):
        assert fed(tmp_path / "file", body, order, threads) == expected


def test_part_that_is_written_again_while_it_is_hashed_counts_as_it_is_now(
    tmp_path: Path, body: bytes
) -> None:
    found: Digest

    class Slow(Checksum):
        def update(self, data: bytes | memoryview, /) -> None:
            super().update(data)
            if bytes(data) == b"x" * 1000:
                found.add(0, memoryview(body)[:1000])

    (tmp_path / "file").write_bytes(body)
    file, found = os.open(tmp_path / "file", os.O_RDWR), Digest(Slow)
    found.add(0, memoryview(b"x" * 1000))
    found.add(1000, memoryview(body)[1000:2000])
    assert found.finish(file, len(body)) == checksum_of(tmp_path / "file")
    os.close(file)


def test_part_that_is_written_a_second_time_counts_as_it_is_now(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 1000 + body[1000:])
    file, found = os.open(path, os.O_RDWR), Digest()
    found.add(0, memoryview(b"x" * 1000))
    found.add(1000, memoryview(body)[1000:2000])
    os.pwrite(file, body[:1000], 0)
    found.add(0, memoryview(body)[:1000])
    assert found.finish(file, len(body)) == hashlib.sha256(body).hexdigest()
    os.close(file)


def test_parts_in_order_are_not_read_again(
    tmp_path: Path, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.pread", None)
    assert fed(tmp_path / "file", body, list(range(PARTS))) == hashlib.sha256(body).hexdigest()


def test_checksum_finds_a_changed_byte(tmp_path: Path, body: bytes) -> None:
    (tmp_path / "one").write_bytes(body)
    (tmp_path / "two").write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
    one = Checksum()
    one.update(body)
    assert checksum_of(tmp_path / "one") == one.hexdigest() != checksum_of(tmp_path / "two")
