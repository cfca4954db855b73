"""Checkpoints that are damaged, have wrong headers or hold no numbers: detected on reading, by name, and never merged."""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_service.checkpoints import WEIGHTS_FILE, Checkpoint, CheckpointWriter, admit, check_finite
from merge_service.errors import CheckpointError, CorruptCheckpoint, ForeignCheckpoint
from pipeline.errors import CorruptArtifact
from pipeline.store.local import Store
from tests.faults.corpus_files import checkpoints
from tests.faults.fuzz import seeded
from tests.faults.limits import cost_of
from tests.merge_service import toys
from tests.pipeline.store_toys import ToyStep, put

SEEDED = seeded(300)
pytestmark = pytest.mark.usefixtures("no_disk_sync")
Record = Callable[[str, object], None]


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return toys.save(tmp_path / "whole.safetensors", toys.towers(np.random.default_rng(0)))


def admitted(base: Path, candidate: Path) -> None:
    """All checks that an expert must pass before it is merged."""
    with Checkpoint.open(base) as one, Checkpoint.open(candidate) as two:
        admit(one, two, "photos (t=3)")
        check_finite(two, "photos (t=3)")


def packed(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


# --- F15: every byte counts ----------------------------------------------------------------------------------------------


@pytest.mark.fault("F15")
@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_expert_damaged_in_the_store_at_64_places_is_never_merged_and_can_be_made_again(
    how: str, whole: Path, tmp_path: Path, record_property: Record
) -> None:
    chance, data = np.random.default_rng(4), whole.read_bytes()
    store, slowest, told_by_the_format = Store(tmp_path / "store"), 0.0, 0
    store.prepare()
    first = put(store, content={WEIGHTS_FILE: data})
    merge = ToyStep("merge", inputs={"t1": first.fingerprint})
    for place in chance.choice(len(data), 64, replace=False):
        damaged = bytearray(data[:place] if how == "cut" else data)
        if how == "flipped":
            damaged[place] ^= 1 << int(chance.integers(8))
        (first.path / WEIGHTS_FILE).write_bytes(damaged)
        began = time.perf_counter()
        with contextlib.suppress(CheckpointError):
            admitted(whole, first.path / WEIGHTS_FILE)
            told_by_the_format -= 1
        told_by_the_format += 1
        with pytest.raises(CorruptArtifact, match=WEIGHTS_FILE):
            store.open_inputs(merge)
        slowest = max(slowest, time.perf_counter() - began)
        assert store.find(first.fingerprint) is None
        assert put(store, content={WEIGHTS_FILE: data}).files == first.files
    assert store.verify() == [] and len(list((store.root / ".corrupt").iterdir())) == 64
    assert (told_by_the_format == 64) == (how == "cut"), "a flipped number only the sha256 can tell"
    assert slowest < 5
    record_property("cases", 64)
    record_property("slowest checkpoint", f"{slowest:.3f} s")


@pytest.mark.fault("F15")
def test_sharded_checkpoint_with_any_part_damaged_is_refused(tmp_path: Path) -> None:
    model = toys.towers(np.random.default_rng(0))
    names = list(model)
    for number, held in enumerate((names[::2], names[1::2])):
        toys.save(tmp_path / f"m-{number}.safetensors", {name: model[name] for name in held})
    where = {name: f"m-{index % 2}.safetensors" for index, name in enumerate(names)}
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    chance = np.random.default_rng(5)
    for part in (*sorted(tmp_path.glob("m-*")), index):
        data = part.read_bytes()
        for length in (0, 1, len(data) - 1, *chance.integers(len(data), size=8)):
            part.write_bytes(data[:length])
            with pytest.raises(CheckpointError, match=r"m[-.]"):
                Checkpoint.open(tmp_path)
        part.write_bytes(data)
    Checkpoint.open(tmp_path).close()


# --- F16: headers --------------------------------------------------------------------------------------------------------

numbers = st.one_of(
    st.integers(-2, 70), st.sampled_from([2**31, 2**62, 2**63, 2**64, 10**4000, -(10**4000), 1.5, True])
)
entries = st.one_of(
    st.none(), numbers, st.text(max_size=3), st.lists(numbers, max_size=3),
    st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "", "f32", 3, None, [], "F" * 900]),
            "shape": st.lists(numbers, max_size=5) | numbers | st.just([1] * 100) | st.builds(lambda: [10**4000] * 64) | st.none(),
            "data_offsets": st.lists(numbers, max_size=3) | st.none() | st.just("ab") | st.just({"0": 1, "1": 2}),
            "more": st.text(max_size=2),
        },
    ),
)  # fmt: skip
names = st.one_of(
    st.text(max_size=6),
    st.sampled_from(["w", "__metadata__", "", "\ud800", "\0", "\x1b[31m", "n" * 1000, "../x"]),
)
headers = st.one_of(
    st.dictionaries(names, entries, max_size=5),
    st.recursive(entries, lambda inner: st.lists(inner, max_size=3), max_leaves=4),
)
texts = st.one_of(
    headers.map(lambda header: json.dumps(header).encode()),
    st.binary(max_size=60),
    st.sampled_from(
        [b"{" * 3000, b"[" * 3000, b'{"w":NaN}', b'{"w":' + b"9" * 5000 + b"}", b"\xef\xbb\xbf{}", b"{}\0"]
    ),
)


@pytest.mark.fault("F16")
def test_header_of_any_making_is_refused_or_says_what_the_file_holds(
    tmp_path: Path, record_property: Record
) -> None:
    path, seen, opened = tmp_path / "w.safetensors", [], []

    @SEEDED
    @given(text=texts, data=st.binary(max_size=72), length=st.none() | st.integers(0, 2**64 - 1))
    def check(text: bytes, data: bytes, length: int | None) -> None:
        path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
        began = time.perf_counter()
        try:
            with Checkpoint.open(path) as checkpoint:
                held = sum(
                    checkpoint.read(name).nbytes >= 0 and info.nbytes
                    for name, info in checkpoint.tensors.items()
                )
                assert held == len(data)
                opened.append(text)
        except CheckpointError as error:
            assert str(path) in str(error) and len(str(error)) < 1000
            str(error).encode()
        seen.append(time.perf_counter() - began)

    check()
    assert max(seen) < 5 and len(opened) < len(seen)
    record_property("cases", len(seen))


@pytest.mark.fault("F16")
def test_header_with_one_entry_changed_never_opens_as_another_model(
    whole: Path, record_property: Record
) -> None:
    data = whole.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    path, seen = whole.with_name("changed.safetensors"), []

    @SEEDED
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        changed = json.loads(json.dumps(header))
        name = data.draw(st.sampled_from([name for name in header if name != "__metadata__"]))
        what = data.draw(
            st.sampled_from(["gone", "renamed", "entry", "dtype", "shape", "data_offsets", "swapped"])
        )
        if what in ("gone", "renamed"):
            entry = changed.pop(name)
            if what == "renamed":
                changed[data.draw(names)] = entry
        elif what == "entry":
            changed[name] = data.draw(entries)
        elif what == "swapped":
            other = data.draw(
                st.sampled_from([other for other in header if other not in ("__metadata__", name)])
            )
            changed[name], changed[other] = changed[other], changed[name]
        elif what == "dtype":
            changed[name][what] = data.draw(st.sampled_from(["F16", "F64", "I32", "U8", "BOOL", "C64", 1]))
        else:
            changed[name][what] = data.draw(st.lists(numbers, max_size=4))
        path.write_bytes(packed(changed, body))
        seen.append(what)
        try:
            admitted(whole, path)
        except CheckpointError as error:
            assert str(path) in str(error) and len(str(error)) < 4000
        else:  # then it has exactly the tensors of the other, whatever offsets it states
            with Checkpoint.open(path) as one, Checkpoint.open(whole) as two:
                assert {n: i.shape for n, i in one.tensors.items()} == {
                    n: i.shape for n, i in two.tensors.items()
                }

    check()
    assert {"gone", "renamed", "entry", "shape", "swapped"} <= set(seen)
    record_property("cases", len(seen))


BOMBS = {
    "nested lists": b'{"w":[' + b"[]," * 345_000 + b"0]}",
    "nested maps": b'{"w":[' + b'{"":0},' * 145_000 + b"0]}",
    "many tensors": b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(18_000)) + b"}",
    "half a million tensors": b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(500_000)) + b"}",
    "digits": b'{"w":{"dtype":"F32","shape":[' + b",".join([b"1" * 4000] * 64) + b'],"data_offsets":[0,4]}}',
    "one tensor twice": b'{"w":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"w":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
    "overlap": b'{"w":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"v":{"dtype":"U8","shape":[8],"data_offsets":[4,12]}}',
    "a claim of 2^62 bytes": (2**62).to_bytes(8, "little"),
    "a claim of 101 MB": (101 * 2**20).to_bytes(8, "little"),
}  # fmt: skip


@pytest.mark.fault("F16")
def test_header_bombs_are_refused_without_memory(tmp_path: Path, record_property: Record) -> None:
    for name, text in BOMBS.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(text if name.startswith("a claim") else packed(text, b"1234"))
        if name == "a claim of 101 MB":
            with path.open("r+b") as file:
                file.truncate(102 * 2**20)  # sparse: all bytes that the header claims can be read
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "m.safetensors.index.json").write_bytes(b'{"weight_map":' + b"[" * 1_000_000)
    cost = cost_of("""
from merge_service.checkpoints import Checkpoint
from merge_service.errors import CheckpointError
begin()
slowest = 0
for path in arguments:
    started = time.perf_counter()
    try:
        Checkpoint.open(path)
        raise SystemExit(f"{path} was opened")
    except CheckpointError as error:
        assert len(str(error)) < 1000
    slowest = max(slowest, time.perf_counter() - started)
end(slowest=slowest)
""", *sorted(tmp_path.iterdir()))  # fmt: skip
    assert cost.grown < 50, f"{cost.grown:.0f} MB"
    assert cost.more["slowest"] < 5
    record_property("cases", len(BOMBS) + 1)
    record_property("memory", f"{cost.grown:.0f} MB")
    record_property("slowest header", f"{cost.more['slowest']:.2f} s")


LARGE = {
    "lists": b"[]," * 26_000_000,
    "numbers": b"1000," * 16_000_000,
    "strings": b'"ab",' * 16_000_000,
    "maps": b'{"":0},' * 11_000_000,
    "nothing": bytes(80_000_000),
}


@pytest.mark.fault("F16")
def test_headers_as_long_as_may_be_cost_their_text_and_not_thirty_times_that(
    tmp_path: Path, record_property: Record
) -> None:
    for name, body in LARGE.items():
        text = body if name == "nothing" else b'{"w":[' + body + b"0]}"
        (tmp_path / f"{name}.safetensors").write_bytes(packed(text, b""))
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "m.safetensors.index.json").write_bytes(b'{"weight_map":[' + LARGE["lists"])
    cost = cost_of("""
from merge_service.checkpoints import Checkpoint
from merge_service.errors import CorruptCheckpoint
begin()
for path in arguments:
    try:
        Checkpoint.open(path)
        raise SystemExit(f"{path} was opened")
    except CorruptCheckpoint as error:
        assert len(str(error)) < 1000
end()
""", *sorted(tmp_path.iterdir()))  # fmt: skip
    assert cost.grown < 200, f"{cost.grown:.0f} MB"
    record_property("memory for 80 MB", f"{cost.grown:.0f} MB")


@pytest.mark.fault("F16")
@pytest.mark.parametrize("limit", ["HEADER_LIMIT", "MAX_VALUES"])
def test_model_whose_header_nobody_would_read_is_refused_before_its_file_is_begun(
    limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"merge_service.checkpoints.header.{limit}", 100_000)
    with pytest.raises(CheckpointError, match="20000 tensors"):
        CheckpointWriter(
            tmp_path / "w.safetensors", {f"tensor-{n:040}": ("F32", (0,)) for n in range(20_000)}
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.fault("F16")
def test_checkpoint_of_the_corpus_is_refused_by_its_path(record_property: Record) -> None:
    for path in checkpoints():
        with pytest.raises((CorruptCheckpoint, ForeignCheckpoint)) as caught:
            Checkpoint.open(path)
        assert str(path) in str(caught.value) and len(str(caught.value)) < 1000, path.name
        str(caught.value).encode()
    record_property("cases", len(checkpoints()))
