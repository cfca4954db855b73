"""The server behind `ui`: a port that is taken, a server that dies, and one that is somebody else's."""

import socket
import subprocess
import sys
from typing import Any

import pytest

from pipeline.errors import TrackingError
from pipeline.tracking.mlflow.ui import WORD, WORD_HEADER
from pipeline.tracking.mlflow.ui_server import check_port, serve
from tests.world import free_port

SERVER = """
import os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Door(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header(sys.argv[2], os.environ.get(sys.argv[3], "")); self.end_headers()
HTTPServer(("127.0.0.1", int(sys.argv[1])), Door).serve_forever()
"""


def server_on(port: int, variable: str = WORD) -> list[str]:
    return [sys.executable, "-c", SERVER, str(port), WORD_HEADER, variable]


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_port_that_another_program_has_is_refused_with_one_that_is_free(address: str, cli: Any) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((address, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(Exception, match=f"--port {port}: .*another program.*--port") as caught:
            check_port(port)
        assert getattr(caught.value, "exit_code", 2) == 2
    check_port(port)


def test_server_is_named_once_it_answers_and_ended_with_the_command() -> None:
    port = free_port()
    said: list[str] = []

    def ready() -> None:
        said.append("ready")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        serve(server_on(port), f"http://127.0.0.1:{port}/", ready)
    assert said == ["ready"]
    check_port(port)


def test_server_that_ends_before_it_answers_is_an_error_and_is_never_named() -> None:
    with pytest.raises(TrackingError, match="ended with 3"):
        serve(
            [sys.executable, "-c", "raise SystemExit(3)"], "http://127.0.0.1:9/", lambda: pytest.fail("named")
        )


def test_answer_of_another_program_on_the_port_is_not_taken_for_the_servers() -> None:
    """Both began at once and the other was quicker: it answers, and the one that was started ends with code 0, as MLflow does."""
    port = free_port()
    other = subprocess.Popen(server_on(port, "HOME"))
    try:
        wait = (
            f"import socket, time\nwhile socket.socket().connect_ex(('127.0.0.1', {port})): time.sleep(.05)"
        )
        with pytest.raises(TrackingError, match="ended with 0"):
            serve([sys.executable, "-c", wait], f"http://127.0.0.1:{port}/", lambda: pytest.fail("named"))
    finally:
        other.kill()
        other.wait()
