"""What the service answers over HTTP, and what it refuses, with which code."""

import io
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from merge_service.checkpoints import CONFIG_FILE, WEIGHTS_FILE
from pipeline.service.http.problems import CODES, MEDIA_TYPE
from pipeline.service.tokens import Tokens
from tests.pipeline.service.conftest import Service
from tests.serving_toys import LABELS, Zoo, picture, sha256_of

PNG = {"content-type": "image/png"}
ASK = {"labels": list(LABELS), "templates": ["a {c} thing"]}


def problem(answer: Any) -> str:
    """The code of a problem, whose form is checked."""
    assert answer.headers["content-type"] == MEDIA_TYPE, answer.text
    body = answer.json()
    status, title, _ = CODES[body["code"]]
    assert (answer.status_code, body["status"], body["title"]) == (status, status, title)
    assert body["type"] == f"/problems/{body['code']}" and body["instance"].startswith("urn:uuid:")
    for word in ("Traceback", "/tmp", "site-packages", ".py"):
        assert word not in answer.text
    return str(body["code"])


def test_picture_as_body_and_as_part_of_a_form_get_the_same_answer(service: Service, zoo: Zoo) -> None:
    plain = service.ask("POST", "/v1/classify", content=picture(), headers=PNG, params={**ASK, "top": 2})
    form = service.ask(
        "POST", "/v1/classify", files=[("image", ("a.png", picture(), "image/png"))], data={**ASK, "top": "2"}
    )
    assert plain.status_code == 200, plain.text
    assert plain.json() == form.json()
    served = zoo.served(0)
    assert plain.json()["model"] == {"t": 0, "sha256": served.sha256, "arrival": served.arrival}
    assert (plain.headers["x-model-t"], plain.headers["x-model-sha256"]) == ("0", served.sha256)
    assert plain.headers["x-arrival"] == served.arrival
    (seen,) = plain.json()["results"]
    assert len(seen["top"]) == 2 and seen["top"][0] == {key: seen[key] for key in ("label", "probability")}
    assert seen["top"][0]["probability"] >= seen["top"][1]["probability"] and seen["label"] in LABELS


def test_several_pictures_are_answered_in_their_order(service: Service) -> None:
    files = [("image", (f"{n}.webp", picture(n, kind="WEBP"), "image/webp")) for n in range(4)]
    together = service.ask("POST", "/v1/embed/image", files=files).json()["embeddings"]
    for number, vector in enumerate(together):
        alone = service.ask(
            "POST",
            "/v1/embed/image",
            content=picture(number, kind="WEBP"),
            headers={"content-type": "image/webp"},
        ).json()["embeddings"][0]
        assert np.allclose(alone, vector, atol=1e-5)
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_texts_are_embedded(service: Service) -> None:
    found = service.ask("POST", "/v1/embed/text", json={"texts": ["a red thing", "a blue thing"]})
    assert found.status_code == 200 and np.array(found.json()["embeddings"]).shape == (2, 16)
    assert found.headers["x-model-t"] == "0"


def test_registered_label_set_answers_as_its_labels(service: Service) -> None:
    body = {"names": ASK["labels"], "templates": ASK["templates"]}
    assert problem(service.ask("PUT", "/v1/label-sets/colours", json=body)) == "role.too_low"
    assert service.ask("PUT", "/v1/label-sets/colours", "operator", json=body).status_code == 201
    assert service.ask("PUT", "/v1/label-sets/colours", "operator", json=body).status_code == 200
    assert service.ask("GET", "/v1/label-sets").json() == {"names": ["colours"]}
    assert service.ask("GET", "/v1/label-sets/colours").json()["names"] == list(LABELS)
    named = service.ask(
        "POST", "/v1/classify", content=picture(), headers=PNG, params={"label_set": "colours"}
    )
    listed = service.ask("POST", "/v1/classify", content=picture(), headers=PNG, params=ASK)
    assert named.json() == listed.json()
    assert service.ask("DELETE", "/v1/label-sets/colours", "operator").status_code == 204
    assert problem(service.ask("GET", "/v1/label-sets/colours")) == "labels.unknown"
    gone = service.ask(
        "POST", "/v1/classify", content=picture(), headers=PNG, params={"label_set": "colours"}
    )
    assert problem(gone) == "labels.unknown"


def test_new_head_is_served_and_weights_that_cannot_load_are_reported(service: Service, zoo: Zoo) -> None:
    def status() -> dict[str, Any]:
        found: dict[str, Any] = service.ask("GET", "/v1/status").json()["serving"]
        return found

    def until(condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        for _ in range(2000):
            if condition(found := status()):
                return found
            time.sleep(0.01)
        raise AssertionError(found)

    damaged, code = zoo.damaged("truncated")
    service.head.write(damaged)
    found = until(lambda now: now["problem"] is not None)
    assert (found["problem"], found["served"]["t"], found["wanted"]["t"]) == (code, 0, damaged.t)
    assert service.ask("POST", "/v1/embed/text", json={"texts": ["x"]}).headers["x-model-t"] == "0"
    service.head.write(zoo.served(2))
    found = until(lambda now: now["served"]["t"] == 2)
    assert (found["problem"], found["wanted"]) == (None, found["served"])
    service.head.write(zoo.served(0), [zoo.served(1)])
    until(lambda now: now["served"]["t"] == 0)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ({"content": picture(), "headers": PNG}, "labels.missing"),
        ({"content": picture(), "headers": PNG, "params": {"labels": ["a", "a"]}}, "labels.wrong"),
        ({"content": picture(), "headers": PNG, "params": {"labels": ["a"], "templates": ["none"]}}, "labels.wrong"),
        ({"content": picture(), "headers": PNG, "params": {"labels": ["a"], "label_set": "b"}}, "labels.wrong"),
        ({"content": picture(), "headers": PNG, "params": {"label_set": "unheard-of"}}, "labels.unknown"),
        ({"content": picture(), "headers": PNG, "params": {"label_set": "../../etc/passwd"}}, "labels.wrong"),
        ({"content": picture(), "headers": PNG, "params": {**ASK, "top": 0}}, "request.invalid"),
        ({"content": picture(), "headers": PNG, "params": {**ASK, "model": "5"}}, "request.invalid"),
        ({"content": picture(), "headers": PNG, "params": {"labels": ["a\x00"]}}, "request.invalid"),
        ({"content": picture(), "headers": PNG, "params": {"labels": ["a" * 1001]}}, "request.invalid"),
        (
            {"content": picture(), "headers": PNG, "params": {"labels": [f"{n}" for n in range(600)], "templates": ["a {c}", "b {c}"]}},
            "labels.too_many",
        ),
        ({"content": picture(), "headers": {"content-type": "image/gif"}, "params": ASK}, "request.media_type"),
        ({"json": {"image": "aGk="}, "params": ASK}, "request.media_type"),
        ({"content": b"", "headers": PNG, "params": ASK}, "picture.missing"),
        ({"content": b"nothing", "headers": PNG, "params": ASK}, "picture.unreadable"),
        ({"content": picture()[:200], "headers": PNG, "params": ASK}, "picture.unreadable"),
        ({"files": [("image", ("a", b"", "image/png"))], "data": ASK}, "picture.missing"),
        ({"files": [("image", ("a", picture(), "image/png")), ("other", ("b", b"x", "text/plain"))], "data": ASK}, "request.invalid"),
        ({"files": [("image", ("a", picture(), "image/png"))], "data": {**ASK, "unknown": "1"}}, "request.invalid"),
        ({"files": [("image", ("a", picture(), "image/png"))], "data": ASK, "params": {"top": 3}}, "request.invalid"),
        ({"files": [("image", (f"{n}", picture(), "image/png")) for n in range(33)], "data": ASK}, "picture.too_many"),
        ({"files": [("image", (f"{n}", b"x", "image/png")) for n in range(200)], "data": ASK}, "request.malformed"),
        ({"content": b"--x\r\nbroken", "headers": {"content-type": "multipart/form-data; boundary=x"}}, "request.malformed"),
        ({"content": b"--y\r\n\r\n--x--", "headers": {"content-type": "multipart/form-data; boundary=x"}}, "request.malformed"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, "request.malformed"),
    ],
)  # fmt: skip
def test_request_that_cannot_be_answered_has_its_code(
    service: Service, asked: dict[str, Any], code: str
) -> None:
    assert problem(service.ask("POST", "/v1/classify", **asked)) == code


def test_form_that_was_cut_off_loses_no_picture_silently(service: Service) -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + picture() + b"\r\n"
    headers = {"content-type": 'multipart/form-data; boundary="x"'}
    for body, status in ((part + part + b"--x--\r\n", 200), (part + part, 400), (part + part[:-9], 400)):
        answer = service.ask("POST", "/v1/embed/image", content=body, headers=headers)
        assert answer.status_code == status, answer.text


def test_bad_picture_among_good_ones_is_named(service: Service) -> None:
    files = [("image", (f"{n}", data, "image/png")) for n, data in enumerate([picture(), b"bad", picture()])]
    answer = service.ask("POST", "/v1/classify", files=files, data=ASK)
    assert problem(answer) == "picture.unreadable"
    assert [mistake["pointer"] for mistake in answer.json()["errors"]] == ["/image/1"]


def test_bomb_is_refused_and_answers_go_on(service: Service) -> None:
    out = io.BytesIO()
    Image.new("1", (9000, 9000)).save(out, "PNG")
    answer = service.ask("POST", "/v1/classify", content=out.getvalue(), headers=PNG, params=ASK)
    assert problem(answer) == "picture.pixels" and "25,000,000" in answer.json()["detail"]
    assert service.ask("POST", "/v1/classify", content=picture(), headers=PNG, params=ASK).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b'{"texts": []}',
        b'{"texts": "a"}',
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"texts": ["\\ud800"]}',
    ],
)
def test_text_body_that_is_wrong_is_refused(service: Service, body: bytes) -> None:
    answer = service.ask("POST", "/v1/embed/text", content=body, headers={"content-type": "application/json"})
    assert problem(answer) in ("request.invalid", "request.malformed")


def test_unknown_address_and_method_are_problems(service: Service) -> None:
    assert problem(service.ask("GET", "/v1/nothing")) == "request.unknown"
    answer = service.ask("PUT", "/v1/classify")
    assert problem(answer) == "request.method" and answer.headers["allow"] == "POST"


def test_size_is_refused_before_the_token_and_before_any_byte(service: Service) -> None:
    def never() -> Any:
        raise AssertionError("the body was read")
        yield b""

    headers = {"content-length": str(33 << 20), **PNG}
    answer = service.ask("POST", "/v1/classify", None, content=never(), headers=headers)
    assert problem(answer) == "request.too_large" and "33,554,432" in answer.json()["detail"]


# --- who may -------------------------------------------------------------------------------------------------------------


def test_token_is_needed_and_must_be_valid(service: Service) -> None:
    tokens = Tokens(service.setup.tokens)
    text, token = tokens.issue("reader")
    expired, _ = tokens.issue("reader", days=-1)
    for sent, code in (
        (None, "token.missing"),
        ("Basic YTpi", "token.missing"),
        ("Bearer ", "token.unknown"),
        ("Bearer nonsense", "token.unknown"),
        (f"Bearer {text[:-1]}{'a' if text[-1] != 'a' else 'b'}", "token.unknown"),
        (f"Bearer tmk_{'0' * 12}_{'a' * 43}", "token.unknown"),
        (f"Bearer {expired}", "token.expired"),
    ):
        answer = service.ask("GET", "/v1/status", None, headers={"authorization": sent} if sent else {})
        assert problem(answer) == code and answer.headers["www-authenticate"] == "Bearer"
    good = {"authorization": f"Bearer {text}"}
    assert service.ask("GET", "/v1/status", None, headers=good).status_code == 200
    tokens.revoke(token.id)
    assert problem(service.ask("GET", "/v1/status", None, headers=good)) == "token.revoked"


def test_probes_and_documents_are_open_on_loopback_and_need_a_token_behind_a_proxy(
    service: Service, make_service: Callable[..., Service]
) -> None:
    probes = ("/healthz", "/readyz", "/metrics")
    for path in (*probes, "/openapi.json", "/problems/token.missing"):
        assert service.ask("GET", path, None).status_code == 200
    behind = make_service(listen={"behind_proxy": True, "hosts": ["merge.example"]})
    for path in probes:
        assert problem(behind.ask("GET", path, None)) == "token.missing"
        assert behind.ask("GET", path).status_code == 200
    assert behind.ask("GET", "/v1/status", headers={"host": "merge.example"}).status_code == 200
    assert problem(service.ask("GET", "/v1/status", headers={"host": "merge.example"})) == "host.unknown"


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "", "127.0.0.1.evil", "[::2]", "localhost@evil"]
)
def test_host_header_of_another_name_is_refused(service: Service, host: str) -> None:
    assert problem(service.ask("GET", "/v1/status", headers={"host": host})) == "host.unknown"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8420", "127.0.0.1:1", "[::1]:80", "[::1]"])
def test_host_header_of_this_machine_is_taken(service: Service, host: str) -> None:
    assert service.ask("GET", "/v1/status", headers={"host": host}).status_code == 200


# --- models --------------------------------------------------------------------------------------------------------------


def test_model_is_downloaded_whole_in_parts_and_only_if_it_changed(service: Service, zoo: Zoo) -> None:
    manifest = service.ask("GET", "/v1/models/champion").json()
    assert (manifest["t"], manifest["sha256"], manifest["seq"]) == (0, zoo.served(0).sha256, 1)
    files = {file["name"]: file for file in manifest["files"]}
    assert files.keys() == {WEIGHTS_FILE, CONFIG_FILE}
    for name, file in files.items():
        answer = service.ask("GET", f"/v1/models/champion/files/{name}")
        data = (zoo.home / name).read_bytes()
        assert answer.content == data and len(data) == file["bytes"]
        assert answer.headers["etag"] == f'"{file["sha256"]}"' == f'"{sha256_of(zoo.home / name)}"'
    path, data = f"/v1/models/0/files/{WEIGHTS_FILE}", (zoo.home / WEIGHTS_FILE).read_bytes()
    tag = f'"{files[WEIGHTS_FILE]["sha256"]}"'
    for asked, start, stop in (
        ("bytes=100-199", 100, 200),
        ("bytes=-50", len(data) - 50, len(data)),
        ("bytes=200-", 200, len(data)),
    ):
        part = service.ask("GET", path, headers={"range": asked, "if-range": tag})
        assert part.status_code == 206 and part.content == data[start:stop]
        assert part.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(data)}"
    other = service.ask("GET", path, headers={"range": "bytes=100-199", "if-range": '"other"'})
    assert other.status_code == 200 and other.content == data
    for ignored in ("bytes=9-3", "bytes=0-1,4-5", "lines=1-2", "bytes=-"):
        assert service.ask("GET", path, headers={"range": ignored}).status_code == 200
    for beyond in (f"bytes={len(data)}-", "bytes=-0"):
        answer = service.ask("GET", path, headers={"range": beyond})
        assert problem(answer) == "range.unsatisfiable"
        assert answer.headers["content-range"] == f"bytes */{len(data)}"
    assert service.ask("GET", path, headers={"if-none-match": tag}).status_code == 304
    head = service.ask("HEAD", path)
    assert head.content == b"" and head.headers["content-length"] == str(len(data))


def test_model_that_is_not_kept_and_file_that_is_none_are_refused(service: Service) -> None:
    assert service.ask("GET", "/v1/models/1").json()["t"] == 1
    for which in ("7", "challenger", "-1", "01", "champion%00", "1e3"):
        assert problem(service.ask("GET", f"/v1/models/{which}")) in ("model.unknown", "request.invalid")
    for name in ("..%2f..%2fetc%2fpasswd", "open_clip_config.json%00", "none", "%2e%2e"):
        assert problem(service.ask("GET", f"/v1/models/0/files/{name}")) in (
            "model.unknown",
            "request.unknown",
            "request.invalid",
        )


# --- numbers -------------------------------------------------------------------------------------------------------------


def test_metrics_count_by_route_status_and_role_and_by_nothing_that_clients_choose(service: Service) -> None:
    service.ask("GET", "/v1/status")
    service.ask("GET", "/v1/secret-of-a-client")
    service.ask("GET", "/v1/status", None)
    service.ask("GET", "/v1/models/12345")
    text = service.ask("GET", "/metrics", None).text
    assert 'tm_requests_total{role="reader",route="/v1/status",status="200"}' in text
    assert 'tm_requests_total{role="reader",route="/v1/models/{which}",status="404"}' in text
    assert 'tm_auth_failures_total{code="token.missing"}' in text
    for name in (
        "tm_request_seconds_bucket",
        "tm_batch_size_count",
        "tm_queue",
        "tm_served_t",
        "tm_swap_seconds_count",
    ):
        assert name in text
    assert "secret" not in text and "12345" not in text


def test_queue_that_is_full_says_when_to_come_again(
    make_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    from workers.serving.batcher import Batcher, Busy

    one = make_service()

    async def full(self: Any, work: Any) -> Any:
        raise Busy(7)

    monkeypatch.setattr(Batcher, "submit", full)
    answer = one.ask("POST", "/v1/embed/text", json={"texts": ["x"]})
    assert problem(answer) == "service.busy" and answer.headers["retry-after"] == "7"


def test_bodies_beyond_what_the_process_holds_are_refused_and_then_taken_again(
    make_service: Callable[..., Service],
) -> None:
    from pipeline.service.http.door import Door

    one = make_service(limits={"held_bytes": 1 << 20, "body_bytes": 1 << 20, "picture_bytes": 1 << 20})
    door = one.client.app
    assert isinstance(door, Door)
    door._held = 1 << 20
    answer = one.ask("POST", "/v1/embed/text", json={"texts": ["x"]})
    assert problem(answer) == "service.busy" and answer.headers["retry-after"] == "1"
    door._held = 0
    assert one.ask("POST", "/v1/embed/text", json={"texts": ["x"]}).status_code == 200
    assert one.ask("POST", "/v1/embed/text", json={"texts": []}).status_code == 422
    assert door._held == 0


def test_full_disk_is_said_and_what_is_registered_goes_on(
    make_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from workers.serving.labels import LabelSets

    one = make_service()

    def full(*_: Any) -> bool:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LabelSets, "put", full)
    answer = one.ask("PUT", "/v1/label-sets/a", "operator", json={"names": ["x"]})
    assert problem(answer) == "service.full" and answer.status_code == 507
    assert one.ask("POST", "/v1/embed/text", json={"texts": ["x"]}).status_code == 200


def test_nothing_promoted_yet_is_said_by_probe_and_answer(make_service: Callable[..., Service]) -> None:
    one = make_service(promoted=False)
    for answer in (one.ask("GET", "/readyz", None), one.ask("POST", "/v1/embed/text", json={"texts": ["x"]})):
        assert problem(answer) == "model.none" and answer.headers["retry-after"]
    assert problem(one.ask("GET", "/v1/models/champion")) == "model.unknown"
    assert one.ask("GET", "/healthz", None).json() == {"ok": True}


def test_defect_is_a_problem_without_its_details(
    make_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from workers.serving.serving import Serving

    one = make_service()

    async def defect(self: Any, work: Any, session: str) -> Any:
        raise KeyError("/tmp/secret.py")

    monkeypatch.setattr(Serving, "answer", defect)
    answer = one.ask("POST", "/v1/embed/text", json={"texts": ["x"]})
    assert problem(answer) == "service.failed" and "secret" in caplog.text


def test_every_code_has_a_page_and_is_in_the_documentation(service: Service) -> None:
    page = (Path(__file__).parents[3] / "docs" / "serving.md").read_text()
    table = page.partition("## Errors")[2].partition("\n## ")[0]
    for code, (status, title, do) in CODES.items():
        row = next(line for line in table.splitlines() if f"`{code}`" in line)
        assert str(status) in row
        said = service.ask("GET", f"/problems/{code}", None).text
        assert title in said and do in said
    assert set(re.findall(r"`([a-z]+\.[a-z_]+)`", table)) <= CODES.keys()
    assert problem(service.ask("GET", "/problems/none", None)) == "request.unknown"
