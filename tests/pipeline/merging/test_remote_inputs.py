"""Merges of models on a hub or in a bucket: read by range, with the bytes of a merge of the same folders on disk."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from merge_service.checkpoints.header import read_header
from merge_service.files import ranges, web
from merge_service.files.ranges import PIECE
from pipeline.merging.files import Execution, FileMerge, merge_files
from pipeline.merging.remote import hub
from pipeline.merging.remote.near import _begin, is_remote, near, with_slashes
from pipeline.merging.remote.source import Bucket, RemoteError
from tests.conftest import Answer
from tests.merge_service import toys

MODELS = ("base", "one", "two")


def folder(place: Path, seed: int, sharded: bool) -> Path:
    """A model of 10 MB, more than two pieces, as a library saves it."""
    rng = np.random.default_rng(0)
    names = ["model.embed_tokens.weight", *(f"model.layers.{at}.mlp.up_proj.weight" for at in range(4))]
    base = {name: rng.standard_normal((512, 1024)).astype(np.float32) for name in names}
    moves = np.random.default_rng(seed)
    model = {
        name: v + np.float32(0.01 * seed) * moves.standard_normal(v.shape).astype(np.float32)
        for name, v in base.items()
    }
    place.mkdir(parents=True)
    parts = [names[:2], names[2:]] if sharded else [names]
    files = [
        f"model-{n + 1:05d}-of-00002.safetensors" if sharded else "model.safetensors"
        for n in range(len(parts))
    ]
    for file, part in zip(files, parts):
        toys.save(place / file, {name: model[name] for name in part}, {"format": "pt"})
    if sharded:
        where = {name: file for file, part in zip(files, parts) for name in part}
        (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (place / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 4}))
    (place / "tokenizer.json").write_text("{}")
    (place / "pytorch_model.bin").write_bytes(b"x" * 1000)
    return place


class Stub:
    """A hub of a folder: the two documented requests, and everything that was asked for."""

    def __init__(self, root: Path) -> None:
        self.asked: list[tuple[str, tuple[int, int] | None, str | None]] = []
        self.fails, self.cuts, self.ranges, self.redirect, self.connections = 0, 0, True, "", 0
        self.header: dict[str, str] = {}
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def setup(self) -> None:
                stub.connections += 1
                super().setup()

            def send(self, code: int, body: bytes, **headers: str) -> None:
                self.send_response(code)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                part = (int(found[1]), int(found[2]) + 1) if found else None
                stub.asked.append((self.path, part, self.headers.get("Authorization")))
                if stub.fails:
                    stub.fails -= 1
                    return self.send(429, b"busy", **stub.header)
                if listed := re.fullmatch(
                    r"/api/models/(\w+/\w+)/revision/(?:main|refs%2Fpr%2F3)\?blobs=true", self.path
                ):
                    place = root / listed[1]
                    if not place.is_dir():
                        return self.send(404, b"")
                    if listed[1] == "org/gated":
                        return self.send(403, b"")
                    files = [{"rfilename": one.name, "size": one.stat().st_size} for one in place.iterdir()]
                    return self.send(200, json.dumps({"sha": "c0ffee", "siblings": files}).encode())
                wanted = re.fullmatch(r"/(\w+/\w+)/resolve/c0ffee/([\w.-]+)", self.path)
                if wanted is None or not (root / wanted[1] / wanted[2]).is_file():
                    return self.send(404, b"")
                if stub.redirect:
                    return self.send(302, b"", Location=f"{stub.redirect}{self.path}")
                data = (root / wanted[1] / wanted[2]).read_bytes()
                if part is None or not stub.ranges:
                    return self.send(200, data)
                stop = min(part[1], len(data))
                if stub.cuts:
                    stub.cuts -= 1
                    self.send_response(206)
                    self.send_header("Content-Length", str(stop - part[0]))
                    self.end_headers()
                    self.wfile.write(data[part[0] : part[0] + 1])
                    self.close_connection = True
                    return None
                return self.send(
                    206, data[part[0] : stop], Content_Range=f"bytes {part[0]}-{stop - 1}/{len(data)}"
                )

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def read_of(self, name: str) -> int:
        """Bytes of weights that were sent of a model."""
        return sum(
            p[1] - p[0]
            for path, p, _ in self.asked
            if p and f"/{name}/" in path and path.endswith(".safetensors")
        )

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("hub")
    for seed, name in enumerate(MODELS):
        folder(place / "org" / name, seed, sharded=name == "two")
    folder(place / "org" / "gated", 0, False)
    return place


@pytest.fixture
def stub(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    made = Stub(root)
    monkeypatch.setenv("HF_ENDPOINT", made.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(web, "PAUSE", 0.0)
    monkeypatch.setattr(web, "LONGEST", 0.0)
    yield made
    made.close()


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_merge_from_a_hub_has_the_bytes_of_one_on_disk_and_reads_by_range(
    stub: Stub, root: Path, tmp_path: Path, cli: Callable[..., Answer]
) -> None:
    local = [root / "org" / name for name in MODELS]
    far = [f"hf://org/{name}" for name in MODELS]
    for base, *experts, out in ((*local, "near"), (*far, "far")):
        answer = cli(
            "merge",
            "--technique",
            "ties",
            "--set",
            "granularity=tensor",
            "--base",
            base,
            "--out",
            tmp_path / out,
            *experts,
        )
        assert answer.code == 0, answer.err
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("near", "far")]
    assert weights[0] == weights[1]
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "far" / name).read_text() == (tmp_path / "near" / name).read_text()
    recipe = (tmp_path / "far" / "merge.yaml").read_text()
    assert "hf://org/base@c0ffee" in recipe and "temporal-merge-far" not in recipe
    for name in MODELS:  # named by content, compared, merged; and a header
        assert size(root / "org" / name) < stub.read_of(name) < 6 * size(root / "org" / name)
    assert not [
        path
        for path, part, _ in stub.asked
        if path.endswith(".bin") or (part is None and "/api/" not in path)
    ]


def test_plan_of_a_remote_merge_reads_headers_alone(
    stub: Stub, tmp_path: Path, cli: Callable[..., Answer]
) -> None:
    experts = ["hf://org/one", "hf://org/two"]
    answer = cli(
        "merge", "--plan", "--json", "--technique", "average", "--out", tmp_path / "o.safetensors", *experts
    )
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert found["written_bytes"] == 5 * 512 * 1024 * 4 and found["throughput"]["source"] == "assumed"
    assert sum(stub.read_of(name) for name in MODELS) < 300_000


def test_recipe_takes_remote_models_and_pieces_are_not_fetched_twice_in_a_pass(
    stub: Stub, root: Path, tmp_path: Path, cli: Callable[..., Answer]
) -> None:
    parts = "{sources: [{model: hf://org/one, layer_range: [0, 2]}]}, {sources: [{model: hf://org/two, layer_range: [1, 4]}]}"
    file = tmp_path / "recipe.yaml"
    file.write_text(f"merge_method: passthrough\nslices: [{parts}]\ndtype: float32\n")
    assert cli("merge", file, "--out", tmp_path / "far").code == 0
    file.write_text(file.read_text().replace("hf://org", str(root / "org")))
    assert cli("merge", file, "--out", tmp_path / "near").code == 0
    far, local = (tmp_path / one / "model.safetensors" for one in ("far", "near"))
    assert b"temporal-merge-far" not in far.read_bytes() and b"hf://org/one@c0ffee" in far.read_bytes()
    one, other = toys.load(far), toys.load(local)
    assert {name: v.tobytes() for name, v in one.items()} == {name: v.tobytes() for name, v in other.items()}
    assert stub.read_of("one") < 2.2 * size(root / "org" / "one") + 2 * PIECE


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("hf://org/nothing", "no such file, model or revision"),
        ("hf://org/gated", "set HF_TOKEN"),
        ("hf://only-a-name", "write hf://OWNER/NAME"),
    ],
)
def test_what_cannot_be_read_is_named_with_what_to_do_and_nothing_is_written(
    stub: Stub, tmp_path: Path, cli: Callable[..., Answer], path: str, says: str
) -> None:
    out = tmp_path / "out.safetensors"
    answer = cli("merge", "--technique", "average", "--out", out, path)
    assert answer.code == 2 and says in answer.err and "hf://" in answer.err and not out.exists()


def test_broken_hubs_are_retried_and_then_named(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    stub.fails = web.TRIES - 1
    assert "model.safetensors" in hub.Hub("org/one").files()
    stub.fails = web.TRIES
    with pytest.raises(RemoteError, match="busy or broken"):
        hub.Hub("org/one").files()
    whole = hub.Hub("org/one", "refs/pr/3")
    stub.cuts = web.TRIES - 1
    assert whole.part("config.json", 0, 5) == b'{"mod'
    stub.cuts = web.TRIES
    with pytest.raises(RemoteError, match="after 1 bytes"):
        whole.part("config.json", 0, 5)
    assert whole.part("config.json", 0, 5) == b'{"mod'
    stub.ranges = False
    with pytest.raises(RemoteError, match="hf download org/one"):
        whole.part("model.safetensors", 0, 100)
    stub.close()
    with pytest.raises(RemoteError, match=r"tried 5 times.*HF_ENDPOINT"):
        hub.Hub("org/two").files()
    stub.server.server_close = stub.server.shutdown = lambda: None  # type: ignore[method-assign]


def test_ranges_come_over_a_connection_that_is_kept(stub: Stub) -> None:
    stub.server.RequestHandlerClass.protocol_version = "HTTP/1.1"  # type: ignore[attr-defined]
    whole = hub.Hub("org/one")
    assert [whole.part("config.json", at, at + 1) for at in range(3)] == [b"{", b'"', b"m"]
    assert len(stub.asked) == 4 and stub.connections == 1


@pytest.mark.parametrize(
    ("header", "waits"),
    [
        ({"Retry_After": "7"}, 7.0), ({"RateLimit": '"resolvers";r=0;t=55'}, 55.0), ({"Retry_After": "9999"}, 300.0),
        ({"Retry_After": "Fri, 01 Jan 2027 00:00:00 GMT"}, 0.0), ({}, 0.0),
    ],
)  # fmt: skip
def test_server_that_is_busy_says_how_long(
    header: dict[str, str], waits: float, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(web, "LONGEST", 300.0)
    monkeypatch.setattr(web.time, "sleep", waited.append)
    stub.fails, stub.header = 1, header
    hub.Hub("org/one").files()
    assert waited == [waits]


def test_token_goes_to_the_endpoint_and_not_where_it_redirects_to(
    stub: Stub, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    other = Stub(root)
    stub.redirect = other.url
    assert hub.Hub("org/one").part("config.json", 0, 1) == b"{"
    other.close()
    assert {token for _, _, token in stub.asked} == {"Bearer secret"}
    assert [token for _, _, token in other.asked] == [None]


def test_workers_and_files_that_are_no_models_are_refused(stub: Stub, root: Path, tmp_path: Path) -> None:
    what = FileMerge("average", {}, None, [Path("hf://org/one")], tmp_path / "out.safetensors")
    with pytest.raises(Exception, match="leave --workers out"):
        merge_files(what, Execution(workers=2))
    (root / "org" / "empty").mkdir(exist_ok=True)
    (root / "org" / "empty" / "README.md").write_text("x")
    with pytest.raises(RemoteError, match=r"holds no \.safetensors"), near(["hf://org/empty"]):
        pass
    assert not ranges._files and not ranges._folders  # nothing stays registered


def test_bucket_is_read_by_range_through_the_storage_of_stores(root: Path, tmp_path: Path) -> None:
    import fsspec

    system = fsspec.filesystem("memory")
    for name in ("one", "two"):
        system.put(str(root / "org" / name), f"/models/{name}", recursive=True)
    far = [Path(f"memory://models/{name}") for name in ("one", "two")]
    local = [root / "org" / name for name in ("one", "two")]
    outs = []
    for experts, out in ((far, "far"), (local, "near")):
        merge_files(
            FileMerge("slerp", {}, None, experts, tmp_path / f"{out}.safetensors"), Execution(threads=2)
        )
        outs.append((tmp_path / f"{out}.safetensors").read_bytes())
    assert outs[0] == outs[1]
    with near(["memory://models/one/model.safetensors"]) as places:
        (place,) = places.values()
        assert place.endswith("model.safetensors") and Path(place).stat().st_size == size(
            root / "org" / "one"
        )
    with pytest.raises(RemoteError, match="does not exist, or holds nothing"):
        Bucket("memory://models/nowhere").files()


def test_remote_inputs_are_told_from_paths() -> None:
    assert (
        is_remote(Path("hf://a/b"))
        and is_remote("base+s3://b/c")
        and not is_remote("hf/a")
        and not is_remote("a:b")
    )
    assert with_slashes(str(Path("hf://a/b+s3://c/d"))) == "hf://a/b+s3://c/d"


@pytest.mark.parametrize("length", [(1 << 16) - 9, (1 << 16) - 8, (1 << 16) - 7, 1 << 16, 70_000])
def test_header_that_ends_beside_the_first_request_is_read_whole(
    stub: Stub, tmp_path: Path, length: int
) -> None:
    """A known fault of a client: a header that ends within the last bytes of the first range was cut."""

    class Held:
        url, name = "hf://org/held", "held"

        def __init__(self) -> None:
            layout = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
            text = json.dumps(layout).encode().ljust(length)
            self.data = len(text).to_bytes(8, "little") + text + np.float32([1, 2]).tobytes()

        def size(self, file: str) -> int:
            return len(self.data)

        def part(self, file: str, start: int, stop: int) -> bytes:
            return self.data[start:stop]

    held = Held()
    _begin(held, "model.safetensors", tmp_path)
    file = tmp_path / "model.safetensors"
    assert file.read_bytes()[: 8 + length] == held.data[: 8 + length] and file.stat().st_size == len(
        held.data
    )
    assert read_header(file)[0]["w"].shape == (2,)


def test_mistakes_that_headers_show_cost_no_download(
    stub: Stub, root: Path, tmp_path: Path, cli: Callable[..., Answer]
) -> None:
    """A report of mergekit's users: a misspelt method, or another number of layers, was found after everything was downloaded."""
    out = ("--out", tmp_path / "out.safetensors", "hf://org/one", "hf://org/short")
    assert cli("merge", "--technique", "dare-ties2", *out).code == 2 and not stub.asked
    short = folder(root / "org" / "short", 3, sharded=False)
    held = toys.load(short / "model.safetensors")
    toys.save(short / "model.safetensors", {name: v for name, v in held.items() if "layers.3" not in name})
    answer = cli("merge", "--technique", "average", *out)
    assert answer.code == 2 and "model.layers.3.mlp.up_proj.weight is missing" in answer.err
    assert "hf://org/short" in answer.err and stub.read_of("one") + stub.read_of("short") < 500_000
