"""Which requests to a failing server are repeated, and which never are."""

from typing import Any

import pytest

from pipeline.tracking.mlflow.client import (
    ONCE,
    TIMEOUT_VARIABLE,
    TIMEOUTS,
    TRIES,
    Limit,
    PatientClient,
    TooSlow,
)


class Failure(Exception):
    def __init__(self, error_code: str, text: str = "") -> None:
        super().__init__(text or error_code)
        self.error_code = error_code


class Server:
    """Fails so many times before it answers; `seconds` is how long each answer takes on `clock`."""

    def __init__(self, fails: int, error: Exception, seconds: float = 0.0) -> None:
        self.fails, self.error, self.seconds, self.asked, self.now = fails, error, seconds, 0, 0.0

    def clock(self) -> float:
        return self.now

    def __getattr__(self, name: str) -> Any:
        def method(what: str) -> str:
            self.asked, self.now = self.asked + 1, self.now + self.seconds
            if self.asked <= self.fails:
                raise self.error
            return f"{name} {what}"

        return method


def ask(server: Server, name: str = "get_run") -> str:
    return str(getattr(PatientClient(server, clock=server.clock), name)("it"))


@pytest.mark.fault("F11")
@pytest.mark.parametrize(
    "error", [Failure("INTERNAL_ERROR"), ConnectionResetError("lost")], ids=["500", "lost"]
)
def test_question_is_asked_again_until_it_is_answered(error: Exception) -> None:
    server = Server(TRIES - 1, error)
    assert ask(server) == "get_run it" and server.asked == TRIES


@pytest.mark.fault("F11")
def test_question_that_always_fails_is_given_up() -> None:
    server = Server(99, Failure("INTERNAL_ERROR"))
    with pytest.raises(Failure):
        ask(server)
    assert server.asked == TRIES


@pytest.mark.fault("F11")
@pytest.mark.parametrize("name", sorted(ONCE))
def test_request_that_makes_something_new_is_sent_once(name: str) -> None:
    server = Server(1, ConnectionResetError("lost"))
    with pytest.raises(ConnectionResetError):
        ask(server, name)
    assert server.asked == 1


@pytest.mark.fault("F11")
@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (Failure("RESOURCE_DOES_NOT_EXIST"), 0.0),
        (ValueError("ours"), 0.0),
        (ConnectionResetError("late"), 5.0),
    ],
    ids=["a no", "our mistake", "an answer that hung"],
)
def test_what_another_try_cannot_mend_or_would_wait_for_again_is_not_asked_again(
    error: Exception, seconds: float
) -> None:
    server = Server(1, error, seconds)
    with pytest.raises(type(error)):
        ask(server)
    assert server.asked == 1


def test_server_that_takes_longer_is_given_longer_and_both_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT

    monkeypatch.delenv(TIMEOUT_VARIABLE, raising=False)
    monkeypatch.setattr(MLFLOW_HTTP_REQUEST_TIMEOUT, "default", 1)
    limit = Limit()
    for seconds, then in zip(TIMEOUTS, [*TIMEOUTS[1:], None], strict=True):
        server = Server(1, Failure("INTERNAL_ERROR", "Read timed out."), seconds)
        with pytest.raises(TooSlow, match=f"more than {seconds} s") as caught:
            PatientClient(server, limit, server.clock).get_run("it")
        assert server.asked == 1
        assert (f"{then} s" if then else TIMEOUT_VARIABLE) in str(caught.value)
        assert MLFLOW_HTTP_REQUEST_TIMEOUT.get() == limit.seconds == (then or seconds)


def test_time_limit_of_the_user_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TIMEOUT_VARIABLE, "45")
    server, limit = Server(1, Failure("INTERNAL_ERROR", "failed with timeout exception"), 45), Limit()
    assert limit.seconds == 45
    with pytest.raises(TooSlow, match=TIMEOUT_VARIABLE):
        PatientClient(server, limit, server.clock).create_run("it")
    assert limit.seconds == 45


def test_every_answer_counts_as_a_sign_of_life_also_a_no() -> None:
    limit = Limit()
    for error, answers in ((Failure("INTERNAL_ERROR"), False), (Failure("RESOURCE_DOES_NOT_EXIST"), True)):
        server = Server(99, error, 1.5)
        with pytest.raises(Failure):
            PatientClient(server, limit, server.clock).get_run("it")
        assert (limit.moved > 0) is answers


def test_database_that_is_locked_for_long_is_no_slow_server() -> None:
    server, limit = Server(1, Failure("TEMPORARILY_UNAVAILABLE", "database is locked"), 60), Limit()
    before = limit.seconds
    with pytest.raises(Failure, match="locked"):
        PatientClient(server, limit, server.clock).get_run("it")
    assert limit.seconds == before
