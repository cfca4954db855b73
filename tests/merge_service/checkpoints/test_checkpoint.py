"""Reading and writing checkpoints: the format as other libraries write it, and files that are damaged or malicious."""

import json
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from merge_service.checkpoints import (
    CONFIG_FILE,
    DTYPES,
    WEIGHTS_FILE,
    Checkpoint,
    CheckpointWriter,
    admit,
    check_finite,
    locate,
)
from merge_service.checkpoints.dtypes import decode, encode
from merge_service.errors import (
    CheckpointError,
    CorruptCheckpoint,
    IncompatibleCheckpoint,
    NonFiniteCheckpoint,
)
from tests.merge_service import toys


def raw_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: object = None, dtype: str = "F32") -> dict:
    return {
        "dtype": dtype,
        "shape": [(end - begin) // 4] if shape is None else shape,
        "data_offsets": [begin, end],
    }


def test_files_of_safetensors_are_read_and_written_to_the_byte(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    tensors = {
        "wide": torch.randn(5, 7, generator=generator),
        "brain": torch.randn(33, generator=generator).bfloat16(),
        "half": torch.tensor(3.5, dtype=torch.float16),
        "double": torch.randn(3, generator=generator, dtype=torch.float64),
        "ints": torch.arange(4),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 3),
    }
    save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    with Checkpoint.open(tmp_path / "theirs.safetensors") as theirs:
        for name, tensor in tensors.items():
            expected = tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
            np.testing.assert_array_equal(theirs.read(name), expected.numpy().ravel())
        layout = {name: (info.dtype, info.shape) for name, info in theirs.tensors.items()}
        with CheckpointWriter(tmp_path / "ours.safetensors", layout, theirs.metadata) as ours:
            for name in layout:
                ours.write(name, 0, theirs.read(name))
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_bfloat16_is_rounded_to_nearest_even_like_torch() -> None:
    torch = pytest.importorskip("torch")
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    values = np.concatenate(
        [bits.view(np.float32), toys.vector([0.0, -0.0, np.inf, -np.inf, 3.4e38, 1.0039062])]
    )
    finite = values[~np.isnan(values)]
    theirs = torch.from_numpy(finite).bfloat16()
    ours = encode(finite, DTYPES["BF16"])
    np.testing.assert_array_equal(ours, theirs.view(torch.uint16).numpy())
    np.testing.assert_array_equal(decode(ours, DTYPES["BF16"]), theirs.float().numpy())
    assert np.isnan(decode(encode(toys.vector([np.nan]), DTYPES["BF16"]), DTYPES["BF16"])).all()


def test_read_gives_any_range_without_copying_the_file(tmp_path: Path) -> None:
    path = toys.save(tmp_path / "a.safetensors", {"w": np.arange(10, dtype=np.float32).reshape(2, 5)})
    with Checkpoint.open(path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("w", 3, 6), [3, 4, 5])
        np.testing.assert_array_equal(checkpoint.read("w", 8, 99), [8, 9])
        assert checkpoint.read("w", 7, 7).size == 0
        assert not checkpoint.read("w").flags.writeable


def test_data_that_is_not_aligned_is_still_read(tmp_path: Path) -> None:
    header = {"flag": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "w": entry(1, 9)}
    path = raw_file(tmp_path / "a.safetensors", header, b"\x07" + toys.vector([1.5, -2]).tobytes())
    np.testing.assert_array_equal(toys.load(path)["w"], [1.5, -2])


@pytest.mark.fault("F16")
@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        ({"w": entry(0, 8)}, b"1234567", "the file is cut"),
        ({"w": entry(0, 8)}, b"123456789", "1 bytes follow the last tensor"),
        ({"w": entry(0, 8), "v": entry(4, 12)}, bytes(12), "overlaps another"),
        ({"w": entry(0, 8), "v": entry(12, 16)}, bytes(16), "leaves a gap"),
        ({"w": entry(0, 8, [3])}, bytes(8), "12 bytes is given 8"),
        ({"w": entry(0, 8, [-2])}, bytes(8), "impossible shape"),
        ({"w": entry(0, 8, [2.0])}, bytes(8), "impossible shape"),
        ({"w": entry(0, 8, [True, 2])}, bytes(8), "impossible shape"),
        ({"w": entry(0, 8, "2")}, bytes(8), "impossible shape"),
        ({"w": entry(0, 8, [2**62, 2**62])}, bytes(8), "is given 8"),
        ({"w": entry(8, 0, [])}, bytes(8), "is given -8"),
        ({"w": entry(0, 8, dtype="F9")}, bytes(8), "unknown dtype 'F9'"),
        ({"w": {"dtype": "F32", "shape": [2]}}, bytes(8), "lacks dtype, shape or data_offsets"),
        ({"w": [1]}, bytes(8), "lacks dtype, shape or data_offsets"),
        ({"__metadata__": {"a": 1}}, b"", "not a map of strings"),
        ([1, 2], b"", "not a JSON object"),
        (b'{"w": 1, "w": 2}', b"", "'w' appears twice"),
        (b"{" * 5000, b"", "not valid JSON"),
        (b'{"w": ' + b"[" * 5000 + b"]" * 5000 + b"}", b"", "not a usable checkpoint"),
        (b"\xff\xfe", b"", "not a JSON object"),
        (b"{\xff\xfe", b"", "not valid JSON"),
    ],
)
def test_a_damaged_header_is_refused_by_name(tmp_path: Path, header: object, data: bytes, says: str) -> None:
    path = raw_file(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CorruptCheckpoint, match=says) as caught:
        Checkpoint.open(path)
    assert str(path) in str(caught.value)


@pytest.mark.fault("F16")
@pytest.mark.parametrize("length", [2**62, 101 * 2**20, 9])
def test_a_header_length_that_lies_is_refused_before_it_is_believed(tmp_path: Path, length: int) -> None:
    path = raw_file(tmp_path / "bomb.safetensors", b"{}", length=length)
    with pytest.raises(CorruptCheckpoint, match="header claims"):
        Checkpoint.open(path)
    with path.open("r+b") as file:
        file.truncate(102 * 2**20)  # sparse: now a long header would be there to read
    with pytest.raises(CorruptCheckpoint):
        Checkpoint.open(path)


@pytest.mark.fault("F16")
def test_a_header_of_half_a_million_tensors_costs_neither_time_nor_memory(tmp_path: Path) -> None:
    many = (
        b"{"
        + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(500_000))
        + b"}"
    )
    path = raw_file(tmp_path / "many.safetensors", many)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    with pytest.raises(CorruptCheckpoint, match="values, above the limit"):
        Checkpoint.open(path)
    assert time.thread_time() - began < 0.2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_a_model_of_as_many_tensors_as_the_largest_mixtures_of_experts_is_read(tmp_path: Path) -> None:
    where = "model.layers.{}.mlp.experts.{}.gate_proj.weight"
    entries = b",".join(
        b'"%s":{"dtype":"BF16","shape":[0,0],"data_offsets":[0,0]}' % where.format(n // 256, n).encode()
        for n in range(45_000)
    )
    path = raw_file(tmp_path / "many.safetensors", b"{" + entries + b"}")
    index = tmp_path / "model.safetensors.index.json"
    with Checkpoint.open(path) as one:
        assert len(one.tensors) == 45_000
        index.write_text(json.dumps({"weight_map": dict.fromkeys(one.tensors, path.name)}))
    assert index.stat().st_size > 2**21
    with Checkpoint.open(index) as whole:
        assert len(whole.tensors) == 45_000


def test_open_checkpoints_hold_no_files(tmp_path: Path) -> None:
    path = toys.save(tmp_path / "a.safetensors", {"w": toys.vector([1, 2])})
    handles = Path("/proc/self/fd")
    before = len(list(handles.iterdir()))
    opened = [Checkpoint.open(path) for _ in range(50)]
    assert len(list(handles.iterdir())) == before
    (tmp_path / "a.safetensors").unlink()
    view = opened[0].raw("w")
    for one in opened:
        one.close()
    del opened
    np.testing.assert_array_equal(view, [1, 2])  # an array that was read stays valid


@pytest.mark.fault("F15")
def test_any_cut_of_a_file_is_noticed(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    record_property("cases", 69)
    whole = toys.save(tmp_path / "a.safetensors", toys.towers(np.random.default_rng(0))).read_bytes()
    chance = random.Random(0)
    for length in [0, 1, 7, 8, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(64))]:
        (tmp_path / "cut.safetensors").write_bytes(whole[:length])
        with pytest.raises(CorruptCheckpoint):
            Checkpoint.open(tmp_path / "cut.safetensors")


def test_sharded_checkpoint_reads_like_the_whole(tmp_path: Path) -> None:
    model = toys.towers(np.random.default_rng(0))
    names = list(model)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, held in shards.items():
        toys.save(tmp_path / file, {name: model[name] for name in held})
    where = {name: file for file, held in shards.items() for name in held}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": {name: where[name] for name in names}})
    )
    for path in (index, tmp_path):
        result = toys.load(path)
        assert list(result) == names
        for name in names:
            np.testing.assert_array_equal(result[name], model[name])


@pytest.mark.fault("F15")
@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({"weight_map": {"w": "../other.safetensors"}}, "outside its own directory"),
        ({"weight_map": {"w": "/etc/passwd"}}, "outside its own directory"),
        ({"weight_map": {"w": "gone.safetensors"}}, "gone.safetensors', which is not there"),
        ({"weight_map": {"w": "a.safetensors"}}, "disagree about tensor"),
        ({"weight_map": {"v": "a.safetensors", "x": "a.safetensors"}}, "disagree about tensor"),
        ({"weight_map": {}}, "no weight_map"),
        ({}, "no weight_map"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, index: dict, says: str) -> None:
    toys.save(tmp_path / "a.safetensors", {"v": toys.vector([1])})
    (tmp_path / "x.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=says):
        Checkpoint.open(tmp_path)


def test_locate_names_what_it_cannot_choose_between(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        locate(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds none"):
        locate(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        toys.save(tmp_path / name, {"v": toys.vector([1])})
    with pytest.raises(CheckpointError, match=r"holds 2 of them \(a.safetensors, b.safetensors\)"):
        locate(tmp_path)
    toys.save(tmp_path / WEIGHTS_FILE, {"v": toys.vector([1])})
    (tmp_path / CONFIG_FILE).write_text("{}")
    assert locate(tmp_path) == tmp_path / WEIGHTS_FILE


def test_writer_leaves_the_old_file_and_no_rubbish_when_interrupted(tmp_path: Path) -> None:
    path = toys.save(tmp_path / "a.safetensors", {"w": toys.vector([1, 2])})
    before = path.read_bytes()
    with pytest.raises(RuntimeError), CheckpointWriter(path, {"w": ("F32", (2,))}) as writer:
        writer.write("w", 0, toys.vector([3, 4]))
        raise RuntimeError
    with (
        pytest.raises(AssertionError, match="not every block"),
        CheckpointWriter(path, {"w": ("F32", (2,))}) as writer,
    ):
        writer.write("w", 0, toys.vector([3]))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_writer_says_where_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        CheckpointError, match=r"cannot write .*file/a.safetensors: .*choose a writable place"
    ):
        CheckpointWriter(tmp_path / "file" / "a.safetensors", {})
    with pytest.raises(CheckpointError, match="it is a directory"):
        CheckpointWriter(tmp_path, {})


@pytest.mark.fault("F18")
def test_admit_lists_at_most_ten_differences_with_the_expert(tmp_path: Path) -> None:
    model = {f"w{i}": toys.vector([i]) for i in range(14)}
    reference = toys.save(tmp_path / "a.safetensors", model)
    other = {name: value for name, value in model.items() if name not in ("w0", "w1")}
    other |= {"new": toys.vector([1]), "w2": toys.vector([[1, 2]]), "w3": np.array([3], np.int64)}
    other |= {f"w{i}": toys.vector([1, 2]) for i in range(4, 14)}
    candidate = toys.save(tmp_path / "b.safetensors", other)
    with Checkpoint.open(reference) as one, Checkpoint.open(candidate) as two:
        with pytest.raises(IncompatibleCheckpoint) as caught:
            admit(one, two, "photos (t=3)")
        admit(one, one, "itself")
    text = str(caught.value)
    assert (
        text.startswith("photos (t=3) ")
        and "w0 is missing; w1 is missing; new is not in the reference" in text
    )
    assert (
        "w2 has shape [1, 2], not [1]; w3 is I64, not F32" in text
        and text.count(";") == 10
        and "and 5 more" in text
    )


def test_admit_lets_float_formats_differ(tmp_path: Path) -> None:
    one = toys.save(tmp_path / "a.safetensors", {"w": toys.vector([1])})
    two = toys.save(tmp_path / "b.safetensors", {"w": toys.vector([1])}, dtypes={"w": "BF16"})
    with Checkpoint.open(one) as reference, Checkpoint.open(two) as candidate:
        admit(reference, candidate, "half")


@pytest.mark.fault("F17")
def test_check_finite_counts_per_tensor(tmp_path: Path) -> None:
    values = toys.vector([1, np.nan, np.inf, 3e38, 3e38, -np.inf])
    path = toys.save(tmp_path / "a.safetensors", {"fine": toys.vector([3e38, 3e38]), "w": values})
    with Checkpoint.open(path) as checkpoint, pytest.raises(NonFiniteCheckpoint) as caught:
        check_finite(checkpoint, "photos (t=3)")
    assert "photos (t=3)" in str(caught.value) and "w has 3 of 6 values" in str(caught.value)
    assert "fine" not in str(caught.value)
