"""Experts over HTTP: uploads that go on after breaks, arrivals that are durable and come once, operations, log and tokens."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from merge_service.checkpoints import Checkpoint
from merge_service.live import Entry, Refused, chained, fold, parse
from merge_service.live.values import canonical
from pipeline.service.intake import uploads
from pipeline.service.intake.tickets import Tickets
from pipeline.service.verify import verify
from tests.merge_service.toys import save
from tests.pipeline.service import toys
from tests.pipeline.service.conftest import Service
from tests.pipeline.service.live_toys import LiveService, content_digest
from tests.pipeline.service.test_app import problem

Make = Callable[..., LiveService]


@pytest.fixture
def make_live(make_service: Callable[..., Service], tmp_path: Path) -> Make:
    def make(**configured: object) -> LiveService:
        toys.home(tmp_path / "out", configured.pop("strategy", "offline_merging"), **configured)
        return LiveService(make_service(out=tmp_path / "out"), tmp_path / "out", tmp_path)

    return make


@pytest.fixture
def live(make_live: Make) -> LiveService:
    return make_live()


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(uploads, "PART_BYTES", 1000)
    yield 1000


def incoming(live: LiveService) -> set[str]:
    return {one.name for one in (live.home.place / "incoming").glob("*")}


def test_page_is_at_the_root_of_the_application_and_no_part_of_the_api(live: LiveService) -> None:
    client = live.app.client
    assert 'name="token"' in client.get("/").text
    client.post("/page/login", data={"token": live.app.tokens["operator"]})
    assert "No expert has arrived yet" in client.get("/").text
    assert "/page/" not in client.get("/openapi.json").text
    assert client.get("/v1/arrivals").status_code == 401  # a cookie opens the page alone


def test_expert_arrives_in_parts_and_is_promoted(live: LiveService, tmp_path: Path) -> None:
    path = toys.expert(tmp_path, "task0")
    came = live.arrive(path, "task0", license="MIT", note="first")
    assert came.status_code == 202 and came.json()["status"] == "received"
    where = came.headers["location"]
    assert live.ask("GET", where, "reader").json()["status"] == "received"
    live.work()
    one = live.ask("GET", f"{where}?wait=5", "reader").json()
    assert (one["status"], one["t"], one["owner"], one["license"]) == ("promoted", 1, "ann", "MIT")
    status = live.ask("GET", "/v1/status", "reader").json()["live"]
    assert status["served"]["arrival"] == one["id"] and status["t"] == 1 and status["backlog"] == {}
    left = [one.name for one in (live.home.place / "uploads").glob("u-*/*")]
    assert left == ["taken.json"] and not verify(live.out)  # what the upload became, and none of its bytes


def test_champion_has_the_bytes_of_experts_that_came_without_http(live: LiveService, tmp_path: Path) -> None:
    other = toys.home(tmp_path / "other")
    for task in toys.TASKS[:3]:
        path = toys.expert(tmp_path, task)
        live.arrive(path, task)
        live.work()
        toys.arrive(other, path, task)
    assert live.home.log.state.served.sha256 == other.log.state.served.sha256


def test_upload_goes_on_where_it_was_broken_off(live: LiveService, small_parts: int, tmp_path: Path) -> None:
    path = toys.expert(tmp_path, "task0")
    data, announced = path.read_bytes(), live.announce(path, "task0")
    number, last = announced.json()["id"], -(-len(data) // small_parts) - 1
    assert announced.status_code == 201 and announced.json()["missing"] == {path.name: [[0, last]]}
    for part in (last, 1):  # any order
        piece = data[part * small_parts : (part + 1) * small_parts]
        assert live.put(number, path.name, part, piece).status_code == 204
        assert live.put(number, path.name, part, piece).status_code == 204  # repeatable
    assert problem(live.put(number, path.name, 1, bytes(small_parts))) == "upload.conflict"
    assert problem(live.put(number, path.name, last + 1, b"")) == "upload.part"
    asked = {"task": "task0", "upload": number, "owner": "ann"}
    assert problem(live.ask("POST", "/v1/arrivals", "submitter", json=asked)) == "upload.incomplete"
    again = live.announce(path, "task0")
    assert again.status_code == 200 and again.json()["id"] == number
    assert again.json()["missing"] == {path.name: [[0, 0], [2, last - 1]]}
    assert live.ask("GET", f"/v1/uploads/{number}", "submitter").json() == again.json()
    assert live.arrive(path, "task0").status_code == 202
    assert problem(live.ask("GET", f"/v1/uploads/{number}", "submitter")) == "upload.unknown"


def test_shards_arrive_as_the_file_that_they_make(live: LiveService, tmp_path: Path) -> None:
    path, home = toys.expert(tmp_path, "task0"), tmp_path / "shards"
    home.mkdir()
    with Checkpoint.open(path) as whole:
        names = sorted(whole.tensors)
        tensors = {name: whole.read(name).reshape(whole.tensors[name].shape).copy() for name in names}
    shards = [f"m-{n:05d}-of-00002.safetensors" for n in (1, 2)]
    save(home / shards[0], {name: tensors[name] for name in names[:2]})
    save(home / shards[1], {name: tensors[name] for name in names[2:]})
    index = {"weight_map": {name: shards[at >= 2] for at, name in enumerate(names)}}
    (home / "m.safetensors.index.json").write_bytes(canonical(index))
    files = sorted(home.iterdir())
    sizes = [
        {
            "name": one.name,
            "bytes": one.stat().st_size,
            "sha256": hashlib.sha256(one.read_bytes()).hexdigest(),
        }
        for one in files
    ]
    number = live.ask("POST", "/v1/uploads", "submitter", json={"task": "task0", "files": sizes}).json()["id"]
    for one in files:
        assert live.put(number, one.name, 0, one.read_bytes()).status_code == 204
    asked = {"task": "task0", "upload": number, "owner": "ann"}
    came = live.ask("POST", "/v1/arrivals", "submitter", json=asked)
    assert came.status_code == 202, came.text
    assert live.work().shown(came.json()["id"]) == "promoted"


def test_request_again_is_the_same_arrival_by_its_key_or_its_bytes(live: LiveService, tmp_path: Path) -> None:
    path, key = toys.expert(tmp_path, "task0"), {"idempotency-key": "k-1"}
    number = live.upload(path, "task0")
    asked = {"task": "task0", "upload": number, "owner": "ann"}
    first = live.ask("POST", "/v1/arrivals", "submitter", json=asked, headers=key)
    again = live.ask("POST", "/v1/arrivals", "submitter", json=asked, headers=key)
    assert (first.status_code, again.status_code) == (202, 200) and first.json()["id"] == again.json()["id"]
    other = live.ask("POST", "/v1/arrivals", "submitter", json={**asked, "owner": "bob"}, headers=key)
    assert problem(other) == "idempotency.reused"
    length = live.home.log.state.seq
    delivered = live.arrive(path, "task0")
    assert delivered.status_code == 200 and delivered.json()["id"] == first.json()["id"]
    assert live.home.log.state.seq == length


def test_what_is_too_much_is_refused_before_any_byte(make_live: Make, tmp_path: Path) -> None:
    path = toys.expert(tmp_path, "task0")
    live = make_live(
        admission={"max_bytes": path.stat().st_size}, limits={"uploads": 1, "waiting": 1}, tasks={"open": False, "list": ["task0", "task1"]}
    )  # fmt: skip
    big = {"name": "m.safetensors", "bytes": path.stat().st_size + 1, "sha256": "0" * 64}
    refused = live.ask("POST", "/v1/uploads", "submitter", json={"task": "task0", "files": [big]})
    assert problem(refused) == "upload.too_large" and "admission.max_bytes" in refused.json()["detail"]
    assert problem(live.announce(path, "task9")) == "task.unknown"
    assert live.announce(path, "task0").status_code == 201
    second = live.announce(toys.expert(tmp_path, "task1"), "task1")
    assert problem(second) == "limit.uploads" and int(second.headers["retry-after"]) > 0
    assert live.arrive(path, "task0").status_code == 202
    assert problem(live.announce(toys.expert(tmp_path, "task1"), "task1")) == "limit.waiting"


def test_full_disk_closes_the_door_to_uploads_and_reading_goes_on(make_live: Make, tmp_path: Path) -> None:
    live = make_live(limits={"reserve": 10**15})
    assert problem(live.announce(toys.expert(tmp_path, "task0"), "task0")) == "service.full"
    assert live.ask("GET", "/v1/arrivals", "reader").status_code == 200


def test_abandoned_upload_is_forgotten_and_others_stay(live: LiveService, tmp_path: Path) -> None:
    number = live.announce(toys.expert(tmp_path, "task0"), "task0").json()["id"]
    place, old = live.home.place / "uploads" / number, time.time() - uploads.KEPT_SECONDS - 10
    for one in (place / "parts", place):
        os.utime(one, (old, old))
    fresh = live.announce(toys.expert(tmp_path, "task1"), "task1").json()["id"]
    assert [one.name for one in place.parent.glob("u-*")] == [fresh]
    assert live.ask("DELETE", f"/v1/uploads/{fresh}", "submitter").status_code == 204
    assert not list(place.parent.glob("u-*"))


def test_hostile_uploads_are_refused_and_write_nothing(live: LiveService, tmp_path: Path) -> None:
    def announced(*names: str) -> str:
        files = [{"name": name, "bytes": 10, "sha256": "0" * 64} for name in names]
        return problem(live.ask("POST", "/v1/uploads", "submitter", json={"task": "task0", "files": files}))

    for name in (
        "../m.safetensors",
        "/etc/m.safetensors",
        ".m.safetensors",
        "m.pkl",
        "m.bin",
        "a\x00.safetensors",
        "m.zip",
    ):
        assert announced(name) == "upload.files", name
    assert announced("a.safetensors", "b.safetensors") == "upload.files"
    assert announced("a.safetensors", "a.safetensors") == "upload.files"
    assert not (live.home.place / "uploads").exists()
    path = toys.expert(tmp_path, "task0")
    number, data = live.announce(path, "task0").json()["id"], path.read_bytes()
    before = sorted(live.out.rglob("*"))
    for stated in ("", "md5=:AAAA:", content_digest(b"other"), "sha-256=AAAA"):
        refused = live.put(number, path.name, 0, data, **{"content-digest": stated})
        assert problem(refused) == "upload.digest"
    assert problem(live.put(number, "other.safetensors", 0, data)) == "upload.part"
    assert problem(live.put(number, "..%2F..%2Fx", 0, data)) in ("upload.part", "request.unknown")
    assert problem(live.put(number, path.name, 7, data)) == "upload.part"
    assert problem(live.put(number, path.name, 0, data[:-1])) == "upload.part"
    assert problem(live.put(number, path.name, 0, bytes(uploads.PART_BYTES + 1))) == "request.too_large"
    assert problem(live.put(number, path.name, 0, data, "operator")) == "upload.unknown"  # another's
    assert problem(live.put(number, path.name, 0, data, "reader")) == "role.too_low"
    assert sorted(live.out.rglob("*")) == before
    wrong = {"name": "m.safetensors", "bytes": 4, "sha256": "0" * 64}
    number = live.ask("POST", "/v1/uploads", "submitter", json={"task": "t", "files": [wrong]}).json()["id"]
    assert live.put(number, "m.safetensors", 0, b"abcd").status_code == 204
    asked = {"task": "t", "upload": number, "owner": "ann"}
    assert problem(live.ask("POST", "/v1/arrivals", "submitter", json=asked)) == "upload.digest"
    assert not incoming(live)


def test_pickle_is_quarantined_and_never_opened(live: LiveService, tmp_path: Path) -> None:
    path = tmp_path / "evil.safetensors"
    path.write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/pwned'\ntR.")
    number = live.arrive(path, "task0").json()["id"]
    live.work()
    one = live.ask("GET", f"/v1/arrivals/{number}").json()
    assert one["status"] == "quarantined" and one["reasons"][0].startswith("format.")
    assert str(live.out) not in one["detail"]
    assert (
        problem(live.ask("POST", f"/v1/arrivals/{number}/release", json={"reason": "x"})) == "arrival.unfit"
    )


def test_arrivals_are_listed_page_by_page(live: LiveService, tmp_path: Path) -> None:
    ids = [live.arrive(toys.expert(tmp_path, task), task).json()["id"] for task in toys.TASKS[:3]]
    page = live.ask("GET", "/v1/arrivals?limit=2", "reader").json()
    assert [one["id"] for one in page["arrivals"]] == ids[:2] and page["next"] == ids[1]
    rest = live.ask("GET", f"/v1/arrivals?limit=2&after={page['next']}", "reader").json()
    assert [one["id"] for one in rest["arrivals"]] == ids[2:] and rest["next"] is None
    live.work()
    served = live.ask("GET", "/v1/arrivals?status=promoted", "reader").json()["arrivals"]
    assert [one["id"] for one in served] == ids[2:]
    only = live.ask("GET", "/v1/arrivals?task=task1", "reader").json()["arrivals"]
    assert [one["id"] for one in only] == ids[1:2]
    lineage = live.ask("GET", f"/v1/arrivals/{ids[0]}/lineage", "reader").json()
    assert lineage == {"id": ids[0], "parents": [], "ancestors": [], "descendants": []}
    assert problem(live.ask("GET", "/v1/arrivals/a-999999?wait=1", "reader")) == "arrival.unknown"


def test_operations_roll_back_release_reject_remove_and_purge(make_live: Make, tmp_path: Path) -> None:
    live = make_live(promotion={"mode": "manual"})
    ids = [live.arrive(toys.expert(tmp_path, task), task).json()["id"] for task in toys.TASKS[:3]]
    live.work()
    assert (
        problem(live.ask("POST", f"/v1/arrivals/{ids[0]}/release", "submitter", json={"reason": "x"}))
        == "role.too_low"
    )
    for one in ids[:2]:
        assert live.ask("POST", f"/v1/arrivals/{one}/release", json={"reason": "fine"}).status_code == 200
    refused = live.ask("POST", f"/v1/arrivals/{ids[2]}/reject", json={"reason": "no"}).json()
    assert refused["status"] == "rejected"
    live.work()
    standing = live.ask("GET", "/v1/status").json()["live"]
    assert standing["t"] == 2
    old = {"t": 1, "reason": "complaints", "if_head": standing["head"]}
    assert live.ask("POST", "/v1/rollback", json=old).json()["served"]["t"] == 1
    assert problem(live.ask("POST", "/v1/rollback", json={**old, "t": 0})) == "head.moved"
    assert problem(live.ask("POST", "/v1/rollback", json={"t": 9, "reason": "x"})) == "t.unknown"
    gone = live.ask("DELETE", f"/v1/arrivals/{ids[0]}?reason=takedown&force=true")
    assert gone.status_code == 202 and gone.json()["status"] == "removed"
    busy = live.ask("POST", "/v1/rollback", json={"t": 1, "reason": "x"})
    assert problem(busy) == "removal.running"
    live.work()
    purged = live.ask("DELETE", f"/v1/arrivals/{ids[0]}?reason=takedown&purge=true")
    assert purged.json()["status"] == "purged"
    live.work()
    assert problem(live.announce(toys.expert(tmp_path, "task0"), "task0")) == "arrival.denied"


def test_submitter_withdraws_its_own_and_nothing_else(live: LiveService, tmp_path: Path) -> None:
    (mine, _), (other, _) = live.issue(), live.issue()
    number = live.arrive(toys.expert(tmp_path, "task0"), "task0", mine).json()["id"]
    line = f"/v1/arrivals/{number}?reason=mistake"
    assert problem(live.ask("DELETE", line, other)) == "role.too_low"
    assert problem(live.ask("DELETE", f"{line}&purge=true", mine)) == "role.too_low"
    assert live.ask("DELETE", line, mine).json()["status"] == "withdrawn"
    again = live.arrive(toys.expert(tmp_path, "task0"), "task0", mine).json()["id"]
    live.work()
    assert (
        again != number
        and problem(live.ask("DELETE", f"/v1/arrivals/{again}?reason=x", mine)) == "role.too_low"
    )


def test_replacement_takes_the_place_of_an_arrival_of_the_same_sender(
    live: LiveService, tmp_path: Path
) -> None:
    (mine, _), (other, _) = live.issue(), live.issue()
    old = live.arrive(toys.expert(tmp_path, "task0", 1, size=2.0), "task0", mine).json()["id"]
    live.work()
    path = toys.expert(tmp_path, "task0")
    for key, expected in ((other, 403), (mine, 202)):
        asked = {"task": "task0", "upload": live.upload(path, "task0", key), "owner": "ann"}
        answer = live.ask("PUT", f"/v1/arrivals/{old}/replacement", key, json=asked)
        assert answer.status_code == expected, answer.text
    state = live.work()
    assert [one.arrival for one in state.sequence] == [answer.json()["id"]]


def test_log_is_read_whole_and_its_chain_holds(live: LiveService, tmp_path: Path) -> None:
    live.arrive(toys.expert(tmp_path, "task0"), "task0")
    live.work()
    found: list[Entry] = []
    while True:
        page = live.ask("GET", f"/v1/log?after={len(found)}&limit=3", "reader").json()
        found += [parse(canonical(one), "answer") for one in page["entries"]]
        if not page["entries"]:
            break
    assert page["head"] == live.ask("GET", "/v1/log/head", "reader").json()
    assert fold(chained(found)) == live.home.log.state and found[-1].sha256 == page["head"]["sha256"]


def test_events_are_the_entries_after_the_last_that_was_seen(live: LiveService, tmp_path: Path) -> None:
    live.arrive(toys.expert(tmp_path, "task0"), "task0")
    live.work()
    head = live.ask("GET", "/v1/log/head", "reader").json()["seq"]
    for asked, first in (({"params": {"after": 0, "wait": 0}}, 1), ({"params": {"wait": 0}}, head + 1),
                         ({"params": {"wait": 0}, "headers": {"last-event-id": "2"}}, 3)):  # fmt: skip
        answer = live.ask("GET", "/v1/events", "reader", **asked)
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [
            dict(line.split(": ", 1) for line in one.split("\n"))
            for one in answer.text.split("\n\n")
            if one.startswith("id")
        ]
        assert [int(one["id"]) for one in events] == [*range(first, head + 1)]
        found = [parse(canonical(json.loads(one["data"])), "event") for one in events]
        assert [one.kind for one in found] == [one["event"] for one in events]
    bound, _ = live.issue("reader", owners=["ann"])
    assert problem(live.ask("GET", "/v1/events?wait=0", bound)) == "role.too_low"


def test_promotion_undoes_a_rollback_and_lets_a_held_arrival_go_on(make_live: Make, tmp_path: Path) -> None:
    live = make_live()
    ids = [live.arrive(toys.expert(tmp_path, task), task).json()["id"] for task in ("task0", "task1")]
    live.work()
    live.ask("POST", "/v1/rollback", json={"t": 1, "hold": True, "reason": "x"})
    held = live.arrive(toys.expert(tmp_path, "task2"), "task2").json()["id"]
    live.work()
    answer = live.ask("POST", f"/v1/arrivals/{ids[1]}/promote", json={"reason": "settled"})
    assert answer.status_code == 200 and answer.json()["status"] == "promoted"
    assert not live.home.log.refresh().on_hold
    assert live.ask("POST", f"/v1/arrivals/{held}/promote", json={"reason": "x"}).status_code == 200
    assert live.work().served.arrival == held
    live.ask("DELETE", f"/v1/arrivals/{held}?reason=x&force=true")
    live.work()
    refused = live.ask("POST", f"/v1/arrivals/{held}/promote", json={"reason": "x"})
    assert (refused.status_code, problem(refused)) == (409, "arrival.state")
    assert (
        problem(live.ask("POST", f"/v1/arrivals/{held}/promote", "submitter", json={"reason": "x"}))
        == "role.too_low"
    )


def test_tokens_are_issued_once_bounded_and_revoked(live: LiveService, tmp_path: Path) -> None:
    text, number = live.issue(tasks=["task0"], owners=["ann"], per_day=1, note="ann's machine")
    listed = live.ask("GET", "/v1/tokens").text
    assert number in listed and text not in listed and text.rpartition("_")[2] not in listed
    kept = b"".join(one.read_bytes() for one in live.home.place.rglob("*.json"))
    assert number.encode() in kept and text.encode() not in kept
    first, second = toys.expert(tmp_path, "task0"), toys.expert(tmp_path, "task0", 1)
    assert problem(live.announce(toys.expert(tmp_path, "task1"), "task1", text)) == "task.forbidden"
    assert problem(live.arrive(first, "task0", text, owner="bob")) == "owner.forbidden"
    came = live.arrive(first, "task0", text)
    assert came.status_code == 202 and ";r=0;" in came.headers["ratelimit"]
    assert problem(live.arrive(second, "task0", text)) == "limit.token"
    assert live.arrive(first, "task0", text).status_code == 200  # what came before is no new arrival
    assert problem(live.ask("GET", "/v1/log", text)) == "role.too_low"
    assert problem(live.ask("POST", "/v1/tokens", text, json={"role": "operator"})) == "role.too_low"
    assert live.ask("DELETE", f"/v1/tokens/{number}").status_code == 204
    assert problem(live.ask("GET", "/v1/status", text)) == "token.revoked"
    kinds = [entry.kind for entry in live.home.log.entries()]
    assert kinds.count("token_issued") == kinds.count("token_revoked") == 1


def test_last_operator_token_cannot_be_revoked(live: LiveService) -> None:
    (own,) = [
        one["id"] for one in live.ask("GET", "/v1/tokens").json()["tokens"] if one["role"] == "operator"
    ]
    assert problem(live.ask("DELETE", f"/v1/tokens/{own}")) == "tokens.last"
    live.issue("operator")
    assert problem(live.ask("DELETE", f"/v1/tokens/{'0' * 12}")) == "tokens.unknown"
    assert live.ask("DELETE", f"/v1/tokens/{own}").status_code == 204


def test_owner_sends_no_more_a_day_than_allowed_by_whatever_token(make_live: Make, tmp_path: Path) -> None:
    live = make_live(limits={"per_owner_per_day": 2}, same_task="add")
    (one, _), (two, _) = live.issue(), live.issue()
    experts = [toys.expert(tmp_path, "task0", number) for number in range(4)]
    assert live.arrive(experts[0], "task0", one).status_code == 202
    assert live.arrive(experts[1], "task0", two).status_code == 202
    assert problem(live.arrive(experts[2], "task0", one)) == "limit.owner"
    assert live.arrive(experts[2], "task0", one, owner="bob").status_code == 202
    assert problem(live.arrive(experts[3], "task0", one, owner="eve")) == "limit.token"  # by any name
    assert live.arrive(experts[3], "task0", "operator", owner="eve").status_code == 202


def test_candidate_is_the_challenger_while_it_is_judged(live: LiveService, tmp_path: Path) -> None:
    assert problem(live.ask("GET", "/v1/models/challenger", "reader")) == "model.unknown"
    number = live.arrive(toys.expert(tmp_path, "task0"), "task0").json()["id"]
    state = toys.work(live.home, lambda state: state.arrivals[number].status == "evaluated")
    manifest = live.ask("GET", "/v1/models/challenger", "reader").json()
    candidate = state.arrivals[number].candidate
    assert candidate is not None and manifest["sha256"] == candidate.sha256
    file = manifest["files"][0]
    part = live.ask(
        "GET", f"/v1/models/challenger/files/{file['name']}", "reader", headers={"range": "bytes=0-7"}
    )
    assert (
        part.status_code == 206 and len(part.content) == 8 and part.headers["etag"] == f'"{file["sha256"]}"'
    )


# --- start tickets ----------------------------------------------------------------------------------------------------


def following(tmp_path: Path, start: dict[str, object], task: str, live: LiveService) -> Path:
    """An expert of a task that was trained from the weights of a start."""
    place = tmp_path / f"start-{task}.safetensors"
    weights = f"{start['place']}open_clip_model.safetensors"
    halves = [
        live.ask("GET", weights, "submitter", headers={"range": f"bytes={one}"}) for one in ("0-999", "1000-")
    ]
    assert [one.status_code for one in halves] == [206, 206]
    place.write_bytes(b"".join(one.content for one in halves))
    assert hashlib.sha256(place.read_bytes()).hexdigest() == start["sha256"]
    by = toys.direction(task)
    with Checkpoint.open(place) as opened:
        moved = {
            name: (opened.read(name).reshape(shape) + toys.SIZE * by.get(name, 0)).astype("float32")
            for name, shape in toys.SHAPES.items()
        }
    return save(tmp_path / f"{task}.safetensors", moved)


def test_expert_that_comes_back_with_a_ticket_has_a_known_start(make_live: Make, tmp_path: Path) -> None:
    live = make_live(strategy="best_in_time", admission={"foreign_init": "quarantine", "max_staleness": 1})
    started = live.ask("GET", "/v1/next?task=task1", "submitter").json()
    assert started["sha256"] == live.home.log.state.base.sha256 and started["t"] == 0
    first = live.ask("GET", "/v1/next?task=task0", "submitter").json()
    expert = following(tmp_path, first, "task0", live)
    came = live.arrive(expert, "task0", init_ticket=first["ticket"]).json()["id"]
    live.work()
    second = live.ask("GET", "/v1/next?task=task1", "submitter").json()
    assert second["t"] == 1 and second["sha256"] != first["sha256"]
    late = [live.ask("GET", f"/v1/next?task={task}", "submitter").json() for task in ("task2", "task3")]
    expert = following(tmp_path, second, "task1", live)
    other = live.arrive(expert, "task1", init_ticket=second["ticket"]).json()["id"]
    state = live.work()
    assert [state.shown(one) for one in (came, other)] == ["superseded", "promoted"], state.arrivals[other]
    lineage = live.ask("GET", f"/v1/arrivals/{other}/lineage", "reader").json()
    assert lineage["parents"] == lineage["ancestors"] == [came]
    assert problem(live.ask("DELETE", f"/v1/arrivals/{came}?reason=x")) == "descendants.undecided"
    unknown = live.arrive(toys.expert(tmp_path, "task4"), "task4").json()["id"]
    third = live.arrive(following(tmp_path, late[0], "task2", live), "task2", init_ticket=late[0]["ticket"])
    stale = live.arrive(following(tmp_path, late[1], "task3", live), "task3", init_ticket=late[1]["ticket"])
    state = live.work()
    assert state.arrivals[unknown].reasons == ("provenance.foreign_init",)
    assert state.shown(third.json()["id"]) == "promoted"
    assert state.arrivals[stale.json()["id"]].reasons == ("provenance.stale",)
    asked = f"/v1/arrivals/{came}?reason=x&force=true&descendants=retrain"
    assert live.ask("DELETE", asked).status_code == 202
    assert live.work().sequence == ()
    anew = [other, third.json()["id"]]  # what was accepted; the stale one never was
    assert live.ask("GET", "/v1/status", "reader").json()["live"]["retrain"] == anew
    live.arrive(toys.expert(tmp_path, "task1", 1), "task1", init="base")
    live.work()
    assert live.ask("GET", "/v1/status", "reader").json()["live"]["retrain"] == anew[1:]


def test_tickets_of_others_are_refused_and_write_nothing(live: LiveService, tmp_path: Path) -> None:
    path = toys.expert(tmp_path, "task0")
    ticket = live.ask("GET", "/v1/next?task=task0", "submitter").json()["ticket"]
    elsewhere = live.ask("GET", "/v1/next?task=task1", "submitter").json()["ticket"]
    foreign = Tickets(tmp_path / "other.key", "toy").issue(1, "task0", "0" * 64)[0]
    old = Tickets(live.app.setup.ticket_key, "another").issue(1, "task0", "0" * 64)[0]
    length = live.home.log.state.seq
    for text, code in {
        elsewhere: "ticket.task", foreign: "ticket.invalid", old: "ticket.invalid", ticket[:-2]: "ticket.invalid",
        "tms_.": "ticket.invalid", "tms_\u00e9.x": "ticket.invalid", ticket + "=": "ticket.invalid",
    }.items():  # fmt: skip
        assert problem(live.arrive(path, "task0", init_ticket=text)) == code, text
    assert problem(live.arrive(path, "task0", init_ticket=ticket, init="base")) == "request.invalid"
    assert live.home.log.state.seq == length and not incoming(live)
    assert live.arrive(path, "task0", init_ticket=ticket).status_code == 202
    other = toys.expert(tmp_path, "task0", 1)
    assert problem(live.arrive(other, "task0", init_ticket=ticket)) == "ticket.used"
    kept = b"".join(one.read_bytes() for one in (live.home.place / "log").glob("*.json"))
    assert ticket.encode() not in kept
    with pytest.raises(Refused, match="30 days"):
        Tickets(live.app.setup.ticket_key, "toy").read(ticket, "task0", time.time() + 31 * 24 * 3600)


def test_header_that_claims_gigabytes_is_quarantined(live: LiveService, tmp_path: Path) -> None:
    path = tmp_path / "bomb.safetensors"
    path.write_bytes((5 * 10**9).to_bytes(8, "little") + b"{}")
    number = live.arrive(path, "task0").json()["id"]
    assert live.work().arrivals[number].reasons[0].startswith("format.")
