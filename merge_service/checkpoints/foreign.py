"""Recognises files that are given as a checkpoint and are something else, by their first bytes and name.

Users often have pickles, pointers of Git LFS, adapters, recipes and studies. The error says what the file is and what to do with
it; "not safetensors" alone would suggest a damaged file.

Invariant: nothing of the file is executed or unpickled, and at most its first bytes are read.
"""

from pathlib import Path

from merge_service.errors import ForeignCheckpoint

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".th")
_FIRST = 512
_PICKLE = (
    "a pickle of torch, which is never loaded here because it can run code; `temporal-merge convert IN NAME.safetensors` takes the "
    "tensors out of it and runs nothing"
)
_ARRAYS = "a file of NumPy arrays; save the tensors by name with safetensors.numpy.save_file"


def check_file(path: Path) -> None:
    """Raise `ForeignCheckpoint` naming the kind of file if `path` is known to be neither safetensors nor an index.

    A file that cannot be read raises nothing here; the code that opens it next does.
    """
    try:
        with path.open("rb") as file:
            begun = file.read(_FIRST)
    except OSError:
        return
    what = _by_bytes(begun) or _by_name(path, begun)
    if what is not None:
        raise ForeignCheckpoint(f"{path} is {what}")


def explain_directory(directory: Path) -> None:
    """Raise `ForeignCheckpoint` if a directory without a checkpoint of its own is that of a run or a pipeline, or holds pickled
    weights, or shards without their index.
    """
    if (directory / "plan.json").is_file():
        raise ForeignCheckpoint(
            f"{directory} is the directory of a run, not a checkpoint; its checkpoints are the directories under "
            f"{directory / 'store'} (in Python: open_run(OUT).checkpoint(trajectory, t))"
        )
    if (directory / ".metadata").is_file():
        raise ForeignCheckpoint(
            f"{directory} is a checkpoint of torch.distributed.checkpoint (FSDP, torchtitan); `temporal-merge convert IN "
            "NAME.safetensors` puts its tensors together and runs nothing"
        )
    if (directory / "model_index.json").is_file():
        parts = sorted({file.parent.name for file in directory.glob("*/*.safetensors")})
        raise ForeignCheckpoint(
            f"{directory} is a pipeline of several models, as diffusers saves it; merge each by itself: "
            f"{', '.join(str(directory / part) for part in parts) or 'none of them is there as safetensors'}"
        )
    shards = sorted(file.name for file in directory.glob("*.safetensors"))
    if shards:
        raise ForeignCheckpoint(
            f"{directory} holds shards ({', '.join(shards[:3])}{', ...' if shards[3:] else ''}) but not their index "
            "(NAME.safetensors.index.json), without which it is unknown whether they are complete; copy it as well"
        )
    found = sorted(file.name for file in directory.iterdir() if file.suffix in PICKLES and file.is_file())
    if found:
        shown = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise ForeignCheckpoint(f"{directory} holds no safetensors file but {shown}: {_PICKLE}")


def _by_bytes(begun: bytes) -> str | None:
    if begun[8:9] == b"{":  # the length of a header may begin as any of these
        return None
    if begun.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the weights themselves: run `git lfs pull` where it was cloned, or download the file"
    if begun.startswith(b"PK\x03\x04"):
        return _ARRAYS if _entry(begun).endswith(b".npy") else _PICKLE
    if begun[:1] == b"\x80" and begun[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return _PICKLE
    if begun.startswith(b"GGUF"):
        return "a GGUF file, made for inference and mostly quantised; merge the safetensors files that it was made from"
    if begun.startswith(b"\x89HDF"):
        return (
            "an HDF5 file (of Keras, for instance); load it in its own framework and save it as safetensors"
        )
    if begun.startswith(b"\x93NUMPY"):
        return _ARRAYS
    if begun.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        return "an HTML page, as a download without access leaves it; download the weights again"
    return None


def _entry(begun: bytes) -> bytes:
    """The name of a ZIP archive's first entry."""
    return begun[30 : 30 + int.from_bytes(begun[26:28], "little")]


def _by_name(path: Path, begun: bytes) -> str | None:
    if path.suffix in (".yaml", ".yml"):
        return (
            "a YAML file, such as a study, a suite or another tool's recipe, not a checkpoint; give the .safetensors files "
            "themselves (a study is for `temporal-merge run`)"
        )
    if path.name.endswith(".bin.index.json"):
        return f"the index of pickled shards, each {_PICKLE}"
    if path.suffix in PICKLES and begun[8:9] != b"{":
        return f"by its name {_PICKLE}"
    return None
