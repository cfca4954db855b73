"""Shards at an address: the same samples as from a folder, only what was indexed, and only from where the study allows."""

import json
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from merge_service.errors import UserError
from merge_service.files import web
from tests.pipeline.s3_server import s3_server
from tests.workers.data.test_encoded import PICTURES, dataset, labelled
from tests.workers.data_helpers import PREPROCESS
from workers.data import decode
from workers.data.decode import load
from workers.data.encoded import remote
from workers.data.encoded.addresses import plain
from workers.data.tarscan import ShardError
from workers.jobs import Source

BOX = (2, 3, 16, 12)


class Server(ThreadingHTTPServer):
    """Files of a folder by range; `answers` are statuses to give first, `asked` the ranges that were answered."""

    daemon_threads = True

    def __init__(self, home: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.home, self.answers, self.asked = home, list[int](), list[str]()
        self.address = f"http://127.0.0.1:{self.server_port}/pool/"


class Handler(BaseHTTPRequestHandler):
    """One answer."""

    protocol_version: ClassVar[str] = "HTTP/1.1"

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        data = (server.home / Path(self.path).name).read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        assert found is not None
        first, last = int(found[1]), int(found[2])
        status = server.answers.pop(0) if server.answers else 206
        body = data[first : last + 1] if status == 206 else data if status == 200 else b""
        self.send_response(status)
        if status == 206:
            server.asked.append(f"{Path(self.path).name} {last - first + 1}")
            self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{len(data)}")
        if status == 302:
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    home = tmp_path / "served"
    home.mkdir()
    with Server(home) as opened:
        threading.Thread(target=opened.serve_forever, daemon=True).start()
        yield opened
        opened.shutdown()


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(web, "PAUSE", 0.0)
    decode._stored.cache_clear()
    yield
    decode._stored.cache_clear()


def moved(local: Source, root: Path, to: Path, address: str) -> Source:
    """The same dataset under `root`, whose shards have moved to `to`, which is served at `address`."""
    shutil.copytree(Path(local.root), root)
    for shard in (root / "toys/train").glob("*.tar"):
        shutil.move(shard, to / shard.name)
    stated = json.loads((root / "toys/manifest.json").read_text())
    (root / "toys/manifest.json").write_text(json.dumps({**stated, "addresses": {"train": address}}))
    return replace(local, root=str(root), addresses=(plain(address),))


@pytest.fixture
def both(tmp_path: Path, server: Server) -> tuple[Source, Source]:
    names = list(PICTURES)
    parts = [
        labelled({name: PICTURES[name] for name in names[:5]}, {"000-plain": "a cat\non a mat"}),
        labelled({name: PICTURES[name] for name in names[5:]}),
    ]
    local = dataset(tmp_path / "root", *parts)
    return local, moved(local, tmp_path / "remote", server.home, server.address)


def everything(
    source: Source, cache: Path
) -> tuple[np.ndarray, np.ndarray, list[tuple[str, ...]], np.ndarray]:
    """Pictures, labels and captions of a split, and a piece of every picture."""
    found = load(source, 24, cache, PREPROCESS)
    assert not isinstance(found.images, np.ndarray | decode.Rows)
    pieces = np.empty((len(found), 24, 24, 3), np.uint8)
    for row in range(len(found)):
        found.images.cut(row, BOX, pieces[row])
    return found.images[:], np.asarray(found.labels), list(found.captions), pieces


def same(one: tuple[object, ...], other: tuple[object, ...]) -> bool:
    return all(np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b for a, b in zip(one, other))


def test_samples_over_http_are_those_of_the_folder_and_are_read_by_ranges(
    both: tuple[Source, Source], server: Server, tmp_path: Path
) -> None:
    local, distant = both
    assert same(everything(local, tmp_path / "one"), everything(distant, tmp_path / "two"))
    whole = {f"{path.name} {path.stat().st_size}" for path in server.home.iterdir()}
    assert sorted(one for one in server.asked if one in whole) == sorted(whole), "a shard was copied twice"
    left = [path for path in (tmp_path / "two").rglob("*") if path.suffix == ".tar"]
    assert left == []

    server.asked.clear()
    decode._stored.cache_clear()
    load(distant, 24, tmp_path / "two", PREPROCESS)
    assert server.asked == [], "the index of a later process reads no shard"


def test_samples_in_a_bucket_are_those_of_the_folder(both: tuple[Source, Source], tmp_path: Path) -> None:
    import s3fs

    local, _ = both
    (tmp_path / "moved").mkdir()
    address = "s3://bucket/pool/"
    distant = moved(local, tmp_path / "there", tmp_path / "moved", address)
    with s3_server(tmp_path):
        system = s3fs.S3FileSystem(skip_instance_cache=True)
        for shard in (tmp_path / "moved").iterdir():
            system.put_file(str(shard), f"{address}{shard.name}")
        remote._bucket.cache_clear()
        assert same(everything(local, tmp_path / "one"), everything(distant, tmp_path / "two"))
        system.rm(f"{address}0.tar")
        decode._stored.cache_clear()
        with pytest.raises(ShardError, match=r"s3://bucket/pool/0\.tar: missing"):
            load(distant, 24, tmp_path / "three", PREPROCESS)
    remote._bucket.cache_clear()


@pytest.mark.parametrize(
    ("name", "says"), [("NoCredentialsError", "forbidden"), ("EndpointError", "cannot be read")]
)
def test_error_of_the_library_for_buckets_names_the_address(
    name: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bucket:
        def cat_file(self, *_: object, **__: object) -> bytes:
            raise type(name, (Exception,), {})("unable")

    monkeypatch.setattr(remote, "_bucket", Bucket)
    monkeypatch.setattr(web, "PAUSE", 0.0)
    with pytest.raises(ShardError, match=rf"s3://bucket/0\.tar: .*{says}.*{name}: unable"):
        remote.read_range("s3://bucket/0.tar", 0, 1)


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ([503] * 5, "cannot be read"),
        ([302], "not followed"),
        ([200], "ignores ranges"),
        ([404], "missing"),
        ([403], "forbidden"),
    ],
)
def test_server_that_does_not_give_the_range_is_named_with_what_to_do(
    answers: list[int], says: str, both: tuple[Source, Source], server: Server, tmp_path: Path
) -> None:
    server.answers = answers
    with pytest.raises(ShardError, match=says) as refused:
        load(both[1], 24, tmp_path / "cache", PREPROCESS)
    assert str(refused.value).startswith(f"{server.address}0.tar: ")
    assert not list((tmp_path / "cache").rglob("places.npy"))


def test_request_that_fails_for_a_while_is_tried_again(
    both: tuple[Source, Source], server: Server, tmp_path: Path
) -> None:
    server.answers = [503, 500, 429]
    assert len(load(both[1], 24, tmp_path / "cache", PREPROCESS)) == len(PICTURES)


def test_shard_with_other_bytes_than_stated_is_refused_before_it_is_indexed(
    both: tuple[Source, Source], server: Server, tmp_path: Path
) -> None:
    shard = server.home / "1.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ShardError, match=r"1\.tar: flipped"):
        load(both[1], 24, tmp_path / "cache", PREPROCESS)
    shard.write_bytes(data[:-512])
    with pytest.raises(ShardError, match=r"1\.tar: cut"):
        load(both[1], 24, tmp_path / "cache", PREPROCESS)


def test_sample_that_changed_after_it_was_indexed_is_refused(
    both: tuple[Source, Source], server: Server, tmp_path: Path
) -> None:
    samples = load(both[1], 24, tmp_path / "cache", PREPROCESS)
    shard = server.home / "0.tar"
    data = shard.read_bytes()
    at = data.index(PICTURES["plain.jpg"]) + 300
    shard.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(ShardError, match=r"0\.tar: flipped"):
        samples.images[0]
    assert samples.images[1].shape == (24, 24, 3)


def test_address_is_contacted_only_if_the_study_allows_it(
    both: tuple[Source, Source], server: Server, tmp_path: Path
) -> None:
    for allowed in ((), ("http://127.0.0.1:9/pool/",), (server.address.replace("/pool/", "/poo/"),)):
        with pytest.raises(UserError, match=r"data\.addresses does not allow"):
            load(replace(both[1], addresses=allowed), 24, tmp_path / "cache", PREPROCESS)
    with pytest.raises(UserError, match=r"data\.reading: encoded"):
        load(replace(both[1], reading="decoded"), 24, tmp_path / "cache", PREPROCESS)
    assert server.asked == []


@pytest.mark.parametrize(
    "address",
    [
        "ftp://host/pool", "https://user:secret@host/pool", "https://host/pool?token=1", "https://host/a/../b", "https://host/a/%2e%2e/b",
        "https://HOST/pool", "file:///etc", "https://host/pool#x", "https:///pool", "pipe:cat /etc/passwd", "https://host\\@other/pool",
    ],
)  # fmt: skip
def test_address_that_is_not_plain_is_refused_also_in_a_manifest(address: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no plain address"):
        plain(address)
    source = dataset(tmp_path / "root", labelled())
    file = tmp_path / "root/toys/manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "addresses": {"train": address}}))
    with pytest.raises(UserError, match="addresses"):
        load(source, 24, tmp_path / "cache", PREPROCESS)
