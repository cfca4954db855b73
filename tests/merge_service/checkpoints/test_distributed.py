"""Directories of torch.distributed.checkpoint, written by torch: put together piece by piece, or refused by name."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from merge_service.checkpoints import Checkpoint, convert
from merge_service.errors import CheckpointError, CorruptCheckpoint, ForeignCheckpoint

RANKS = """
import os, sys
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
dist.init_process_group("gloo", init_method="file://" + sys.argv[1] + "/meet", rank=int(sys.argv[2]), world_size=2)
mesh = init_device_mesh("cpu", (2,))
whole = {"rows": torch.arange(35.0).reshape(7, 5), "columns": torch.arange(24.0).reshape(2, 3, 4).bfloat16(), "all": torch.arange(3)}
axes = {"rows": Shard(0), "columns": Shard(1), "all": Replicate()}
model = {name: distribute_tensor(one, mesh, [axes[name]]) for name, one in whole.items()}
dcp.save({"model": model, "optimizer": {"state": {"rows": {"exp_avg": model["rows"]}}}}, checkpoint_id=sys.argv[1] + "/step-10")
dist.barrier()
os._exit(0)  # gloo's own end is at times an abort, after everything is saved
"""
WHOLE = {
    "rows": torch.arange(35.0).reshape(7, 5),
    "columns": torch.arange(24.0).reshape(2, 3, 4).bfloat16(),
    "all": torch.arange(3),
}


def saved(room: Path, state: dict) -> Path:
    dcp.save(state, checkpoint_id=room / "saved", no_dist=True)
    return room / "saved"


def test_tensors_sharded_over_ranks_by_rows_and_columns_are_whole_again(tmp_path: Path) -> None:
    ranks = [subprocess.Popen([sys.executable, "-c", RANKS, str(tmp_path), str(rank)]) for rank in range(2)]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    made = convert(tmp_path / "step-10", tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert made.notes == ("taken from step-10: model; left: optimizer",) and found.keys() == WHOLE.keys()
    for name, one in WHOLE.items():
        assert found[name].dtype == one.dtype and torch.equal(found[name], one), name


def test_state_dict_without_an_entry_and_one_that_is_named(tmp_path: Path) -> None:
    state = {
        "layer.weight": torch.randn(4, 3),
        "half": torch.randn(5).half(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
    }
    convert(saved(tmp_path, state), tmp_path / "plain.safetensors", shard_bytes=None)
    found = load_file(tmp_path / "plain.safetensors")
    assert all(torch.equal(found[name], one) for name, one in state.items()) and found.keys() == state.keys()
    named = saved(tmp_path / "named", {"a": {"module.w": torch.ones(2)}, "b": {"w": torch.zeros(2)}})
    with pytest.raises(CheckpointError, match="choose with --key among a, b"):
        convert(named, tmp_path / "named.safetensors")
    convert(named, tmp_path / "named.safetensors", key="a")
    assert load_file(tmp_path / "named.safetensors")["w"].tolist() == [1.0, 1.0]


def test_merge_of_such_a_directory_says_how_to_convert_it(tmp_path: Path) -> None:
    with pytest.raises(ForeignCheckpoint, match="temporal-merge convert"):
        Checkpoint.open(saved(tmp_path, {"w": torch.ones(2)}))


class Harm:
    """What a hostile description would run."""

    def __reduce__(self) -> tuple:
        return (Path("/nowhere").touch, ())


def test_class_in_the_description_is_refused_by_name_and_not_run(tmp_path: Path) -> None:
    place = saved(tmp_path, {"w": torch.ones(2)})
    (place / ".metadata").write_bytes(pickle.dumps({"x": Harm()}))
    with pytest.raises(CheckpointError, match="only tensors and dictionaries are read"):
        convert(place, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("chunks", "said"),
    [([(0, 2), (1, 2)], "overlaps another"), ([(0, 2), (0, 2)], "twice there"), ([(0, 2)], "hold 2 of its 4"),
     ([None], "does not describe")],
)  # fmt: skip
def test_pieces_that_overlap_or_leave_gaps_are_refused(
    tmp_path: Path, chunks: list[tuple[int, int] | None], said: str
) -> None:
    place = saved(tmp_path, {"w": torch.arange(4.0)})
    described = dcp.FileSystemReader(place).read_metadata()
    (info,) = described.storage_data.values()
    described.state_dict_metadata["w"].chunks = [
        one and ChunkStorageMetadata(torch.Size([one[0]]), torch.Size([one[1]])) for one in chunks
    ]
    described.storage_data = {MetadataIndex("w", torch.Size([at])): info for at in (0, 1)}
    (place / ".metadata").write_bytes(pickle.dumps(described))
    with pytest.raises(CorruptCheckpoint, match=said):
        convert(place, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_missing_or_damaged_files_of_ranks_are_named(tmp_path: Path) -> None:
    place = saved(tmp_path, {"w": torch.arange(2000.0)})
    (file,) = place.glob("*.distcp")
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(CorruptCheckpoint, match="is cut"):
        convert(place, tmp_path / "out.safetensors")
    file.unlink()
    with pytest.raises(CheckpointError, match="copy the files of all ranks"):
        convert(place, tmp_path / "out.safetensors")
    (place / ".metadata").write_bytes(b"\x80\x04" + b"N.")
    with pytest.raises(CorruptCheckpoint, match="does not describe"):
        convert(place, tmp_path / "out.safetensors")
    assert not list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob(".*"))
