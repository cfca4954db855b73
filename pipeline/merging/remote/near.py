"""Gives every remote input of a merge a folder of this machine: its small files, and headers of its weights, whose bytes are then fetched.

Everything that opens a model on disk opens this folder: recognition, plans, configurations, cards. A merge of it has the bytes of a merge of
the downloaded model.

Invariant: no file of weights is loaded whole, and the folders are gone when the merge ends.
"""

import re
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path, PurePosixPath

from merge_service.checkpoints import HEADER_LIMIT
from merge_service.errors import UserError
from merge_service.files import far
from pipeline.merging.remote.hub import Hub
from pipeline.merging.remote.source import SUFFIX, Bucket, RemoteError, Source

_SCHEMES = "hf|s3|gs|gcs|abfs|memory"
_REMOTE = re.compile(rf"({_SCHEMES}):/+(.+)")
_CUT = re.compile(rf"\+(?=(?:{_SCHEMES}):/)")
_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_HEAVY = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".ggml",
    ".onnx",
    ".h5",
    ".msgpack",
    ".ot",
    ".npz",
    ".pkl",
    ".parquet",
    ".zip",
    ".tar",
)
SMALL = 64 << 20
"""Most bytes of a file that is loaded whole."""
_FIRST = 1 << 16
_AT_ONCE = 8


def is_remote(path: str | Path) -> bool:
    """Whether an input, or one side of BASE+ADAPTER, is not on this machine."""
    return any(_REMOTE.match(part) for part in _CUT.split(str(path)))


def with_slashes(path: str) -> str:
    """A remote input as people write it: `Path` makes one slash of two."""
    return re.sub(rf"(^|\+)({_SCHEMES}):/+", r"\1\2://", path)


@contextmanager
def near(paths: Iterable[str | Path]) -> Iterator[dict[str, str]]:
    """The paths on this machine of those inputs that are remote, for the length of a `with` block. Raises `RemoteError`."""
    wanted = dict.fromkeys(str(path) for path in paths if is_remote(path))
    with ExitStack() as stack:
        parts = dict.fromkeys(part for path in wanted for part in _CUT.split(path) if _REMOTE.match(part))
        room = (
            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="temporal-merge-far-")))
            if parts
            else None
        )
        places = {}
        for number, part in enumerate(parts):
            assert room is not None
            places[part] = str(_placed(_source(part), room / str(number), stack))
        try:
            yield {path: "+".join(places.get(part, part) for part in _CUT.split(path)) for path in wanted}
        except UserError as error:  # a message names what the user gave
            said = str(error.args[0]) if error.args else ""
            for part, place in places.items():
                said = said.replace(place, with_slashes(part))
            error.args = (said, *error.args[1:])
            raise


def _source(part: str) -> Source:
    scheme, rest = _REMOTE.fullmatch(part).groups()  # type: ignore[union-attr]
    if scheme != "hf":
        return Bucket(f"{scheme}://{rest.rstrip('/')}")
    found = _HUB.fullmatch(rest.rstrip("/"))
    if found is None:
        raise RemoteError(f"{with_slashes(part)}: write hf://OWNER/NAME, or hf://OWNER/NAME@REVISION")
    return Hub(found[1], found[2] or "main")


def _placed(source: Source, room: Path, stack: ExitStack) -> Path:
    """The folder of a source, or its one file of weights."""
    files = source.files()
    alone = source.name.endswith(SUFFIX)
    folder = room / ("model" if alone else source.name)
    folder.mkdir(parents=True)
    weights = [name for name in files if name.endswith(SUFFIX) and "/" not in name]
    if not weights:
        raise RemoteError(
            f"{source.url} holds no {SUFFIX} file; convert its weights first (`temporal-merge convert`)"
        )
    small = [name for name in files if name not in weights and _is_copied(name, files[name])]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda name: _copy(source, name, folder), small))
        list(pool.map(lambda name: _begin(source, name, folder), weights))
    fetches = {folder / name: partial(source.part, name) for name in weights}
    stack.enter_context(
        far(folder, source.url.removesuffix(f"/{source.name}") if alone else source.url, fetches)
    )
    return folder / source.name if alone else folder


def _is_copied(name: str, size: int | None) -> bool:
    parts = PurePosixPath(name).parts
    inside = len(parts) <= 2 and ".." not in parts and not name.startswith(("/", "."))
    return inside and not name.endswith(_HEAVY) and (size is None or size <= SMALL)


def _copy(source: Source, name: str, folder: Path) -> None:
    place = folder / name
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(source.part(name, 0, source.size(name)))


def _begin(source: Source, name: str, folder: Path) -> None:
    """A sparse file of the whole size with the header of the remote one."""
    size = source.size(name)
    begun = source.part(name, 0, min(_FIRST, size))
    length = 8 + int.from_bytes(begun[:8], "little")
    if length <= min(size, 8 + HEADER_LIMIT) and length > len(begun):
        begun += source.part(name, len(begun), length)
    with (folder / name).open("wb") as out:
        out.write(begun[: max(length, 8)] if length <= size else begun)
        out.truncate(size)
