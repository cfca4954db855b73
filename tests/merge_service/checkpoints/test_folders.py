"""A directory of a Hugging Face library in, one out: what is copied, what is left, and how the configuration follows."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from merge_service.checkpoints import Checkpoint, locate
from merge_service.errors import CheckpointError, NonFiniteCheckpoint
from merge_service.merge import merge

BESIDE = {
    "config.json": '{"model_type": "llama", "torch_dtype": "float32", "text_config": {"dtype": "float32"}}',
    "generation_config.json": "{}",
    "tokenizer.json": '{"model": {}}',
    "tokenizer_config.json": "{}",
    "special_tokens_map.json": "{}",
    "spiece.model": "pieces",
    "merges.txt": "a b",
    "chat_template.jinja": "{{ messages }}",
    "preprocessor_config.json": "{}",
    "modeling_own.py": "raise SystemExit('imported')",
    "LICENSE": "mine",
}
LEFT = (
    "optimizer.pt",
    "trainer_state.json",
    "training_args.bin",
    "rng_state.pth",
    "pytorch_model.bin",
    "README.md",
    "model.gguf",
)


def folder(room: Path, seed: int, name: str = "model", **files: str) -> Path:
    room.mkdir(parents=True)
    base = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)
    step = np.random.default_rng(seed).standard_normal((8, 16)).astype(np.float32) / 50 * (seed > 0)
    save_file(
        {"model.layers.0.w": base + step, "steps": np.arange(3)},
        room / f"{name}.safetensors",
        {"format": "pt"},
    )
    for part, text in files.items():
        (room / part).parent.mkdir(exist_ok=True)
        (room / part).write_text(text)
    return room


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, list[Path]]:
    base = folder(tmp_path / "base", 0, **BESIDE, **dict.fromkeys(LEFT, "left"))
    return base, [folder(tmp_path / f"e{seed}", seed, **{"config.json": "{}"}) for seed in (1, 2)]


def test_output_folder_holds_what_a_model_needs_and_nothing_of_its_training(inputs, tmp_path: Path) -> None:
    base, experts = inputs
    out = tmp_path / "out"
    report = merge("average", {}, base, experts, out, texts={"merge.yaml": "technique: average\n"})
    assert report.out == out
    assert {path.name for path in out.iterdir()} == {*BESIDE, "model.safetensors", "merge.yaml"}
    for name in BESIDE:
        assert (out / name).read_bytes() == (base / name).read_bytes()
    both = [load_file(one / "model.safetensors")["model.layers.0.w"] for one in experts]
    np.testing.assert_allclose(
        load_file(out / "model.safetensors")["model.layers.0.w"], np.mean(both, 0), rtol=1e-6
    )


def test_dtype_is_written_once_rounded_and_said_in_the_configuration(inputs, tmp_path: Path) -> None:
    base, experts = inputs
    out = tmp_path / "out"
    merge("average", {}, base, experts, out, dtype="float16")
    whole = merge("average", {}, base, experts, tmp_path / "whole.safetensors").out
    written, exact = load_file(out / "model.safetensors"), load_file(str(whole))
    assert written["model.layers.0.w"].dtype == np.float16 and written["steps"].dtype == np.int64
    np.testing.assert_array_equal(written["model.layers.0.w"], exact["model.layers.0.w"].astype(np.float16))
    config = json.loads((out / "config.json").read_text())
    assert config["torch_dtype"] == config["text_config"]["dtype"] == "float16"


def test_wider_dtype_than_the_bases_keeps_what_its_own_would_round_away(tmp_path: Path) -> None:
    paths = []
    for seed in (0, 1, 2):
        room = folder(tmp_path / str(seed), seed, **{"config.json": "{}"})
        held = load_file(room / "model.safetensors")
        save_file({name: one.astype(np.float16) if one.dtype.kind == "f" else one for name, one in held.items()},
                  room / "model.safetensors")  # fmt: skip
        paths.append(room)
    base, *experts = paths
    merge("task_arithmetic", {"scale": 0.37}, base, experts, tmp_path / "out", dtype="float32")
    read = [load_file(one / "model.safetensors")["model.layers.0.w"].astype(np.float32) for one in paths]
    wanted = read[0] + np.float32(0.37) * ((read[1] - read[0]) + (read[2] - read[0]))
    np.testing.assert_allclose(
        load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.w"], wanted, rtol=1e-6
    )


@pytest.mark.parametrize("dtype", ["int8", "float8", ""])
def test_unknown_dtype_is_refused_with_the_names_there_are(inputs, tmp_path: Path, dtype: str) -> None:
    base, experts = inputs
    if dtype:
        with pytest.raises(CheckpointError, match="float32, float16, bfloat16"):
            merge("average", {}, base, experts, tmp_path / "out", dtype=dtype)


def test_number_that_the_dtype_cannot_hold_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    paths = []
    for seed in (0, 1):
        room = folder(tmp_path / str(seed), seed, **{"config.json": "{}"})
        save_file({"w": np.full((8, 8), 1e6 + seed, np.float32)}, room / "model.safetensors")
        paths.append(room)
    with pytest.raises(NonFiniteCheckpoint, match="F16 cannot hold"):
        merge("average", {}, paths[0], paths[1:], tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_shards_replace_the_single_file_and_their_index_counts_bytes(inputs, tmp_path: Path) -> None:
    base, experts = inputs
    out = tmp_path / "out"
    merge("average", {}, base, experts, out)
    merge("average", {}, base, experts, out, shard_bytes=400)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert not (out / "model.safetensors").exists() and index["metadata"]["total_size"] == 8 * 16 * 4 + 3 * 8
    assert Checkpoint.open(out).read("steps").tolist() == [0, 1, 2]


@pytest.mark.parametrize("other", ["consolidated", "model.fp16", "adapter_model", "diffusion_pytorch_model"])
def test_standard_name_is_preferred_where_a_folder_holds_several(tmp_path: Path, other: str) -> None:
    room = folder(tmp_path / "both", 0)
    save_file({"other": np.zeros(3, np.float32)}, room / f"{other}.safetensors")
    assert locate(room) == room / "model.safetensors"


def test_diffusers_component_keeps_its_name_of_weights(tmp_path: Path) -> None:
    config = json.dumps({"_class_name": "UNet2DModel", "_diffusers_version": "0.30"})
    rooms = [
        folder(tmp_path / f"unet{seed}", seed, "diffusion_pytorch_model", **{"config.json": config})
        for seed in (0, 1)
    ]
    merge("average", {}, rooms[0], rooms[1:], tmp_path / "out", dtype="bfloat16")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    assert (tmp_path / "out" / "config.json").read_text() == config


def test_tokenizer_is_taken_as_a_set_from_the_first_input_that_has_one(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", 0, **{"config.json": "{}"})
    first = folder(tmp_path / "first", 1, **{"tokenizer.json": "1", "vocab.json": "1"})
    second = folder(tmp_path / "second", 2, **{"tokenizer.json": "2", "merges.txt": "2"})
    merge("average", {}, base, [first, second], tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "tokenizer.json", "vocab.json", "model.safetensors"}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "1"


def test_link_out_of_a_models_directory_is_refused(inputs, tmp_path: Path) -> None:
    base, experts = inputs
    (tmp_path / "secret").write_text("key")
    (base / "tokenizer.json").unlink()
    (base / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="link to a file outside"):
        merge("average", {}, base, experts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_of_the_hugging_face_cache_are_followed(tmp_path: Path) -> None:
    blobs = tmp_path / "models--a--b" / "blobs"
    base = folder(tmp_path / "models--a--b" / "snapshots" / "rev", 0, **{"config.json": "{}"})
    blobs.mkdir()
    (blobs / "77").write_text("words")
    (base / "tokenizer.json").symlink_to("../../blobs/77")
    merge("average", {}, base, [folder(tmp_path / "e", 1)], tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "words"


def test_modules_of_sentence_transformers_are_copied_and_their_weights_said(inputs, tmp_path: Path) -> None:
    base, experts = inputs
    (base / "modules.json").write_text(
        '[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "../away"}]'
    )
    for part in ("1_Pooling", "2_Dense"):
        (base / part).mkdir()
        (base / part / "config.json").write_text("{}")
    (base / "2_Dense" / "model.safetensors").write_bytes(b"weights")
    report = merge("average", {}, base, experts, tmp_path / "out")
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()
    assert (tmp_path / "out" / "2_Dense" / "model.safetensors").read_bytes() == b"weights"
    assert any("2_Dense" in note and "not merged" in note for note in report.notes)


def test_folder_of_an_input_is_never_the_output(inputs) -> None:
    base, experts = inputs
    with pytest.raises(CheckpointError, match="directory of an input"):
        merge("average", {}, base, experts, base)


def test_folder_without_a_configuration_cannot_be_written(tmp_path: Path) -> None:
    rooms = [folder(tmp_path / str(seed), seed) for seed in (0, 1)]
    with pytest.raises(CheckpointError, match=r"name a \.safetensors file"):
        merge("average", {}, rooms[0], rooms[1:], tmp_path / "out")


def test_metadata_says_that_tensors_are_of_torch(inputs, tmp_path: Path) -> None:
    base, experts = inputs
    merge("average", {}, base, experts, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.metadata()["format"] == "pt"
