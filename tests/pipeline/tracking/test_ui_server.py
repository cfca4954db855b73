"""The server behind `ui`: a port that is taken, a server that fails, and one of another program."""

import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import TrackingError
from pipeline.plan.file import write
from pipeline.tracking.mlflow.ui import WORD, WORD_HEADER
from pipeline.tracking.mlflow.ui_server import check_port, serve
from tests.servers import free_port

ROOT = Path(__file__).parents[3]
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


def test_ctrl_c_ends_ui_in_order_and_without_a_word(make_study: Any) -> None:
    """The command as a person runs it: it prints the address once it answers, and ends with 0 on Ctrl-C."""
    study, port = make_study("out", strategies=("zero_shot",), tasks=("animals",)), free_port()
    outbox = study.outbox()
    study.tell(outbox)
    outbox.close()
    write(study.plan, study.out / "plan.json")
    code = (
        "import sys; from pipeline.tracking import tracker\n"
        "server = [sys.executable, '-c', *sys.argv[4:]]; tracker.ui_command = lambda out, port: server\n"
        "from pipeline.cli import app; sys.argv = ['temporal-merge', *sys.argv[1:4]]; app.main()\n"
    )
    line = [sys.executable, "-c", code, "ui", str(study.out), f"--port={port}", *server_on(port)[2:]]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline().startswith(f"MLflow UI (Ctrl-C ends it): http://127.0.0.1:{port}")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "") and "Traceback" not in err and "ended" not in err
    check_port(port)


def test_server_that_ends_before_it_answers_is_an_error_and_is_never_named() -> None:
    with pytest.raises(TrackingError, match="ended with 3"):
        serve(
            [sys.executable, "-c", "raise SystemExit(3)"], "http://127.0.0.1:9/", lambda: pytest.fail("named")
        )


def test_answer_of_another_program_on_the_port_is_not_taken_for_the_servers() -> None:
    """Both started at once and the other was faster: it answers, and the one that was started ends with code 0, as MLflow does."""
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
