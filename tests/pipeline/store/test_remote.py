"""One contract for every kind of store: a directory, memory, and S3."""

import errno
import pickle
import shutil
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import CorruptArtifact, NondeterminismError, StoreError, StoreUnwritable
from pipeline.merging.files import Execution, FileMerge, merge_files
from pipeline.store import objects as store_objects
from pipeline.store.local import Store
from pipeline.store.open import store_at
from pipeline.store.remote import MIRROR, ObjectStore
from tests.merge_service import toys
from tests.pipeline.s3_server import s3_server
from tests.pipeline.store_toys import CONTENT, ToyStep, child, exit_code, numbered, put

POINTS = (
    *("store.after_stage", "store.after_fsync", "store.before_record"),
    *("store.after_upload", "store.after_rename"),
)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server(tmp_path_factory.mktemp("s3")) as address:
        yield address


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(MIRROR, str(tmp_path / "mirror"))
    return tmp_path / "mirror"


@pytest.fixture
def bucket(s3: str, mirror: Path) -> ObjectStore:
    return made(f"s3://bucket/{uuid.uuid4().hex}")


@pytest.fixture(params=["local", "memory", "s3"])
def empty(request: pytest.FixtureRequest, tmp_path: Path, mirror: Path) -> Store:
    if request.param == "s3":
        request.getfixturevalue("s3")
    where = {
        "local": str(tmp_path / "store"),
        "memory": f"memory://{uuid.uuid4().hex}/prefix",
        "s3": f"s3://bucket/{uuid.uuid4().hex}",
    }
    return made(where[request.param])


def made(where: str) -> Any:
    store = store_at(where, Path("unused"))
    store.prepare()
    return store


def elsewhere(store: Store, tmp_path: Path) -> Store:
    """The same store on another node, with an empty mirror."""
    return ObjectStore(tmp_path / "other", store.url) if isinstance(store, ObjectStore) else store


def damage(store: Store, record: Any, change: Callable[[bytes], bytes]) -> None:
    if isinstance(store, ObjectStore):
        key = next(key for key in store.objects.sizes(record.kind) if key.endswith("/weights.bin"))
        store.objects.write(key, change(store.objects.read(key) or b""))
    else:
        path = record.path / "weights.bin"
        path.write_bytes(change(path.read_bytes()))


# --- the contract ----------------------------------------------------------------------------------------------------------


def test_committed_artifact_is_found_and_read_on_every_node(empty: Store, tmp_path: Path) -> None:
    step = ToyStep()
    assert not empty.has("train", step.fingerprint)
    first = put(empty)
    for store in (empty, pickle.loads(pickle.dumps(empty)), elsewhere(empty, tmp_path)):
        found = store.find(step.fingerprint)
        assert found is not None and found.files == first.files
        assert store.has("train", step.fingerprint) and not store.has("merge", step.fingerprint)
        assert [record.fingerprint for record in store.records("train")] == [step.fingerprint]
        place = store.open_verified(found)
        assert {name: (place / name).read_bytes() for name in CONTENT} == CONTENT
    assert empty.path("train", step.fingerprint, "any") == empty.open_verified(first)
    assert empty.verify() == []


def test_same_step_by_another_slug_is_the_same_artifact(empty: Store) -> None:
    first = put(empty)
    other = ToyStep(slug="t7-elsewhere")
    assert put(empty, other).files == first.files
    assert empty.path("train", other.fingerprint, other.slug) == first.path
    assert len(list(empty.records("train"))) == 1


def test_path_is_the_same_before_and_after(empty: Store) -> None:
    step = ToyStep()
    before = empty.path("train", step.fingerprint, step.slug)
    assert put(empty).path == before == empty.path("train", step.fingerprint, step.slug)


def test_two_results_are_an_error_that_keeps_both(empty: Store) -> None:
    first = put(empty)
    with pytest.raises(NondeterminismError, match=r"weights\.bin") as caught:
        put(empty, content={**CONTENT, "weights.bin": b"other"})
    if isinstance(empty, ObjectStore):
        key = caught.value.second.removeprefix(f"{empty.url}/")
        assert empty.objects.read(f"{key}/weights.bin") == b"other"
    else:
        assert (Path(caught.value.second) / "weights.bin").read_bytes() == b"other"
    assert (empty.open_verified(first) / "weights.bin").read_bytes() == CONTENT["weights.bin"]
    assert empty.verify() == []


def test_other_scores_are_another_result(empty: Store) -> None:
    step = ToyStep("evaluate")
    put(empty, step, {}, {"scores": {"a": 0.5}})
    with pytest.raises(NondeterminismError, match="scores"):
        put(empty, step, {}, {"scores": {"a": 0.6}})


@pytest.mark.fault("F15")
@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-1] + b"!",
        lambda data: data[:7],
        lambda data: data + b"x",
        lambda data: bytes(len(data)),
    ],
    ids=["flipped", "cut", "longer", "zeros"],
)
def test_damaged_file_is_found_on_read_set_aside_and_made_again(
    empty: Store, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    record = put(empty)
    damage(empty, record, change)
    assert len(empty.verify()) == 1
    with pytest.raises(CorruptArtifact, match=r"weights\.bin"):
        elsewhere(empty, tmp_path).open_verified(record)
    assert not empty.has("train", record.fingerprint)
    again = put(empty)
    assert elsewhere(empty, tmp_path).open_verified(again).is_dir()
    assert empty.verify() == []


def test_inputs_are_opened_by_role_and_their_digests_kept(empty: Store, tmp_path: Path) -> None:
    source = put(empty)
    step = ToyStep("merge", inputs={"t1": source.fingerprint})
    assert put(empty, step).input_digests == {"t1": source.digest}
    opened = elsewhere(empty, tmp_path).open_inputs(step)
    assert (opened["t1"] / "weights.bin").read_bytes() == CONTENT["weights.bin"]
    with pytest.raises(CorruptArtifact, match="t2"):
        empty.open_inputs(ToyStep("merge", inputs={"t2": "a" * 64}))


@pytest.mark.fault("F2")
def test_files_are_uploaded_then_the_result_is_claimed_and_the_record_created_last(
    mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = made(f"memory://{uuid.uuid4().hex}")
    system = store_objects._system(store.url, store_objects.os.getpid())[0]
    wrote: list[tuple[str, str | None]] = []
    put_file, pipe_file = system.put_file, system.pipe_file

    def putting(source: str, target: str, *arguments: Any, **options: Any) -> None:
        wrote.append((target.rpartition("/")[2], None))
        put_file(source, target, *arguments, **options)

    def piping(target: str, data: bytes, mode: str = "overwrite", **options: Any) -> None:
        wrote.append(("claim" if "/results/" in target else target.rpartition("/")[2], mode))
        pipe_file(target, data, mode=mode, **options)

    monkeypatch.setattr(system, "put_file", putting)
    monkeypatch.setattr(system, "pipe_file", piping)
    put(store)
    files = [(name, None) for name in sorted(CONTENT)]
    assert wrote == [*files, ("claim", "overwrite"), ("record.json", "create")]


@pytest.mark.fault("F33")
def test_retry_after_transient_failures_passes_and_a_lasting_one_names_the_url(
    mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = made(f"memory://{uuid.uuid4().hex}")
    pauses: list[float] = []
    monkeypatch.setattr(store_objects.time, "sleep", pauses.append)
    system = store_objects._system(store.url, store_objects.os.getpid())[0]
    real, left = system.cat_file, [3]

    def shaky(*arguments: Any, **options: Any) -> bytes:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.EBUSY, "slow down")
        return bytes(real(*arguments, **options))

    put(store)
    monkeypatch.setattr(system, "cat_file", shaky)
    assert store.has("train", ToyStep().fingerprint) and len(pauses) == 3
    left[0] = 99
    with pytest.raises(StoreError, match=f"{store.url}/train.*tried 6 times"):
        store.has("train", ToyStep().fingerprint)


def test_credentials_that_are_refused_are_the_users_to_mend(
    mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = made(f"memory://{uuid.uuid4().hex}")
    system = store_objects._system(store.url, store_objects.os.getpid())[0]

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError("AccessDenied")

    monkeypatch.setattr(system, "pipe_file", refused)
    with pytest.raises(StoreUnwritable, match="credentials"):
        store.prepare()


# --- S3, and several processes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", POINTS)
def test_death_at_any_point_leaves_nothing_or_the_whole_on_s3(
    bucket: ObjectStore, tmp_path: Path, point: str
) -> None:
    marker = tmp_path / "fired"
    code = exit_code("put_one", bucket.url, faults={point: {"marker": str(marker)}})
    assert marker.exists() and code == -signal.SIGKILL
    assert bucket.has("train", ToyStep().fingerprint) == (point == "store.after_rename")
    assert bucket.verify() == []
    bucket.prepare()
    assert list((bucket.root / ".stage").iterdir()) == []
    put(bucket)
    assert bucket.verify() == []
    assert elsewhere(bucket, tmp_path).open_inputs(ToyStep("merge", inputs={"a": ToyStep().fingerprint}))


def race(store: Store, where: str, contents: list[str], gate: Path) -> list[int]:
    racers = [child("put_at_once", where, gate, content) for content in contents]
    for number in range(8):
        gate.with_name(f"{gate.name}{number}").touch()
        deadline = time.monotonic() + 90
        while len(list(gate.parent.glob(f"{gate.name}{number}-*"))) < len(racers):
            assert time.monotonic() < deadline
            time.sleep(0.002)
    return [racer.wait(60) for racer in racers]


def test_committers_of_equal_results_make_one_artifact_on_s3(bucket: ObjectStore, tmp_path: Path) -> None:
    assert race(bucket, bucket.url, ["same", "same"], tmp_path / "gate") == [0, 0]
    assert {record.fingerprint for record in bucket.records("train")} == {
        numbered(n).fingerprint for n in range(8)
    }
    assert bucket.verify() == [] and not bucket.objects.sizes(".conflicts")


def test_committers_of_other_results_make_one_artifact_and_an_error_on_s3(
    bucket: ObjectStore, tmp_path: Path
) -> None:
    told = race(bucket, bucket.url, ["one", "two"], tmp_path / "gate")
    assert sum(told) >= 8, "nobody was told of a second result"
    for number in range(8):
        keys = bucket.objects.sizes(f"train/{numbered(number).fingerprint}")
        kept = sum(key.endswith("/weights.bin") for key in keys)
        assert kept == 2 or any(
            numbered(number).fingerprint[:16] in key for key in bucket.objects.sizes(".conflicts")
        )
    assert bucket.verify() == []


@pytest.mark.fault("F15")
def test_copies_in_the_mirror_are_made_again_when_they_are_wrong_or_gone(bucket: ObjectStore) -> None:
    record = put(bucket)
    (record.path / "weights.bin").write_bytes(b"wrong")
    assert (bucket.open_verified(record) / "weights.bin").read_bytes() == CONTENT["weights.bin"]
    shutil.rmtree(bucket.root)
    assert (bucket.open_verified(record) / "weights.bin").read_bytes() == CONTENT["weights.bin"]
    assert bucket.has("train", record.fingerprint)


def test_node_that_joins_late_gets_the_base_with_the_inputs_of_its_first_step(
    bucket: ObjectStore, tmp_path: Path
) -> None:
    base = put(bucket, ToyStep("base", spec={"base": 1}))
    source = put(bucket)
    step = ToyStep("merge", inputs={"t1": source.fingerprint})
    late = ObjectStore(tmp_path / "late", bucket.url, (base.fingerprint,))
    late.open_inputs(step)
    for record in (base, source):
        assert late.path(record.kind, record.fingerprint, "any").is_dir()
    with pytest.raises(CorruptArtifact, match="base"):
        ObjectStore(tmp_path / "late", bucket.url, ("0" * 64,)).open_inputs(step)


def test_bucket_that_is_not_there_is_said_and_the_store_travels_small(s3: str, mirror: Path) -> None:
    with pytest.raises(StoreUnwritable, match=r"s3://nowhere/x.*no such bucket"):
        made("s3://nowhere/x")
    assert len(pickle.dumps(ObjectStore.at("s3://bucket/x", ("a" * 64,)))) < 600


def test_models_in_a_bucket_are_merged_by_range_with_the_bytes_of_files_on_disk(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    rng = np.random.default_rng(0)
    paths = [
        toys.save(
            tmp_path / f"{at}.safetensors", {"layers.0.w": rng.standard_normal((300, 300)).astype(np.float32)}
        )
        for at in range(2)
    ]
    system, asked = s3fs.S3FileSystem(skip_instance_cache=True), []
    for path in paths:
        system.put_file(str(path), f"bucket/models/{path.name}")
    part = store_objects.Objects.part
    monkeypatch.setattr(
        store_objects.Objects,
        "part",
        lambda self, key, start, stop: asked.append(stop - start) or part(self, key, start, stop),
    )
    far = [Path(f"s3://bucket/models/{path.name}") for path in paths]
    for experts, out in ((paths, "near"), (far, "far")):
        merge_files(
            FileMerge("slerp", {}, None, experts, tmp_path / f"{out}.safetensors", any_base=True),
            Execution(threads=1),
        )
    assert (tmp_path / "far.safetensors").read_bytes() == (tmp_path / "near.safetensors").read_bytes()
    assert asked and sum(asked) < 3 * sum(path.stat().st_size for path in paths)
