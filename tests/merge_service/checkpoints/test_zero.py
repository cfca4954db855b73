"""Folders of DeepSpeed's ZeRO, written by deepspeed on the CPU, and laid out by hand for several ranks."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from merge_service.checkpoints import convert
from merge_service.errors import CheckpointError, CorruptCheckpoint

TRAIN = """
import os, sys, torch
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", DS_ACCELERATOR="cpu")
import deepspeed
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for a minute
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
deepspeed.init_distributed(auto_mpi_discovery=False)
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import save_file
for stage in (2, 3):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 2))
    model.register_buffer("buffer", torch.arange(3.0))
    model[1].bias.requires_grad_(False)
    adam = {"type": "Adam", "params": {"torch_adam": True}}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}, "bf16": {"enabled": True}, "optimizer": adam}
    engine = deepspeed.initialize(model=model, config=config, dist_init_required=False)[0]
    engine.save_checkpoint(f"{sys.argv[1]}/run{stage}", tag="global_step7")
    whole = get_fp32_state_dict_from_zero_checkpoint(f"{sys.argv[1]}/run{stage}")
    save_file({name: one.clone().contiguous() for name, one in whole.items()}, f"{sys.argv[1]}/theirs{stage}.safetensors")
"""


@pytest.mark.slow
def test_folders_that_deepspeed_writes_give_what_its_own_script_gives(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for stage in (2, 3):
        made = convert(tmp_path / f"run{stage}", tmp_path / f"ours{stage}.safetensors")
        ours, theirs = (load_file(tmp_path / f"{who}{stage}.safetensors") for who in ("ours", "theirs"))
        assert (
            made.notes == ("taken from global_step7, which is the latest",) and ours.keys() == theirs.keys()
        )
        for name, one in theirs.items():
            assert torch.equal(ours[name].float(), one.float()), (stage, name)


WHOLE = {
    "a": torch.arange(15.0).reshape(3, 5),
    "b": torch.arange(7.0) + 100,
    "c": torch.arange(4.0).reshape(2, 2) + 200,
}
SHAPES = {name: one.shape for name, one in WHOLE.items()}


def write(room: Path, stage: int, world: int, **more: object) -> Path:
    """A checkpoint of `world` ranks as stages 2 and 3 lay it out."""
    if stage == 3:
        parts = {
            name: torch.cat([one.reshape(-1), torch.zeros(-one.numel() % world)]).chunk(world)
            for name, one in WHOLE.items()
        }
        rows = [torch.cat([parts[name][rank] for name in WHOLE]) for rank in range(world)]
        flats = [{"fp32_flat_groups": [row[:4].clone(), row[4:].clone()]} for row in rows]
    else:
        row = torch.cat([one.reshape(-1) for one in WHOLE.values()])
        row = torch.cat([row, torch.zeros(-row.numel() % (2 * world))])
        flats = [{"single_partition_of_fp32_groups": [part.clone()]} for part in row.chunk(world)]
    room.mkdir()
    for rank, flat in enumerate(flats):
        state = {"zero_stage": stage, "partition_count": world, **flat}
        torch.save({"optimizer_state_dict": state}, room / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        name = (
            f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
        )
        head = {
            "module": {},
            "buffer_names": [],
            "param_shapes": [SHAPES],
            "shared_params": {"alias": "a"},
            **more,
        }
        torch.save(head, room / name)
    return room


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 11])
def test_parts_of_all_ranks_are_whole_again(tmp_path: Path, stage: int, world: int) -> None:
    made = convert(write(tmp_path / "zero", stage, world), tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert made.ties
    for name, one in WHOLE.items():
        assert torch.equal(found[name], one), name


def test_missing_ranks_and_other_parallelism_are_refused(tmp_path: Path) -> None:
    place = write(tmp_path / "zero", 2, 3)
    (place / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match="files of 2 ranks, and the run had 3"):
        convert(place, tmp_path / "out.safetensors")
    (place / "zero_pp_rank_0_mp_rank_01_optim_states.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="tensor parallelism"):
        convert(place, tmp_path / "out.safetensors")
    short = write(tmp_path / "short", 3, 2, param_shapes=[{**SHAPES, "d": torch.Size([9])}])
    with pytest.raises(CorruptCheckpoint, match="ends within d"):
        convert(short, tmp_path / "out.safetensors")
    odd = write(tmp_path / "odd", 2, 1, param_shapes=[None])
    with pytest.raises(CorruptCheckpoint, match="other entries"):
        convert(odd, tmp_path / "out.safetensors")
    (short / "latest").write_text("..")
    with pytest.raises(CheckpointError, match="no folder beside it"):
        convert(short, tmp_path / "out.safetensors")
    assert not list(tmp_path.glob("*.safetensors"))
