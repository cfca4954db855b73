"""Inputs of a merge: adapted if only the form differs, refused by name if the numbers cannot be merged, named by content."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from merge_service.checkpoints import Checkpoint, locate, sha256_of
from merge_service.engine import Part, PartWorker, Split
from merge_service.errors import (
    AdapterCheckpoint,
    CheckpointError,
    ForeignCheckpoint,
    IncompatibleCheckpoint,
    QuantisedCheckpoint,
    TechniqueError,
)
from merge_service.merge import merge
from merge_service.merging import Rules
from merge_service.merging.geometry import geometry
from merge_service.similarity import similarity
from tests.merge_service import toys
from tests.merge_service.toys import Files

Tensors = dict[str, np.ndarray]


def here(parts: Sequence[Part]) -> contextlib.AbstractContextManager[Any]:
    """Parts of a merge, made by objects of this process."""
    workers = [PartWorker(part) for part in parts]
    return contextlib.nullcontext(lambda method, *given: [getattr(one, method)(*given) for one in workers])


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


FOREIGN: dict[str, tuple[str, bytes, str]] = {
    "zip of torch": ("a.safetensors", b"PK\x03\x04" + bytes(600), "pickle of torch.*temporal-merge convert"),
    "zip of NumPy": ("a.npz", b"PK\x03\x04" + bytes(22) + b"\x05\x00\x14\x00w.npy" + bytes(600), "a file of NumPy arrays"),
    "old pickle": ("a.safetensors", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P" + bytes(600), "pickle of torch"),
    "by its name": ("a.ckpt", b"anything at all", "by its name a pickle of torch"),
    "pointer": ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    "GGUF": ("a.gguf", b"GGUF\x03\x00\x00\x00" + bytes(20), "GGUF"),
    "HDF5": ("a.h5", b"\x89HDF\r\n\x1a\n" + bytes(20), "HDF5"),
    "page": ("a.safetensors", b"<!DOCTYPE html><html>", "HTML page"),
    "study": ("a.yaml", b"name: demo\nmodel: {}\n", "YAML file, such as a study.*temporal-merge run"),
    "index of pickles": ("pytorch_model.bin.index.json", b'{"weight_map": {"w": "a.bin"}}', "index of pickled shards"),
}  # fmt: skip


def test_path_that_is_no_file_is_called_what_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("gone")
    for name, says in {
        "pipe": "pipe is neither a file nor a directory",
        "link": "link is a link to gone, which does not exist",
        "nowhere": "nowhere does not exist",
    }.items():
        with pytest.raises(CheckpointError, match=says):
            locate(tmp_path / name)


@pytest.mark.parametrize("case", FOREIGN)
def test_file_that_is_no_safetensors_is_called_what_it_is(case: str, tmp_path: Path) -> None:
    name, content, says = FOREIGN[case]
    (tmp_path / name).write_bytes(content)
    for look in (Checkpoint.open, locate, sha256_of):
        with pytest.raises(ForeignCheckpoint, match=says) as caught:
            look(tmp_path / name)  # type: ignore[operator]
        assert str(tmp_path / name) in str(caught.value)


def test_directory_of_pickled_weights_names_them(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(ForeignCheckpoint, match=r"pytorch_model-00001-of-00002\.bin.*pickle"):
        locate(tmp_path)


def test_directory_of_a_run_is_no_checkpoint_and_leads_to_those_in_it(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ForeignCheckpoint, match=r"directory of a run.*store"):
        locate(tmp_path)


@pytest.mark.parametrize("length", [0x0280, 0x0480])
def test_header_whose_length_begins_like_a_pickle_is_a_header(length: int, tmp_path: Path) -> None:
    text = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(length)
    (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + text + bytes(4))
    with Checkpoint.open(tmp_path / "a.safetensors") as opened:
        assert opened.read("w").tolist() == [0]


def codes(shape: tuple[int, ...] = (4, 8), dtype: str = "int8") -> np.ndarray:
    return np.arange(np.prod(shape)).astype(dtype).reshape(shape)


QUANTISED: dict[str, tuple[Tensors, dict[str, str]]] = {
    "int8 beside a scale": ({"w": codes(), "w_scale": toys.vector([1])}, {"w": "I8"}),
    "module's scale": ({"l.weight": codes(), "l.weight_scale": toys.vector([1])}, {"l.weight": "I8"}),
    "GPTQ": ({"l.qweight": codes(dtype="int64"), "l.scales": toys.vector([1])}, {}),
    "bitsandbytes": ({"l.weight": codes(dtype="int8"), "l.weight.absmax": toys.vector([1])}, {"l.weight": "U8"}),
    "LLM.int8": ({"l.weight": codes(), "l.SCB": toys.vector([1])}, {"l.weight": "I8"}),
    "blocks of fp8": ({"l.weight": codes(dtype="uint8"), "l.weight_scale_inv": toys.vector([1])}, {"l.weight": "F8_E4M3"}),
}  # fmt: skip


def stored(path: Path, tensors: Tensors, dtypes: dict[str, str]) -> Path:
    """As `toys.save`, with bytes under any dtype of one byte."""
    from merge_service.checkpoints import CheckpointWriter

    layout = {n: (dtypes.get(n, toys.DTYPE.get(v.dtype, "I8")), v.shape) for n, v in tensors.items()}
    with CheckpointWriter(path, layout) as writer:
        for name, value in tensors.items():
            writer.write_stored(name, 0, value.reshape(-1).view(writer.storage(name)))
    return path


@pytest.mark.parametrize("case", QUANTISED)
def test_quantised_weights_are_refused_with_the_way_on(case: str, tmp_path: Path) -> None:
    path = stored(tmp_path / "a.safetensors", *QUANTISED[case])
    with pytest.raises(QuantisedCheckpoint, match=r"a\.safetensors.*is quantised: .*dequantise it first"):
        merge("average", {}, None, [path], tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()


def test_quantisation_that_only_the_config_beside_it_tells_is_refused(files: Files) -> None:
    (files.room / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(QuantisedCheckpoint, match=r"quantization_config \(gptq\)"):
        files.merge("average")
    (files.room / "config.json").write_text('{"model_type": "clip"}')
    files.merge("average")


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32])
def test_bytes_or_words_in_a_matrix_that_differ_are_codes_whatever_they_are_called(
    dtype: type, tmp_path: Path
) -> None:
    kind = {np.int8: "I8", np.int16: "I16", np.int32: "I32"}[dtype]
    paths = [
        stored(
            tmp_path / f"{i}.safetensors",
            {"w": codes().astype(dtype) + dtype(i), "b": toys.vector([i])},
            {"w": kind},
        )
        for i in range(2)
    ]
    with pytest.raises(QuantisedCheckpoint, match="the integers of w differ"):
        merge("average", {}, paths[0], paths[1:], tmp_path / "m.safetensors")


def test_counters_and_positions_are_no_codes_and_the_base_s_are_kept(tmp_path: Path) -> None:
    model = {
        "bn.num_batches_tracked": np.array(7),
        "embeddings.position_ids": np.arange(4)[None],
        "relative_position_index": np.arange(9).reshape(3, 3),
        "w": toys.vector([1, 2]),
        "w_scale": toys.vector([1]),
    }
    base = toys.save(tmp_path / "base.safetensors", model)
    expert = toys.save(tmp_path / "e.safetensors", model | {"bn.num_batches_tracked": np.array(9)})
    report = merge("average", {}, base, [expert], tmp_path / "m.safetensors")
    assert report.notes == () and toys.load(tmp_path / "m.safetensors")["bn.num_batches_tracked"] == 7


def test_integers_that_differ_and_are_no_codes_are_mentioned(files: Files) -> None:
    toys.save(files.paths[1], files.experts[1] | {"position_ids": np.arange(6)[::-1].copy()})
    report = merge("average", {}, files.start, files.paths, files.out)
    assert ["the integers of position_ids differ" in note for note in report.notes] == [True]


@pytest.mark.parametrize(
    "factor",
    [
        "lora_A.weight",
        "lora_B.default.weight",
        "lora_embedding_A",
        "hada_w1_a",
        "lora_down.weight",
        "to_q_lora.down.weight",
        "oft_blocks",
    ],
)
def test_adapters_are_refused_with_the_way_on(factor: str, tmp_path: Path) -> None:
    path = toys.save(
        tmp_path / "adapter.safetensors", {f"base_model.model.l.{factor}": toys.vector([[1, 2]])}
    )
    with pytest.raises(AdapterCheckpoint, match=r"adapter.*BASE\+.*adapter\.safetensors"):
        merge("average", {}, None, [path], tmp_path / "m.safetensors")


def wrapped(files: Files, change: Callable[[Tensors], Tensors], number: int = 1) -> Path:
    return toys.save(files.paths[number], change(files.experts[number]))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.clip."])
@pytest.mark.parametrize("technique", ["dare_ties", "opcm"])
def test_a_prefix_that_all_names_of_one_file_have_is_read_away_and_said(
    prefix: str, technique: str, files: Files
) -> None:
    expected = files.merge(technique, ids=["a", "b"])
    wrapped(files, lambda model: {prefix + name: value for name, value in model.items()})
    report = merge(technique, {}, files.start, files.paths, files.out, ids=["a", "b"])
    assert f"b: its tensor names were read without their prefix {prefix!r}" in report.notes
    for name, value in toys.load(files.out).items():
        np.testing.assert_array_equal(value, expected[name])


def test_a_prefix_of_the_base_alone_is_given_to_the_others(files: Files) -> None:
    toys.save(files.start, {f"module.{name}": value for name, value in files.base.items()})
    report = merge("average", {}, files.start, files.paths, files.out)
    assert set(toys.load(files.out)) == {f"module.{name}" for name in files.base} and len(report.notes) == 2


def test_a_prefix_is_no_other_architecture_s_excuse(files: Files) -> None:
    wrapped(files, lambda model: {f"module.{n}": v for n, v in model.items() if n != "text_projection"})
    with pytest.raises(IncompatibleCheckpoint, match=r"--strip-prefix module\."):
        merge("average", {}, files.start, files.paths, files.out)
    with pytest.raises(IncompatibleCheckpoint, match="text_projection is missing"):
        merge("average", {}, files.start, files.paths, files.out, rules=Rules(strip_prefix="module."))


def test_prefix_to_be_stripped_that_nobody_has_or_that_makes_two_names_one_is_refused(files: Files) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor name begins with the prefix 'modul\.'"):
        merge("average", {}, files.start, files.paths, files.out, rules=Rules(strip_prefix="modul."))
    with pytest.raises(CheckpointError, match=r"holds '.*' with the prefix 'visual\.' and without"):
        merge("average", {}, files.start, files.paths, files.out, rules=Rules(strip_prefix="visual."))


def test_workers_read_names_without_the_prefix_too(files: Files) -> None:
    expected = files.merge("ties")
    wrapped(files, lambda model: {f"module.{name}": value for name, value in model.items()})

    merge("ties", {}, files.start, files.paths, files.out, split=Split(2, here))
    for name, value in toys.load(files.out).items():
        np.testing.assert_array_equal(value, expected[name])


def test_one_number_has_one_shape(files: Files) -> None:
    expected = files.merge("task_arithmetic")
    wrapped(files, lambda model: {**model, "logit_scale": model["logit_scale"].reshape(1)})
    result = files.merge("task_arithmetic")
    assert result["logit_scale"].shape == () and result["logit_scale"] == expected["logit_scale"]


@pytest.mark.parametrize("where", ["base", "expert", "first of no base"])
def test_positions_that_one_file_saves_and_another_does_not_are_no_difference(
    where: str, files: Files
) -> None:
    lacking = {name: value for name, value in files.experts[1].items() if name != "position_ids"}
    toys.save(files.paths[1], lacking)
    if where == "base":
        toys.save(files.start, {name: v for name, v in files.base.items() if name != "position_ids"})
    base = None if where == "first of no base" else files.start
    report = merge("average", {}, base, files.paths, files.out)
    assert any("position_ids" in note and "computed by the library" in note for note in report.notes)
    assert ("position_ids" in toys.load(files.out)) == (where != "base")


def test_positions_that_are_not_0_1_2_are_a_difference(files: Files) -> None:
    toys.save(files.paths[1], files.experts[1] | {"other.position_ids": np.arange(6)[::-1].copy()})
    with pytest.raises(IncompatibleCheckpoint, match=r"other\.position_ids is not in the reference"):
        merge("average", {}, files.start, files.paths, files.out)


CAUSAL = np.tril(np.ones((1, 1, 300, 300), np.float32))
BUFFERS = {
    "h.0.attn.bias": CAUSAL,
    "h.0.attn.masked_bias": toys.vector(-1e4),
    "h.0.rotary_emb.inv_freq": 10000.0 ** -np.linspace(0, 0.9, 8, dtype=np.float32),
    "embeddings.token_type_ids": np.zeros((1, 9), np.int64),
    "attn_mask": np.where(CAUSAL[0, 0, :9, :9] == 1, 0, -np.inf).astype(np.float32),
}
"""As GPT-2, GPT-NeoX, Llama, BERT and CLIP were once saved with them and are no more."""


@pytest.mark.parametrize("where", ["base", "expert", "all", "other form"])
def test_buffers_that_libraries_compute_are_no_difference_and_the_base_s_are_kept(
    where: str, files: Files
) -> None:
    expected, other = files.merge("ties"), {**BUFFERS, "h.0.attn.bias": CAUSAL[..., :9, :9] == 1}
    if where != "expert":
        toys.save(files.start, files.base | BUFFERS)
    for number, path in enumerate(files.paths):
        if where == "all" or (where != "base" and number == 0):
            toys.save(path, files.experts[number] | (other if where == "other form" else BUFFERS))
    for workers in (None, 2):
        report = merge(
            "ties", {}, files.start, files.paths, files.out, split=workers and Split(workers, here)
        )
        found = toys.load(files.out)
        assert {name: found.pop(name).tobytes() for name in BUFFERS if where != "expert"} == {
            name: value.tobytes() for name, value in BUFFERS.items() if where != "expert"
        }
        assert {n: v.tobytes() for n, v in found.items()} == {n: v.tobytes() for n, v in expected.items()}
    assert where == "all" or any("computed by the library" in note for note in report.notes)
    similarity(files.start, {path.stem: path for path in files.paths})
    geometry(files.start, files.out, files.paths[0])


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("h.0.attn.bias", CAUSAL * 0.5),
        ("h.0.attn.bias", np.ones((1, 1, 9, 9), np.float32)),
        ("h.0.attn.inv_freq", np.arange(1, 9, dtype=np.float32)),
        ("token_type_ids", np.arange(4)),
        ("attn_mask", toys.vector([0.0, -100.0, 3.0])),
        ("h.0.attn.masked_bias", toys.vector(0.3)),
        ("h.0.bias", np.ones(9, np.float32)),
    ],
)
def test_what_only_has_the_name_of_a_buffer_is_a_difference(
    name: str, trained: np.ndarray, files: Files
) -> None:
    toys.save(files.paths[1], files.experts[1] | {name: trained})
    with pytest.raises(IncompatibleCheckpoint, match=f"{name} is not in the reference"):
        merge("average", {}, files.start, files.paths, files.out)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda name, value: (name.replace("mlp.", "_checkpoint_wrapped_module.mlp."), value), "_checkpoint_wrapped_module.', ''"),
        (lambda name, value: (name, np.concatenate([value, value[:1]]) if name.startswith("token_embedding") else value), "vocabularies have 3 and 4 entries.*resize_token_embeddings"),
    ],
)  # fmt: skip
def test_a_difference_of_a_known_kind_comes_with_the_way_on(
    change: Callable[[str, np.ndarray], tuple[str, np.ndarray]], says: str, files: Files
) -> None:
    wrapped(files, lambda model: dict(change(name, value) for name, value in model.items()))
    with pytest.raises(IncompatibleCheckpoint, match=says):
        merge("average", {}, files.start, files.paths, files.out)


def test_shards_without_their_index_and_pipelines_are_called_so(files: Files, tmp_path: Path) -> None:
    names = list(files.base)
    shard = toys.save(
        tmp_path / "s" / "model-00001-of-00002.safetensors", {n: files.base[n] for n in names[::2]}
    )
    with pytest.raises(ForeignCheckpoint, match=r"holds shards \(model-00001-of-00002.*not their index"):
        locate(shard.parent)
    with pytest.raises(IncompatibleCheckpoint, match="one of several shards: give their index"):
        merge("average", {}, files.start, [shard], files.out)
    toys.save(tmp_path / "p" / "unet" / "diffusion_pytorch_model.safetensors", files.base)
    (tmp_path / "p" / "model_index.json").write_text("{}")
    with pytest.raises(ForeignCheckpoint, match=f"pipeline of several models.*{tmp_path / 'p' / 'unet'}"):
        locate(tmp_path / "p")


# What names an expert.


def test_random_masks_depend_on_content_and_on_no_order_name_or_folder(files: Files, tmp_path: Path) -> None:
    expected = files.merge("dare", {"density": 0.5})
    moved = [
        toys.save(tmp_path / "x" / n, e, {"k": n})
        for n, e in zip(("z.safetensors", "a.safetensors"), files.experts)
    ]
    merge("dare", {"density": 0.5}, files.start, moved[::-1], files.out)
    for name, value in toys.load(files.out).items():
        np.testing.assert_array_equal(value, expected[name])
    again = files.merge("dare", {"density": 0.5}, ids=["a", None])
    assert any(not np.array_equal(value, expected[name]) for name, value in again.items())


def test_shards_and_one_file_of_the_same_tensors_have_one_name(files: Files) -> None:
    cut = merge(
        "average", {}, None, files.paths[:1], files.room / "cut" / "m.safetensors", shard_bytes=80
    ).out
    whole = merge("average", {}, None, files.paths[:1], files.room / "whole.safetensors")
    assert cut is not None and whole.out is not None
    with Checkpoint.open(cut) as a, Checkpoint.open(whole.out) as b:
        (one, first), (other, second) = a.digests(), b.digests()
    assert one == other and (first, second) == (sha256_of(cut), sha256_of(whole.out))


def test_output_names_every_input_the_base_the_parameters_and_the_versions(files: Files) -> None:
    report = merge("ties", {"density": 0.5}, files.start, files.paths, files.out, ids=["animals", None])
    made = toys.made(files.out)
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files.paths]
    assert [entry["file"] for entry in made["inputs"]] == ["e0.safetensors", "e1.safetensors"]
    assert [entry["sha256"] for entry in made["inputs"]] == hashes and made["inputs"] == list(report.inputs)
    assert made["inputs"][0]["id"] == "animals" and len(made["inputs"][1]["id"]) == 12
    assert made["base"] == {"file": "base.safetensors", "sha256": sha256_of(files.start)}
    assert made["params"]["density"] == 0.5 and set(made["versions"]) == {"numpy", "temporal-merge"}
    ordered = merge("opcm", {}, files.start, files.paths, files.out)
    assert toys.made(files.out)["inputs"] == list(ordered.inputs) and "base" in toys.made(files.out)


def test_inputs_of_one_file_name_are_told_apart_by_their_directories(files: Files, tmp_path: Path) -> None:
    paths = [
        toys.save(tmp_path / who / "model.safetensors", model) for who, model in zip("ab", files.experts)
    ]
    toys.save(paths[1], {f"module.{name}": value for name, value in files.experts[1].items()})
    report = merge("average", {}, files.start, [path.parent for path in paths], files.out)
    assert report.notes == ("b/model.safetensors: its tensor names were read without their prefix 'module.'",)


def test_an_expert_given_twice_counts_twice_and_is_mentioned(files: Files) -> None:
    report = merge("average", {}, files.start, [files.paths[0], files.paths[0]], files.out)
    (note,) = report.notes
    assert "hold the same tensors; both count" in note
    first, second = (entry["id"] for entry in report.inputs)
    assert second == f"{first}-2"
    with pytest.raises(TechniqueError, match="'a' is given twice"):
        merge("average", {}, files.start, files.paths, files.out, ids=["a", "a"])


# Numbers of eight bits.


def test_eight_bit_floats_are_read_exactly_and_merged_in_float32(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    rng = torch.Generator().manual_seed(0)
    base = torch.randn(16, 16, generator=rng)
    experts = [base + 0.1 * torch.randn(16, 16, generator=rng) for _ in range(2)]
    kinds = (torch.float8_e4m3fn, torch.float8_e5m2)
    save_file({"w": base}, tmp_path / "base.safetensors")
    for number, (expert, kind) in enumerate(zip(experts, kinds)):
        save_file({"w": expert.to(kind)}, tmp_path / f"{number}.safetensors")
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for options in ({}, {"device": "cpu"}):
        merge("average", {}, tmp_path / "base.safetensors", paths, tmp_path / "m.safetensors", **options)  # type: ignore[arg-type]
        mean = (experts[0].to(kinds[0]).float() + experts[1].to(kinds[1]).float()) / 2
        np.testing.assert_allclose(toys.load(tmp_path / "m.safetensors")["w"], mean.numpy(), atol=1e-6)
    merge("average", {}, None, paths, tmp_path / "m.safetensors")
    with Checkpoint.open(tmp_path / "m.safetensors") as merged:
        assert merged.tensors["w"].dtype == "F8_E4M3"
        np.testing.assert_array_equal(merged.raw("w"), mean.to(kinds[0]).view(torch.uint8).numpy().ravel())


@pytest.mark.parametrize(("dtype", "what"), [("F4", "MX"), ("F8_E8M0", "MX"), ("C64", "complex")])
def test_dtypes_that_are_no_numbers_of_their_own_are_named(dtype: str, what: str, tmp_path: Path) -> None:
    text = json.dumps({"w": {"dtype": dtype, "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(QuantisedCheckpoint, match=f"{what}.*'w' is {dtype}"):
        Checkpoint.open(tmp_path / "a.safetensors")
