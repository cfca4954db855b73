"""Tokens open what their role says until they end, and no file but the first one's holds any."""

import json
import re
import stat
import time
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.service.tokens import DAY, FORM, Token, TokenRefused, Tokens


def refusal(tokens: Tokens, text: str, now: float | None = None) -> str:
    with pytest.raises(TokenRefused) as refused:
        tokens.find(text, now)
    return refused.value.code


def test_issued_token_is_found_by_every_process_until_it_expires_or_is_revoked(tmp_path: Path) -> None:
    mine, theirs = Tokens(tmp_path / "tokens.json"), Tokens(tmp_path / "tokens.json")
    assert refusal(theirs, "tmk_none") == "token.unknown"
    text, token = mine.issue("submitter", days=2, bounds={"tasks": ("animals",), "per_day": 5})
    assert theirs.find(text) == token and token.tasks == ("animals",)
    assert refusal(theirs, text, token.created + 2 * DAY) == "token.expired"
    assert mine.revoke(token.id) and not mine.revoke("0" * 12)
    assert refusal(theirs, text) == "token.revoked"
    assert [one.id for one in theirs.every()] == [token.id]


def test_file_holds_digests_only_and_is_its_owners(tmp_path: Path) -> None:
    text, token = Tokens(tmp_path / "tokens.json").issue("reader")
    kept = (tmp_path / "tokens.json").read_text()
    form = FORM.fullmatch(text)
    assert form and form[1] == token.id and form[2] not in kept and text not in kept
    assert stat.S_IMODE((tmp_path / "tokens.json").stat().st_mode) == 0o600
    assert json.loads(kept)[0]["sha256"] == token.sha256


def test_another_secret_under_a_known_id_opens_nothing(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path / "tokens.json")
    one, two = tokens.issue("operator")[0], tokens.issue("reader")[0]
    mixed = one[: one.rindex(re.split("tmk_.{12}_", one)[1])] + re.split("tmk_.{12}_", two)[1]
    for text in (mixed, one + "a", one[:-1], one.upper(), f" {one}", "", one + "\n"):
        assert refusal(tokens, text) == "token.unknown"


def test_roles_include_those_before_them() -> None:
    now = time.time()
    reader, submitter, operator = (Token("0", "", role, now) for role in ("reader", "submitter", "operator"))
    assert [one.may("submitter") for one in (reader, submitter, operator)] == [False, True, True]
    assert [one.may("operator") for one in (reader, submitter, operator)] == [False, False, True]


def test_first_token_is_written_once_for_its_owner_only(tmp_path: Path) -> None:
    tokens, file = Tokens(tmp_path / "tokens.json"), tmp_path / "service.token"
    assert tokens.first(file) is True
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert tokens.find(file.read_text().strip()).role == "operator"
    assert tokens.first(file) is False
    (tmp_path / "tokens.json").unlink()
    with pytest.raises(ConfigError, match="Remove the file"):
        Tokens(tmp_path / "tokens.json").first(file)
