"""Pickled checkpoints: what is taken out of them, to the bit, and that nothing in them is ever called."""

import contextlib
import io
import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from merge_service.checkpoints import Checkpoint
from merge_service.checkpoints.pickled.convert import convert
from merge_service.checkpoints.pickled.machine import read
from merge_service.errors import CheckpointError, UserError

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
          torch.float8_e4m3fn, torch.uint16)  # fmt: skip


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    wide = torch.randn(6, 8)
    return {
        "emb.weight": wide,
        "t.weight": torch.randn(4, 6).t(),
        "part.weight": wide[2:5, 1:4],
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        **{f"as.{kind}".replace("torch.", ""): torch.randn(3, 5).abs().to(kind) for kind in DTYPES},
    }


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    view = (lambda x: x.contiguous().reshape(-1).view(torch.uint8)) if one.numel() else (lambda x: x)
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(view(one), view(other))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_state_dict_is_written_bit_for_bit(tmp_path: Path, legacy: bool) -> None:
    held = {
        name: one for name, one in state().items() if not (legacy and ("float8" in name or "uint16" in name))
    }
    torch.save(held, tmp_path / "model.pt", _use_new_zipfile_serialization=not legacy)
    before = (tmp_path / "model.pt").read_bytes()
    made = convert(tmp_path / "model.pt", tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == held.keys() and all(same(found[name], held[name]) for name in held)
    assert (tmp_path / "model.pt").read_bytes() == before and made.tensors == len(held)


def test_nested_state_dict_of_a_wrapped_module_is_found_and_unwrapped(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    wrapped = OrderedDict((f"module.{name}", one) for name, one in model.state_dict().items())
    torch.save(
        {"epoch": 3, "state_dict": wrapped, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
        tmp_path / "m.ckpt",
    )
    made = convert(tmp_path / "m.ckpt", tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors").keys() == model.state_dict().keys()
    assert "left: epoch, optimizer" in made.notes[0] and "module." in made.notes[1]


def test_parameters_and_ties_are_kept_as_one_tensor(tmp_path: Path) -> None:
    shared = torch.nn.Parameter(torch.randn(4, 3))
    torch.save({"lm_head.weight": shared, "embed_tokens.weight": shared}, tmp_path / "m.bin")
    made = convert(tmp_path / "m.bin", tmp_path / "out.safetensors")
    assert made.ties == {"lm_head.weight": "embed_tokens.weight"}
    with safe_open(tmp_path / "out.safetensors", "np") as file:
        assert (
            list(file.keys()) == ["embed_tokens.weight"]
            and file.metadata()["lm_head.weight"] == "embed_tokens.weight"
        )


def test_folder_with_shards_becomes_a_folder_that_opens(tmp_path: Path) -> None:
    room = tmp_path / "in"
    room.mkdir()
    parts = {
        "pytorch_model-00001-of-00002.bin": {"a": torch.ones(2, 2)},
        "pytorch_model-00002-of-00002.bin": {"b": torch.zeros(3)},
    }
    for name, held in parts.items():
        torch.save(held, room / name)
    where = {tensor: name for name, held in parts.items() for tensor in held}
    (room / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    (room / "config.json").write_text('{"model_type": "x"}')
    made = convert(room, tmp_path / "out")
    assert made.out == tmp_path / "out" and {one.name for one in made.out.iterdir()} == {
        "config.json",
        "model.safetensors",
    }
    assert set(Checkpoint.open(made.out).tensors) == {"a", "b"}


class Runs:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize(
    "value, said",
    [
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        ({"a": torch.ones(1), "args": np.float64(1)}, "numpy"),
        ({"a": torch.ones(1), "words": {1, 2}}, "set"),
        ({"a": torch.ones(1), "path": Path("x")}, "pathlib"),
        ({"model": {"a": torch.ones(1)}, "ema": {"a": torch.ones(1)}}, "several (model, ema)"),
        ({"epoch": 1}, "none under a usual name"),
        ([torch.ones(1)], "not a state dict"),
    ],
    ids=["module", "numpy", "set", "path", "several", "none", "list"],
)
def test_what_is_no_state_dict_is_refused_by_name(tmp_path: Path, value: object, said: str) -> None:
    torch.save(value, tmp_path / "m.pt")
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path / "m.pt", tmp_path / "out.safetensors")
    assert said in str(caught.value) and not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_nothing_that_a_pickle_names_is_called(tmp_path: Path, legacy: bool) -> None:
    torch.save(
        {"a": torch.ones(2), "b": Runs(tmp_path / "ran")},
        tmp_path / "m.pt",
        _use_new_zipfile_serialization=not legacy,
    )
    with pytest.raises(CheckpointError, match=r"posix\.mkdir|nt\.mkdir"):
        convert(tmp_path / "m.pt", tmp_path / "out.safetensors")
    assert not (tmp_path / "ran").exists()


def test_key_chooses_among_several_state_dicts(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(1)}, "ema": {"shadow": {"a": torch.zeros(1)}}}, tmp_path / "m.pt")
    convert(tmp_path / "m.pt", tmp_path / "out.safetensors", key="ema.shadow")
    assert load_file(tmp_path / "out.safetensors")["a"].item() == 0
    with pytest.raises(CheckpointError, match=r"no entry 'emma'; it has model, ema"):
        convert(tmp_path / "m.pt", tmp_path / "out.safetensors", key="emma")


def test_tensor_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(4.0)}, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "m.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[:-4])
    with pytest.raises(UserError):
        convert(tmp_path / "cut.pt", tmp_path / "out.safetensors")


@pytest.mark.parametrize("seed", range(6))
def test_damaged_pickle_is_an_error_of_ours(tmp_path: Path, seed: int) -> None:
    torch.save(state(), tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    whole = bytearray((tmp_path / "m.pt").read_bytes())
    rng = np.random.default_rng(seed)
    for _ in range(60):
        data = bytearray(whole)
        for at in rng.integers(0, min(len(data), 3000), 3):
            data[at] = rng.integers(256)
        (tmp_path / "bad.pt").write_bytes(bytes(data))
        with contextlib.suppress(UserError):
            convert(tmp_path / "bad.pt", tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    "data", [b"", b"\x80\x02", b"hello", pickle.dumps(object), b"\x80\x02}(K\x01u.", b"(" * 5000 + b"."]
)
def test_bytes_that_are_no_pickle_of_tensors_are_refused(data: bytes) -> None:
    with pytest.raises(UserError):
        found = read(io.BytesIO(data), Path("m.pt"))
        raise CheckpointError(f"read {type(found)}")
