"""The page of a service: who gets in, what a form needs to act, and that nothing a stranger wrote is markup."""

import re
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import httpx2
import pytest
from starlette.testclient import TestClient

from merge_service.live import FINAL
from pipeline.service.home import Home
from pipeline.service.page.sessions import COOKIE, SECONDS, Sessions
from pipeline.service.tokens import Role, Tokens
from tests.pipeline.service import toys
from tests.pipeline.service.page_toys import HOSTILE, application, crowded


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    return Tokens(tmp_path / "tokens.json")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A service whose second of three arrivals is quarantined."""
    opened = toys.home(tmp_path / "out")
    for number, size in enumerate((toys.SIZE, 100 * toys.SIZE, toys.SIZE)):
        task = toys.TASKS[number]
        toys.arrive(opened, toys.expert(tmp_path, task, size=size), task, note=HOSTILE)
    return opened


@pytest.fixture
def client(home: Home, tokens: Tokens, tmp_path: Path) -> Iterator[TestClient]:
    with TestClient(application(home, tmp_path, tokens), base_url="http://localhost") as opened:
        yield opened


class Tags(HTMLParser):
    """What a browser would make of a page: tags, attributes, and where links and forms lead."""

    def __init__(self) -> None:
        super().__init__()
        self.names, self.attributes, self.targets = set[str](), set[str](), list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.targets += [value or "" for name, value in attrs if name in ("href", "src", "action")]


def sign_in(client: TestClient, tokens: Tokens, role: Role = "operator", **bounds: object) -> httpx2.Response:
    text, _ = tokens.issue(role, bounds=bounds)
    return client.post("/page/login", data={"token": text}, follow_redirects=False)


def csrf(client: TestClient, path: str = "/") -> str:
    found = re.search(r'name="csrf" value="([0-9a-f]{64})"', client.get(path).text)
    assert found is not None
    return found[1]


def test_token_is_exchanged_for_a_cookie_that_scripts_and_other_sites_do_not_get(
    client: TestClient, tokens: Tokens
) -> None:
    assert 'name="token"' in client.get("/").text
    assert client.post("/page/login", data={"token": "tmk_" + "0" * 12 + "_" + "a" * 43}).status_code == 401
    answer = sign_in(client, tokens)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    said = answer.headers["set-cookie"].lower()
    assert "httponly" in said and "samesite=strict" in said and f"max-age={SECONDS}" in said
    assert "a-000003" in client.get("/").text
    client.post("/page/logout")
    assert 'name="token"' in client.get("/").text


def test_every_answer_forbids_scripts_and_other_hosts(client: TestClient, tokens: Tokens, home: Home) -> None:
    sign_in(client, tokens)
    for path in (
        "/",
        *(f"/page/arrivals/{name}" for name in home.log.state.arrivals),
        "/page/arrivals/a-999999",
    ):
        answer = client.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script" not in policy and "unsafe" not in policy
        assert answer.headers["cache-control"] == "no-store"
        tags = Tags()
        tags.feed(answer.text)
        assert not tags.names & {"script", "img", "iframe", "object", "base", "style"}
        assert not any(name.startswith("on") or name == "style" for name in tags.attributes)
        assert tags.targets and all(
            one.startswith(("/", "#")) and not one.startswith("//") for one in tags.targets
        )


def test_form_acts_only_with_the_mac_of_its_own_session_and_from_its_own_site(
    client: TestClient, tokens: Tokens, home: Home
) -> None:
    sign_in(client, tokens)
    other = csrf(client)
    sign_in(client, tokens)
    mine, before = csrf(client), home.log.state.seq
    body = {"t": "1", "reason": "tests"}
    for wrong in ({}, {"csrf": ""}, {"csrf": other}):
        assert client.post("/page/rollback", data={**body, **wrong}).status_code == 403
    for headers in ({"origin": "http://evil.example"}, {"sec-fetch-site": "cross-site"}, {"origin": "null"}):
        answer = client.post("/page/rollback", data={**body, "csrf": mine}, headers=headers)
        assert answer.status_code == 403
    assert client.post("/page/rollback", data={**body, "csrf": mine, "reason": " "}).status_code == 422
    for odd in ("", "-1", "x", "²", "1" * 5000):
        assert client.post("/page/rollback", data={**body, "t": odd, "csrf": mine}).status_code == 409
    assert home.log.refresh().seq == before
    answer = client.post("/page/rollback", data={**body, "csrf": mine, "hold": "yes"})
    assert answer.status_code == 200 and "On hold" in answer.text
    state = home.log.refresh()
    assert (state.served.t, state.on_hold) == (1, True)
    assert client.post("/page/rollback", data={"t": "7", "reason": "x", "csrf": mine}).status_code == 409


@pytest.mark.parametrize("role", ["reader", "submitter"])
def test_others_than_operators_see_and_do_not_act(
    client: TestClient, tokens: Tokens, home: Home, role: Role
) -> None:
    sign_in(client, tokens, role, owners=("ann",))
    text = client.get("/").text + client.get("/page/arrivals/a-000003").text
    assert "a-000003" in text and 'name="csrf"' not in text
    cookie = client.cookies.get(COOKIE)
    assert cookie is not None
    session = Sessions(tokens, Path(home.out).parent / "page.key").find(cookie)
    assert session is not None
    body = {"reason": "x", "csrf": session.csrf}
    assert client.post("/page/arrivals/a-000003/remove", data=body).status_code == 403


def test_stopped_arrival_is_released_and_an_accepted_one_removed(
    client: TestClient, tokens: Tokens, home: Home
) -> None:
    state = home.log.state
    names = [*state.arrivals]
    assert [state.shown(name) for name in names] == ["superseded", "quarantined", "promoted"]
    sign_in(client, tokens)
    place = f"/page/arrivals/{names[1]}"
    page = client.get(place).text
    assert "geometry.norm" in page and "Release" in page and HOSTILE not in page
    client.post(f"{place}/release", data={"csrf": csrf(client, place), "reason": "measured by hand"})
    assert home.log.refresh().arrivals[names[1]].status == "received"
    place = f"/page/arrivals/{names[0]}"
    client.post(f"{place}/remove", data={"csrf": csrf(client, place), "reason": "takedown", "force": "yes"})
    after = toys.work(home)
    assert after.arrivals[names[0]].status == "removed"
    assert all(one.status in FINAL for one in after.arrivals.values())
    assert client.post(f"{place}/explode", data={"csrf": csrf(client), "reason": "x"}).status_code == 404


def test_session_ends_with_its_token_after_eight_hours_or_when_altered(
    tokens: Tokens, tmp_path: Path
) -> None:
    text, token = tokens.issue("operator")
    sessions, now = Sessions(tokens, tmp_path / "page.key"), time.time()
    assert (tmp_path / "page.key").stat().st_mode & 0o777 == 0o600
    cookie = sessions.begin(text)
    again = Sessions(Tokens(tmp_path / "tokens.json"), tmp_path / "page.key")
    found, other = sessions.find(cookie), again.find(cookie)
    assert found is not None and other is not None and found.csrf == other.csrf
    assert sessions.find(cookie, now + SECONDS + 1) is None
    body, _, mac = cookie.rpartition(".")
    for wrong in (
        "",
        ".",
        cookie[:-1],
        f"{body}.{'0' * 64}",
        f"{body}0.{mac}",
        f"é{cookie}",
        cookie.replace(".", ".."),
    ):
        assert sessions.find(wrong) is None
    tokens.revoke(token.id)
    assert sessions.find(cookie) is None


def test_thousand_arrivals_are_paged_and_a_page_stays_small(
    home: Home, tokens: Tokens, tmp_path: Path
) -> None:
    many = crowded(toys.home(tmp_path / "many"), tmp_path / "log", 1000)
    with TestClient(application(many, tmp_path, tokens), base_url="http://localhost") as client:
        sign_in(client, tokens)
        first, last = client.get("/").text, client.get("/?page=20").text
        assert client.get("/?page=999").text.count("<tr") == last.count("<tr") == first.count("<tr") == 51
        assert "Page 1 of 20" in first and len(first) < 300_000
        assert "Page 20 of 20" in last
        assert client.get("/?page=x").status_code == 422
