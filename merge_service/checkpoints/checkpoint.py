"""Checkpoints on disk: a safetensors file, a sharded index, or a directory with either, read through memory maps.

Only what is read is paged in, so the size of a model never counts as anonymous memory. File names and layouts are known only
here; other modules see names, shapes and blocks of numbers.

Invariant: an open checkpoint has a fully validated header, and `read` changes nothing and copies no more than it returns.
"""

import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

from merge_service.checkpoints.dtypes import decode
from merge_service.checkpoints.folders.kinds import OPEN_CLIP, OPEN_CLIP_CONFIG, standard_file
from merge_service.checkpoints.foreign import check_file, explain_directory
from merge_service.checkpoints.header import HEADER_LIMIT, TensorInfo, corrupt, parse_json, read_header
from merge_service.checkpoints.shards import SHARD
from merge_service.checkpoints.weights import Named
from merge_service.errors import CheckpointError
from merge_service.files.absent import absence
from merge_service.files.ranges import data_of, is_far

WEIGHTS_FILE = f"{OPEN_CLIP}.safetensors"
CONFIG_FILE = OPEN_CLIP_CONFIG
SAMPLE = 1024
"""Bytes of a tensor that a fingerprint reads at each place."""
_CHUNK = 1 << 20


def locate(path: Path | str) -> Path:
    """The weights file or index behind `path`.

    Raises `CheckpointError` if there is none or more than one candidate, and `ForeignCheckpoint` for a file of another kind.
    """
    found = _locate(Path(path))
    check_file(found)
    return found


def _locate(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path} {absence(path)}")
    named = standard_file(path)
    if named is not None:
        return named
    found = sorted(path.glob("*.safetensors.index.json")) or sorted(
        file for file in path.glob("*.safetensors") if not SHARD.search(file.name)
    )
    if not found:
        explain_directory(path)
    if len(found) != 1:
        what = (
            f"holds {len(found)} of them ({', '.join(f.name for f in found[:5])})" if found else "holds none"
        )
        raise CheckpointError(
            f"{path} should hold one .safetensors file or .safetensors.index.json but {what}; name the file"
        )
    return found[0]


class Checkpoint(Named):
    """An open checkpoint: `Weights` in files; a context manager.

    `tensors` are in header order; `metadata` is the file's own (the first shard's if sharded). No file stays open, because there
    may be hundreds of experts.
    """

    def __init__(
        self, path: Path, files: list[Path], tensors: dict[str, TensorInfo], metadata: dict[str, str]
    ) -> None:
        super().__init__(path, tensors, metadata)
        self.files = files
        self._stored = dict(tensors)
        self._bytes = [data_of(file) for file in files]
        self._addresses = [data.ctypes.data if isinstance(data, np.ndarray) else None for data in self._bytes]

    @classmethod
    def open(cls, path: Path | str) -> "Checkpoint":
        """Open and validate. Raises `CorruptCheckpoint` naming the file, or `CheckpointError` if there is nothing to open."""
        file = locate(path)
        try:
            if file.name.endswith(".json"):
                return cls._open_index(file)
            tensors, metadata = read_header(file)
            return cls(file, [file], tensors, metadata)
        except OSError as error:
            raise CheckpointError(f"cannot read {error.filename or file}: {error.strerror}") from error

    @classmethod
    def _open_index(cls, index: Path) -> "Checkpoint":
        if index.stat().st_size > HEADER_LIMIT:
            raise corrupt(index, f"it is above the limit of {HEADER_LIMIT} bytes for an index")
        where = parse_json(index.read_bytes(), index).get("weight_map")
        if not isinstance(where, dict) or not where or not all(isinstance(v, str) for v in where.values()):
            raise corrupt(index, "it has no weight_map of tensor names to file names")
        shards = sorted(set(where.values()))
        files = [_shard(index, name) for name in shards]
        tensors: dict[str, TensorInfo] = {}
        metadata: dict[str, str] = {}
        for number, file in reversed(list(enumerate(files))):
            held, metadata = read_header(file, number)
            wrong = {name for name, shard in where.items() if shard == file.name} ^ held.keys()
            if wrong:
                raise corrupt(file, f"it and {index.name} disagree about tensor {min(wrong)!r}")
            tensors |= held
        return cls(index, files, {name: tensors[name] for name in where}, metadata)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Elements start..stop of the flattened tensor: float32 (float64 for F64) or the integers as they are.

        The array is read-only where it is a view of the file.
        """
        return decode(self.raw(name, start, stop), self.tensors[name].kind)

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The same elements as stored (bfloat16 as uint16), a read-only view of the file."""
        info = self.tensors[name]
        first, last, _ = slice(start, stop).indices(info.numel)
        size = info.kind.itemsize
        data = self._bytes[info.shard][info.offset + first * size : info.offset + max(first, last) * size]
        return data.view(info.kind.storage) if info.offset % size == 0 else _unaligned(data, info)

    def address(self, name: str) -> int | None:
        """The memory address of the tensor while the checkpoint is open; None if it is not aligned to the size of its numbers, or not in
        memory."""
        info = self.tensors[name]
        begun = self._addresses[info.shard]
        if begun is None or (begun + info.offset) % info.kind.itemsize:
            return None
        return begun + info.offset

    def digests(self) -> tuple[str, str]:
        """A digest of the tensors' content, independent of names, copies, order and files, and the sha256 of `sha256_of`; one
        read.

        The content digest is made of a checksum (CRC-32) of each tensor: it distinguishes experts and proves nothing.
        """
        sums, parts = list[tuple[str, int, int]](), list[str]()
        for number in range(len(self.files)):
            digest = hashlib.sha256()
            data = self._bytes[number]
            held = sorted(
                (i.offset, i.nbytes, i.dtype, i.numel) for i in self._stored.values() if i.shard == number
            )
            digest.update(_buffer(data[: held[0][0] if held else None]))
            for offset, size, dtype, numel in held:
                crc = 0
                for at in range(offset, offset + size, _CHUNK):
                    chunk = _buffer(data[at : min(at + _CHUNK, offset + size)])
                    digest.update(chunk)
                    crc = zlib.crc32(chunk, crc)
                sums.append((dtype, numel, crc))
            parts.append(digest.hexdigest())
        content = hashlib.sha256(repr(sorted(set(sums))).encode()).hexdigest()
        if self.path.name.endswith(".json"):
            parts = [hashlib.sha256("".join([_sha256(self.path), *parts]).encode()).hexdigest()]
        return content, parts[0]

    def fingerprint(self) -> str:
        """A digest of the headers and of the beginning, middle and end of every tensor; takes milliseconds.

        It distinguishes checkpoints that training or merging made. A file that was changed on purpose needs the sha256.
        """
        digest = hashlib.sha256(
            repr([(n, i.dtype, i.shape, i.shard, i.offset) for n, i in self._stored.items()]).encode()
        )
        for info in self._stored.values():
            for start, stop in sampled(info.nbytes):
                part = self._bytes[info.shard][info.offset + start : info.offset + stop]
                digest.update(_buffer(part))
        return digest.hexdigest()

    def close(self) -> None:
        """Release the files; arrays that were read stay valid."""
        self._bytes = []

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def samples(data: memoryview) -> Iterator[memoryview]:
    """The bytes of a tensor that a fingerprint reads: its beginning, middle and end, or all of a small one."""
    for start, stop in sampled(len(data)):
        yield data[start:stop]


def sampled(size: int) -> Iterator[tuple[int, int]]:
    """Where these bytes are, of a tensor of so many."""
    if size <= 3 * SAMPLE:
        yield 0, size
        return
    for at in (0, (size - SAMPLE) // 2, size - SAMPLE):
        yield at, at + SAMPLE


def sha256_of(path: Path | str) -> str:
    """The identity of weights: sha256 of the weights file (of the index and every shard, in order of name, if sharded)."""
    file = locate(path)
    if not file.name.endswith(".json"):
        return _sha256(file)
    with Checkpoint.open(file) as checkpoint:
        parts = [_sha256(part) for part in (file, *checkpoint.files)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _sha256(file: Path) -> str:
    if is_far(file):
        data, digest = data_of(file), hashlib.sha256()
        for at in range(0, len(data), _CHUNK):
            digest.update(_buffer(data[at : at + _CHUNK]))
        return digest.hexdigest()
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _buffer(data: np.ndarray) -> memoryview:
    return memoryview(data)  # type: ignore[arg-type]


def _shard(index: Path, name: str) -> Path:
    if Path(name).name != name or name in ("", ".", ".."):
        raise corrupt(index, f"it points outside its own directory: {name!r}")
    if not (index.parent / name).is_file():
        raise CheckpointError(f"{index} names the shard {name[:100]!r}, which is not there")
    return index.parent / name


def _unaligned(data: np.ndarray, info: TensorInfo) -> np.ndarray:
    return np.frombuffer(data.tobytes(), dtype=info.kind.storage)
